"""A language model as the policy and as the reward of environments that are told in words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl.language import control, preferences
from jrl.networks import transformer

# 0 red, 1 green, 2 stop, 3 go, 4 yes, 5 no, 6 now
TEXTS = ([6, 0], [1])
CONFIG = transformer.Config(
    7, num_layers=1, num_heads=2, num_kv_heads=1, width=8, mlp_width=8, max_length=6, init_scale=0.5
)


@pytest.fixture(scope="module")
def decoder():
    return transformer.init(jax.random.key(0), CONFIG)


def said(params, text):
    """Logits after one text alone, no padding."""
    return np.asarray(transformer.forward(params, CONFIG, jnp.array([text])).logits[0, -1])


def test_texts_are_looked_up():
    render = control.table([[0], [1, 2], [3], [4], [5], [6, 6]], (3, 2))
    row, column = jnp.array([[0, 2], [1, 1]]), jnp.array([[1, 1], [0, 1]])
    np.testing.assert_array_equal(render(row, column), [[[1, 2], [6, 6]], [[3, -1], [4, -1]]])
    with pytest.raises(ValueError, match=r"table of 2 texts in the shape \(3,\): needs one for each"):
        control.table(TEXTS, (3,))
    for wrong in ([[1], []], []):
        with pytest.raises(ValueError, match="at least one token"):
            control.table(wrong)
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match=f"table: {wrong} is no token"):
            control.table([[1], [wrong, 2]])


def test_the_policy_is_the_distribution_over_the_words_of_the_actions(decoder):
    network = control.policy_network(CONFIG, control.table(TEXTS), [3, 2], decoder)
    params = network.init(jax.random.key(1), jnp.int32(0))
    obs = jnp.array([[1, 0, 0], [0, 1, 0]])
    logits, value = network.apply(params, obs)
    assert value.shape == obs.shape
    assert not value.any()  # its head is new
    after = np.stack([said(decoder, text) for text in TEXTS])[:, [3, 2]]
    np.testing.assert_allclose(logits, after[np.asarray(obs)], atol=1e-5)
    assert np.ptp(after) > 0.1
    new = control.policy_network(CONFIG, control.table(TEXTS), [3, 2]).init(jax.random.key(0), jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, {part: new[part] for part in decoder}, decoder)
    for wrong in ([2, 2], [2, 7], [-1, 2], [1.5, 2], []):
        with pytest.raises(ValueError, match=r"actions=.*different tokens of the vocabulary, 0 to 6"):
            control.policy_network(CONFIG, control.table(TEXTS), wrong)


def test_a_judge_answers_as_the_model_does(decoder):
    render = control.table(TEXTS)
    odds = control.log_odds(decoder, CONFIG, render(jnp.array([0, 1])), yes=4, no=5)
    after = [said(decoder, text) for text in TEXTS]
    np.testing.assert_allclose(odds, [each[4] - each[5] for each in after], atol=1e-5)

    def log_probs(tokens):
        return jax.nn.log_softmax(control.next_token(decoder, CONFIG, tokens).logits)

    class Shown:
        tokens = render(1)

    np.testing.assert_allclose(preferences.judge(log_probs, 4, 5)(Shown), odds[1], atol=1e-5)


def test_the_reward_sees_what_came_of_it_and_not_what_follows_a_reset():
    """Into the goal from the cell before it, and a time limit: neither shows the next episode's first cell."""
    env = jrl.make("GridWorld-jrl", raw=True, start=-1, params={"max_steps": 3})
    judged = control.rewarded_by(env, lambda obs, action, next_obs: 10_000 * obs + 100 * action + next_obs)
    assert judged.name == "GridWorld-jrl (judged)"

    @jax.jit
    @jax.vmap
    def play(key):
        reset_key, act_key, step_key = jax.random.split(key, 3)
        state, obs = judged.reset(reset_key, judged.params)

        def step(carry, keys):
            state, obs = carry
            action = jax.random.randint(keys[0], (), 0, 4)
            state, out = judged.step(keys[1], state, action, judged.params)
            return (state, out.obs), (obs, action, out)

        keys = jnp.stack([jax.random.split(act_key, 8), jax.random.split(step_key, 8)], axis=1)
        return jax.lax.scan(step, (state, obs), keys)[1]

    obs, action, out = play(jax.random.split(jax.random.key(0), 64))
    np.testing.assert_array_equal(out.reward, 10_000 * obs + 100 * action + out.next_obs)
    assert (np.asarray(out.obs != out.next_obs) & np.asarray(out.terminated)).any()
    assert (np.asarray(out.obs != out.next_obs) & np.asarray(out.truncated)).any()


def test_a_policy_in_words_learns_what_a_judge_in_words_approves(decoder):
    """The traffic light by PPO, policy and reward one decoder each, in one program."""
    told = control.table([[*text, 6, action] for text in TEXTS for action in (2, 3)], (2, 2))
    untrained = control.log_odds(decoder, CONFIG, told(jnp.array([0, 1]), jnp.array([0, 1])), yes=4, no=5)

    def rate(obs, action, next_obs):
        """What the judge says of stop at red and of go at green is right, here, and anything else is not."""
        odds = control.log_odds(decoder, CONFIG, told(obs, action)[None], yes=4, no=5)[0]
        return -jnp.abs(odds - jnp.where(obs == 0, untrained[0], untrained[1]))

    env = control.rewarded_by(jrl.make("TrafficLight-jrl", raw=True), rate)
    network = control.policy_network(CONFIG, control.table(TEXTS), [2, 3], decoder)
    algo = jrl.ppo.make(env, jrl.ppo.Config(num_envs=16, unroll_length=8, num_minibatches=2), network=network)
    hparams = jax.tree.map(jnp.float32, jrl.ppo.HParams(learning_rate=1e-2, gamma=0.5))
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    before = state.params
    state, _ = jax.jit(lambda state: jrl.train(algo, state, hparams, num_steps=20))(state)
    action, _, _ = algo.policy(state)(jax.random.key(0), jnp.array([0, 1]), ())
    np.testing.assert_array_equal(action, [0, 1])
    assert not jax.tree.all(jax.tree.map(np.array_equal, before, state.params))
