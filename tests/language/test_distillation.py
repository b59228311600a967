"""Distillation: divergences against NumPy, the contract, the student that becomes its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jrl import checkpoint
from jrl.language import distillation
from jrl.language.distillation import Config, HParams
from jrl.language.pretraining import Corpus
from jrl.networks import transformer

TEACHER = transformer.Config(
    vocab_size=5,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    width=8,
    mlp_width=16,
    max_length=8,
    init_scale=0.7,
)
STUDENT = transformer.Config(
    vocab_size=5,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    width=6,
    mlp_width=8,
    max_length=8,
    init_scale=0.3,
)
TOKENS = Corpus(np.random.default_rng(0).integers(0, 5, 500))
HPARAMS = HParams(
    learning_rate=1e-2, learning_rate_end=1e-3, weight_decay=0.0, temperature=1.5, cross_entropy_coef=0.1
)


@pytest.mark.parametrize("kind", distillation.DIVERGENCES)
def test_divergences_equal_a_slow_loop(kind):
    rng = np.random.default_rng(1)
    teacher, student, beta = rng.normal(size=(4, 7)) * 2, rng.normal(size=(4, 7)) * 2, 0.3
    expected = []
    for t, s in zip(teacher, student, strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        m = beta * p + (1 - beta) * q
        kl = lambda a, b: sum(x * np.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
        expected.append(
            {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[
                kind
            ]
        )
    value = distillation.divergence(jnp.array(teacher), jnp.array(student), kind, beta)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(
        distillation.divergence(jnp.array(teacher), jnp.array(teacher), kind), 0, atol=1e-6
    )


class Learner:
    def __init__(self, config):
        self.params = jax.jit(lambda: transformer.init(jax.random.key(5), TEACHER))()
        self.algo = distillation.make(TOKENS, STUDENT, TEACHER, self.params, config, validation=TOKENS)
        self.hparams = jax.tree.map(jnp.float32, HPARAMS)
        self.init, self.step = jax.jit(self.algo.init), jax.jit(self.algo.step)
        self.start = self.init(jax.random.key(0), self.hparams)
        self.first, self.metrics = self.step(self.start, self.hparams)


@pytest.fixture(scope="module", params=["corpus", "on_policy"])
def learner(request):
    sizes = {"batch_size": 8, "updates_per_step": 10}
    if request.param == "corpus":
        return Learner(Config(**sizes))
    return Learner(Config(**sizes, divergence="jsd", on_policy=True, prompt_length=2))


def test_the_student_comes_near_its_teacher(learner):
    state = learner.start
    before = float(learner.metrics["divergence"])
    for _ in range(30):
        state, metrics = learner.step(state, learner.hparams)
    assert float(metrics["divergence"]) < 0.4 * before
    jax.tree.map(assert_array_equal, state.teacher, learner.params)


def test_the_contract(learner, tmp_path):
    def spec(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.aval.weak_type), tree)

    def raw(tree):
        return [
            np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
            for x in jax.tree.leaves(tree)
        ]

    assert spec(learner.start) == spec(learner.first)
    assert all(value.shape == () and np.isfinite(value) for value in learner.metrics.values())
    checkpoint.save(tmp_path, learner.first, step=1)
    # What is restored needs no teacher given: the checkpoint has it.
    algo = distillation.make(TOKENS, STUDENT, TEACHER, None, Config(), validation=TOKENS)
    like = jax.eval_shape(algo.init, jax.random.key(0), learner.hparams)
    restored = checkpoint.restore(tmp_path, like=like)
    second, again = (
        learner.step(learner.first, learner.hparams)[0],
        learner.step(restored, learner.hparams)[0],
    )
    for a, b in zip(raw(second), raw(again), strict=True):
        assert_array_equal(a, b)
    changed = learner.hparams.replace(temperature=jnp.float32(1.0), jsd_beta=jnp.float32(0.1))
    learner.step(learner.first, changed)
    assert learner.step._cache_size() == 1
    with jax.debug_key_reuse(True):
        jax.jit(learner.algo.step).lower(learner.start, learner.hparams)


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(ValueError, match="the student has vocab_size=5, the teacher 6"):
        distillation.make(TOKENS, STUDENT, transformer.Config(6), None)
    with pytest.raises(ValueError, match="divergence='kl': must be one of forward_kl, reverse_kl, jsd"):
        Config(divergence="kl")
    with pytest.raises(ValueError, match="prompt_length=9 with texts of 9 tokens"):
        distillation.make(TOKENS, STUDENT, TEACHER, None, Config(on_policy=True, prompt_length=9))
