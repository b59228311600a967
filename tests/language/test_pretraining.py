"""Pretraining under the contract of every algorithm, against exact answers; corpora and what is wrong with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import jrl
from jrl import checkpoint
from jrl.language import data, pretraining
from jrl.language.pretraining import Corpus, HParams
from jrl.language.tokenizers import Byte, Char
from jrl.networks import transformer

MODEL = transformer.Config(
    vocab_size=6,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    width=8,
    mlp_width=16,
    max_length=8,
    init_scale=0.2,
)
CONFIG = pretraining.Config(batch_size=8, updates_per_step=4)
# The next token is known but for a coin at every third: the least loss is log(2) / 3.
PATTERN = np.array([[0, 1, 2 + coin] for coin in np.random.default_rng(0).integers(0, 2, 400)]).ravel()
HPARAMS = HParams(learning_rate=2e-2, learning_rate_end=1e-3, anneal_tokens=40_000.0, weight_decay=0.0)


class Learner:
    def __init__(self):
        train, self.validation = data.stream(PATTERN, Byte())
        self.algo = pretraining.make(train, MODEL, CONFIG, validation=self.validation)
        self.hparams = jax.tree.map(jnp.float32, HPARAMS)
        self.traces = 0

        def step(state, hparams):
            self.traces += 1
            return self.algo.step(state, hparams)

        self.init, self.step = jax.jit(self.algo.init), jax.jit(step)
        self.start = self.init(jax.random.key(0), self.hparams)
        self.first, self.metrics = self.step(self.start, self.hparams)


@pytest.fixture(scope="module")
def learner():
    return Learner()


def raw(tree):
    return jax.tree.map(
        lambda leaf: np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ),
        tree,
    )


def test_the_entropy_of_the_text_is_reached(learner):
    state = learner.start
    for _ in range(150):
        state, metrics = learner.step(state, learner.hparams)
    loss = jax.jit(lambda params: pretraining.evaluate(params, MODEL, learner.validation, CONFIG))(
        state.params
    )
    # The first of a window's 8 predictions may not know where in the pattern it is: it does, from its token.
    assert abs(float(loss) - np.log(2) / 3) < 0.03
    assert abs(float(metrics["validation_loss"]) - np.log(2) / 3) < 0.15
    assert jrl.ops.counter.to_int(state.env_steps) == 150 * learner.algo.env_steps_per_step == 150 * 4 * 8 * 8


def test_the_contract(learner, tmp_path):
    start, first, hparams = learner.start, learner.first, learner.hparams

    def spec(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.aval.weak_type), tree)

    assert spec(start) == spec(first)
    assert all(value.shape == () and np.isfinite(value) for value in learner.metrics.values())
    # Same key, same run; other keys differ; new numbers do not retrace.
    again = learner.step(learner.init(jax.random.key(0), hparams), hparams)
    jax.tree.map(assert_array_equal, raw(again[0]), raw(first))
    other = learner.step(learner.init(jax.random.key(1), hparams), hparams.replace(beta2=jnp.float32(0.9)))
    assert (other[0].params["embedding"] != first.params["embedding"]).any()
    assert learner.traces == 1
    # A restored state goes on to the same bits.
    checkpoint.save(tmp_path, first, step=1)
    restored = checkpoint.restore(
        tmp_path, like=jax.eval_shape(learner.algo.init, jax.random.key(0), hparams)
    )
    second, restored_second = learner.step(first, hparams)[0], learner.step(restored, hparams)[0]
    jax.tree.map(assert_array_equal, raw(second), raw(restored_second))
    with jax.debug_key_reuse(True), jax.checking_leaks():
        jax.jit(learner.algo.step).lower(start, hparams)


def test_a_member_of_a_sweep_is_the_run_alone(learner):
    rates = jnp.array([1e-2, 1e-3])
    hparams = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2,)), learner.hparams).replace(
        learning_rate=rates
    )
    keys = jax.random.split(jax.random.key(4), 2)
    both = jax.jit(
        jax.vmap(lambda key, hparams: learner.algo.step(learner.algo.init(key, hparams), hparams)[0])
    )
    params = both(keys, hparams).params
    for i in range(2):
        alone = learner.hparams.replace(learning_rate=rates[i])
        expected, _ = learner.step(learner.init(keys[i], alone), alone)
        for member, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_allclose(member[i], leaf, atol=2e-4)


def test_only_what_has_weight_is_learned():
    # After the prompt 0, 1 comes 2; what the prompts say themselves (4 after 3) is not to be learned.
    pairs = [([0, 1], [2]), ([3, 4, 3, 4], [2])]
    corpus = data.prompted(pairs, length=6, end_token=5)
    assert_array_equal(corpus.tokens, [[0, 1, 2, 5, 0, 0], [3, 4, 3, 4, 2, 5]])
    assert_array_equal(corpus.weight, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    config = pretraining.Config(batch_size=4, updates_per_step=40)
    algo = pretraining.make(corpus, MODEL, config)
    hparams = HParams(learning_rate=2e-2, weight_decay=0.0)
    state, _ = jax.jit(algo.step)(jax.jit(algo.init)(jax.random.key(0), hparams), hparams)
    p = jax.nn.softmax(
        jax.jit(lambda params: transformer.forward(params, MODEL, corpus.tokens).logits)(state.params)
    )
    assert (p[0, 1, 2], p[0, 2, 5], p[1, 3, 2], p[1, 4, 5]) > (0.9,) * 4
    assert p[1, 0, 4] < 0.5
    assert p[0, 0, 1] < 0.5
    exact = jax.jit(lambda params: pretraining.evaluate(params, MODEL, corpus, config))(state.params)
    nll = -np.log([p[0, 1, 2], p[0, 2, 5], p[1, 3, 2], p[1, 4, 5]]).mean()
    np.testing.assert_allclose(exact, nll, rtol=1e-4)
    # Fine-tuning begins where it is told to.
    tuned = pretraining.make(corpus, MODEL, config, start=state.params).init(jax.random.key(7), hparams)
    jax.tree.map(assert_array_equal, tuned.params, state.params)


def test_weights_that_sum_to_less_than_one_are_divided_by_as_well():
    logits, targets = jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int)
    for weight, expected in ([0.25, 0.25], np.log(4)), ([3.0, 0.0], np.log(4)), ([0.0, 0.0], 0.0):
        loss = pretraining.cross_entropy(logits, targets, jnp.array([weight]))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    rows = PATTERN[:18].reshape(2, 9)
    params = transformer.init(jax.random.key(0), MODEL)
    config = pretraining.Config(batch_size=1)
    whole, tenth = (
        jax.jit(lambda params, w=w: pretraining.evaluate(params, MODEL, Corpus(rows, w), config))(params)
        for w in (np.ones(rows.shape), np.full(rows.shape, 0.1))
    )
    np.testing.assert_allclose(tenth, whole, rtol=1e-5)


def test_evaluation_predicts_each_token_once(learner):
    tokens = PATTERN[:21]
    loss = jax.jit(lambda params: pretraining.evaluate(params, MODEL, Corpus(tokens), CONFIG))(
        learner.first.params
    )
    forward = jax.jit(
        lambda params, tokens: jax.nn.log_softmax(transformer.forward(params, MODEL, tokens).logits)
    )
    nll = []
    for start in (0, 8, 16):
        window = np.pad(tokens[start : start + 9], (0, max(0, start + 9 - 21)))
        log_p = forward(learner.first.params, window[None, :-1])[0]
        nll += [-float(log_p[i, window[i + 1]]) for i in range(8) if start + i + 1 < 21]
    assert len(nll) == 20
    np.testing.assert_allclose(loss, np.mean(nll), rtol=1e-5)


def test_weight_decay_shrinks_matrices_only():
    hparams = HParams(learning_rate=1.0, weight_decay=0.5, max_grad_norm=1.0)
    params = jax.tree.map(jnp.ones_like, jax.eval_shape(lambda: transformer.init(jax.random.key(0), MODEL)))

    @jax.jit
    def update(params):
        tx = pretraining.optimizer(hparams, jnp.float32(1.0))
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

    updates = update(params)
    assert_array_equal(updates["embedding"], -0.5 * np.ones((6, 8)))
    assert (updates["layers"]["qkv"]["kernel"] == -0.5).all()
    assert not updates["norm"]["gain"].any()


def test_packed_texts_lose_nothing():
    corpus = data.pack([[1, 2, 3], [4], [1, 1, 1, 1]], length=4, end_token=5)
    assert_array_equal(corpus.tokens, [[1, 2, 3, 5], [4, 5, 1, 1], [1, 1, 5, 0]])
    assert_array_equal(corpus.weight, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])


def test_the_builtin_corpus_is_there_and_a_file_is_read(tmp_path):
    text = data.read("builtin")
    assert len(text) > 400_000
    assert "exception" in text
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb é".encode())
    assert data.read(tmp_path / "a.txt") == "a\nb é"
    train, validation = data.stream(Char.of(text).encode(text), Char.of(text))
    assert train.tokens.dtype == np.uint8
    assert len(train.tokens) + len(validation.tokens) == len(text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", r"corpus .* is empty: a model needs text to learn from"),
        (b" \n\n", "is empty"),
        ("é".encode("latin-1"), "is not UTF-8: byte 0xe9 at 0"),
    ],
)
def test_bad_corpora_are_refused(content, text, tmp_path):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        data.read(tmp_path / "a.txt")


def test_what_cannot_be_evaluated_is_refused():
    params, rows = None, np.zeros((2, 4), int)
    with pytest.raises(ValueError, match="a corpus of 1 token: nothing follows it"):
        pretraining.evaluate(params, MODEL, Corpus(np.array([1])))
    with pytest.raises(ValueError, match=r"rows \(2, 4\) with weight \(2, 3\)"):
        pretraining.evaluate(params, MODEL, Corpus(rows, np.ones((2, 3))))
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"a token of weight {wrong}: weights are finite and at least 0"):
            pretraining.evaluate(
                params, MODEL, Corpus(rows, np.where(np.arange(4) == 1, wrong, np.ones((2, 4))))
            )


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match=r"token 6 of the corpus is outside the vocabulary: .* vocab_size=6"):
        pretraining.make(Corpus(np.array([1, 6, 2])), MODEL)
    with pytest.raises(
        ValueError, match="a corpus of 8 tokens is shorter than a window of sequence_length=8"
    ):
        pretraining.make(Corpus(np.zeros(8, int)), MODEL)
    with pytest.raises(ValueError, match="a text of 9 tokens: the context holds 1 to max_length=8"):
        pretraining.make(Corpus(np.zeros(80, int)), MODEL, pretraining.Config(sequence_length=9))
    with pytest.raises(ValueError, match=r"rows \(2, 4\) with weight \(0,\)"):
        pretraining.make(Corpus(np.zeros((2, 4), int)), MODEL)
    with pytest.raises(
        ValueError, match="pair 1 has a prompt of 3 tokens and 5 in all: a row needs a prompt and holds 4"
    ):
        data.prompted([([1], [2]), ([1, 2, 3], [4, 5])], length=4, end_token=-1)
    with pytest.raises(ValueError, match=r"validation=1\.5: the share of the text must lie between 0 and 1"):
        data.stream([1, 2, 3, 4], Byte(), validation=1.5)
