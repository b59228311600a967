"""A toy language of words spelled backwards: laid out, learned supervised, scored by hand, improved by its metric."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl.language import data, exact, models, policy_gradient, pretraining, rewards, translation
from jrl.language.generation import Generated
from jrl.networks import transformer

SEPARATOR, END, SIZE = 4, 5, 6
PAIRS = translation.group(
    [((0, 1, 2), (2, 1, 0)), ((3,), (3,)), ((0, 1, 2), (2, 1, 0)), ((3,), (3, 3)), ((2, 2), (1,))]
)


def env_of(pairs=PAIRS, **kwargs):
    return translation.environment(pairs, vocab_size=SIZE, separator=SEPARATOR, eos=END, **kwargs)


def said(*texts, finished=True):
    length = max(map(len, texts)) + finished
    rows = [[*text, *[END] * finished, *[0] * length][:length] for text in texts]
    lengths = jnp.array([len(text) + finished for text in texts])
    empty = jnp.zeros((len(texts), length))
    return Generated(jnp.array(rows), empty, (), lengths, jnp.full(len(texts), finished))


def test_sources_keep_all_their_references():
    assert PAIRS == {(0, 1, 2): [[2, 1, 0]], (3,): [[3], [3, 3]], (2, 2): [[1]]}
    spec = env_of().step
    assert (spec.max_prompt, spec.max_new_tokens) == (4, 4)
    np.testing.assert_array_equal(spec.prompts.length, [4, 2, 3])
    np.testing.assert_array_equal(spec.prompts.reference.length, [[3, -1], [1, 2], [1, -1]])
    with pytest.raises(ValueError, match=r"Translation: 1 sources, each of which needs a reference"):
        env_of({(1,): []})
    for token, what in ((SIZE, "none of"), (-2, "none of"), (END, "the end, which is put behind it")):
        with pytest.raises(
            ValueError, match=rf"Translation: a reference of \(1,\) has token {token}, {what}"
        ):
            env_of({(1,): [[2, token]]})


def test_the_reward_is_the_metric_of_the_nearest_reference():
    env = env_of()

    def play(number, *tokens):
        state, _ = env.step.start(number)
        rewards = []
        for token in tokens:
            state, _, reward, terminated, _ = env.step.advance(state, token, env.params)
            rewards.append(float(reward))
        assert terminated
        return rewards

    assert play(0, 2, 1, 0, END) == [0, 0, 0, 1]
    assert play(0, 2, 1, END) == pytest.approx([0, 0, 2 / 3])
    assert play(1, 3, 3, END) == [0, 0, 1]
    assert play(0, 2, 1, 0, 3) == pytest.approx([0, 0, 0, 2 / 3])  # cut


def test_its_potential_is_the_optimal_value_so_that_only_mistakes_cost():
    pairs = {(0, 1, 2): [[2, 1, 0], [2, 0]]}
    plain = env_of(pairs, max_new_tokens=5)
    env = env_of(pairs, max_new_tokens=5, potential=rewards.edit_similarity_ahead)
    trees = [exact.enumerate_prefixes(each) for each in (plain, env)]
    q, ahead = (exact.optimal_values(tree, 1.0) for tree in trees)
    for depth in range(2):  # further on the limit keeps the best continuation out
        alive = trees[0].alive[depth]
        lost = q[depth] - q[depth].max(1, keepdims=True)
        np.testing.assert_allclose(ahead[depth][alive], lost[alive], atol=1e-6)

    advance = jax.jit(env.step.advance)

    def play(*tokens):
        state, _ = env.step.start(0)
        paid = []
        for token in tokens:
            state, _, reward, _, _ = advance(state, token, env.params)
            paid.append(float(reward))
        return paid

    assert play(2, 1, 0, END) == [0, 0, 0, 0]
    assert play(2, 0, END) == [0, 0, 0]
    assert play(3, 2, 1, 0, END) == pytest.approx([-1 / 3, 0, 0, 0, 0], abs=1e-6)
    assert play(2, 1, END) == pytest.approx([0, 0, -1 / 3], abs=1e-6)


def test_corpus_metrics_by_hand():
    rate, exact = translation.error_rate(said((2, 1, 1), (3, 3), (2, 2)), env_of())
    assert rate == pytest.approx((1 + 0 + 2) / (3 + 2 + 1))
    assert exact == pytest.approx(1 / 3)
    assert translation.error_rate(said((2, 1, 0), (3,), (1,), finished=False), env_of())[1] == 0.0
    pairs = {(0,): [[0, 1, 2, 3]], (1,): [[3, 2, 1, 0]]}
    assert translation.bleu(said((0, 1, 2, 3), (3, 2, 1, 0)), env_of(pairs)) == pytest.approx(100)
    # 7 of 8 words, 5 of 6 pairs, 3 of 4, 1 of 2.
    expected = 100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25
    assert translation.bleu(said((0, 1, 2, 3), (3, 2, 1, 1)), env_of(pairs)) == pytest.approx(expected)


def test_supervised_learning_and_then_the_metric():
    words = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), 1).tolist()
    pairs = translation.group((word, word[::-1]) for word in words)
    env = env_of(pairs)
    decoder = transformer.Config(
        SIZE, num_layers=2, num_heads=2, num_kv_heads=2, width=32, mlp_width=64, max_length=8, value_head=True
    )
    rows = data.prompted([([*word, SEPARATOR], word[::-1]) for word in words], 8, END)
    algo = pretraining.make(rows, decoder, pretraining.Config(batch_size=64))
    hparams = pretraining.HParams(learning_rate=3e-3)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    state, _ = jrl.train(algo, state, hparams, num_steps=5)
    before, _ = translation.error_rate(translation.translate(state.params, decoder, env, num_slots=16), env)
    assert 0.02 < before < 0.7  # half learned

    config = policy_gradient.Config(variant="rloo", num_prompts=32, group_size=8, cache=True, penalty="none")
    model = models.from_transformer(env, decoder, state.params)
    algo = policy_gradient.make(env, config, model=model)
    hparams = policy_gradient.HParams(learning_rate=1e-3)
    state, metrics = jrl.train(algo, jax.jit(algo.init)(jax.random.key(1), hparams), hparams, num_steps=60)
    after, exact = translation.error_rate(
        translation.translate(state.params, decoder, env, num_slots=16), env
    )
    assert after < 0.7 * before
    assert exact > 0.5
    assert metrics["score"][-10:].mean() > metrics["score"][:10].mean() + 0.05
