"""Q-learning over texts: targets against a loop, known values, and offline learning that beats its log."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl.language import (
    dpo,
    environments,
    exact,
    grammar,
    imitation,
    models,
    offline,
    preferences,
    tasks,
    token_q,
)
from jrl.language import policy_gradient as pg
from jrl.language.environments import Prompts, TokenReward, token_mdp


def train(algo, hparams, num_steps):
    hparams = hparams.replace(anneal_env_steps=float(num_steps * algo.env_steps_per_step))
    hparams = jax.tree.map(jnp.float32, hparams)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    return jrl.train(algo, state, hparams, num_steps=num_steps)


@pytest.fixture(scope="module")
def small():
    env = tasks.random_rewards(4, 3)
    return env, exact.enumerate_prefixes(env)


@pytest.mark.parametrize("lambda_", [0.0, 0.9])
def test_token_dqn_learns_the_exact_values(small, lambda_):
    """|Q − Q*| ≤ 0.01 everywhere, whatever λ: Watkins's returns are cut at every exploring token."""
    env, tree = small
    model = models.table(env, num_q=1)
    config = token_q.Config(num_envs=256, batch_size=512, capacity=2048, warmup_texts=1024)
    numbers = token_q.HParams(
        learning_rate=0.05, epsilon_end=1.0, lambda_=lambda_, tau=0.1, max_grad_norm=1e9
    )
    state, _ = train(token_q.make(env, config, model=model), numbers, 200)
    for obs, q in zip(tree.obs, exact.optimal_values(tree), strict=True):
        np.testing.assert_allclose(model.prefix(state.params, obs).q[:, 0], q, atol=0.01)


def test_a_text_that_is_cut_goes_on_and_one_that_ends_does_not():
    """Reward 1 at every token for ever, γ = 0.5: the value at the limit is 2 only if truncation bootstraps."""
    always = TokenReward(lambda text: (), lambda carry, text, over: (carry, 1.0, jnp.bool_(False)))
    values = {}
    for at_limit in ("truncate", "terminate"):
        env = token_mdp(Prompts([[0]], [1]), always, vocab_size=2, max_new_tokens=2, at_limit=at_limit)
        model = models.table(env, num_q=1)
        # Behind the limit there is nothing to learn from: its value is given, 2.
        first = model.init(jax.random.key(0))
        first["q"] = first["q"].at[-4:].set(2.0)
        config = token_q.Config(num_envs=16, batch_size=32, capacity=64, warmup_texts=32)
        algo = token_q.make(env, config, model=model._replace(init=lambda key, first=first: first))
        state, _ = train(algo, token_q.HParams(learning_rate=0.05, gamma=0.5, tau=0.1), 200)
        values[at_limit] = np.asarray(state.params["q"][:, 0])
    np.testing.assert_allclose(values["truncate"], 2.0, atol=0.01)
    np.testing.assert_allclose(values["terminate"][:1], 1.5, atol=0.01)
    np.testing.assert_allclose(values["terminate"][1:3], 1.0, atol=0.01)


def test_ilql_beats_its_log_and_cql_keeps_to_it(small):
    """From texts said at random: the policy's return is near the best; CQL's values of unseen tokens are lower."""
    env, tree = small
    random = np.random.default_rng(0)
    said = random.integers(0, 3, (300, 3))  # token 3 is never in the log
    tokens = np.concatenate([np.zeros((300, 1), int), said], axis=1)
    data = offline.replayed(env, tokens, np.zeros(300, int))
    model = models.table(env, num_q=2)
    config = token_q.Config(variant="ilql", batch_size=128, num_updates=4)
    algo = token_q.make(env, config, model=model, data=data)
    state, _ = train(algo, token_q.HParams(learning_rate=0.05, expectile=0.95, cql_coef=0.1), 150)
    policy, obs, total, place = algo.policy(state), env.step.start(0)[1], 0.0, env.step.start(0)[0]
    for _ in range(3):
        action, _, _ = policy(jax.random.key(0), obs[None])
        assert action[0] != 3
        place, obs, reward, *_ = env.step.advance(place, action[0], env.params)
        total += float(reward)
    allowed = [mask.at[:, 3].set(False) for mask in tree.allowed]
    best = float(exact.optimal_values(tree._replace(allowed=tuple(allowed)))[0].max())
    logged = np.asarray(data.reward.sum(1))
    assert total > 0.9 * best > logged.mean() + logged.std()
    q = model.prefix(state.params, tree.obs[0]).q[0]
    assert (q[:, 3] < q[:, :3].min(-1)).all()


def test_logged_texts_are_rated_and_checked():
    env = jrl.make("RandomWalks-jrl")
    walks, _ = tasks.logged_walks(tasks.walk_graph(), 50)
    data = offline.replayed(env, walks, walks[:, 0] - 1)
    assert (data.terminated.any(1)).all()
    with pytest.raises(ValueError, match="text 0 does not begin with prompt"):
        offline.replayed(env, walks, walks[:, 0] % 20)
    with pytest.raises(ValueError, match="token 21 of text 8 is outside the vocabulary of 21 tokens"):
        offline.replayed(env, np.where(walks == 4, 21, walks), walks[:, 0] - 1)
    with pytest.raises(ValueError, match=r"tokens \(50, 9\).*expected \[N, 10\]"):
        offline.replayed(env, walks[:, :9], walks[:, 0] - 1)
    with pytest.raises(ValueError, match="prompt 20 of text 0: RandomWalks-jrl has prompts 0 to 1"):
        offline.replayed(env, walks, np.full(50, 20))
    with pytest.raises(ValueError, match="variant='sarsa': must be one of dqn, ilql"):
        token_q.Config(variant="sarsa")
    with pytest.raises(ValueError, match="num_envs=64 exceeds capacity=32"):
        token_q.Config(capacity=32, warmup_texts=8)


LOGGED = {
    "a gap": ([0, -1, 1, -1], 0, "text 1 has a -1 between its tokens"),
    "nothing said": ([0, -1, -1, -1], 0, "text 1 has 0 tokens behind its prompt: .* takes 1 to 2"),
    "too long": ([0, 1, 1, 1], 0, "text 1 has 3 tokens behind its prompt: .* takes 1 to 2"),
    "below": ([0, -7, -1, -1], 0, "token -7 of text 1 is outside the vocabulary"),
    "behind the end": ([0, 3, 1, -1], 0, "token 3 at place 1 of text 1 ends its text, and others follow"),
    "ungrammatical": ([0, 2, 3, -1], 0, "token 2 at place 1 of text 1 is not allowed there by the grammar"),
}


@pytest.mark.parametrize("name", LOGGED)
def test_texts_that_cannot_have_been_said_are_refused(name):
    """Each would be learned from as something else: clamped, cut, or valued behind a mask that allows nothing."""
    tokens, prompt, message = LOGGED[name]
    rules = grammar.compile("b?", ["a", "b", "c", "<eos>"])
    env = token_mdp(
        Prompts([[0, -1], [1, 1]], [1, 2]),
        environments.at_end(lambda text: jnp.float32(1.0)),
        vocab_size=4,
        max_new_tokens=2,
        eos=3,
        grammar=rules,
    )
    right = [0, 1, 3, -1]
    with pytest.raises(ValueError, match=f"replayed: {message}"):
        offline.replayed(env, np.array([right, tokens]), np.array([0, prompt]))
    assert offline.replayed(env, np.array([right, [1, 1, 3, -1]]), np.array([0, 1])).terminated.sum() == 2


# -------------------------------------------------------------------------------------------------- preferences


def all_pairs(env):
    tokens = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), axis=1)
    tokens = np.concatenate([np.zeros((64, 1), int), tokens], axis=1).astype(np.int32)
    returns = np.asarray(offline.replayed(env, tokens, np.zeros(64, int)).reward.sum(1))
    first, second = np.triu_indices(64, 1)
    preference = 1.0 / (1.0 + np.exp(returns[second] - returns[first]))
    return preferences.Pairs(
        tokens[first], tokens[second], np.ones(len(first), np.int32), preference
    ), returns


def test_dpo_on_every_pair_finds_the_penalised_optimum(small):
    """KL(π ‖ π*) ≤ 0.01 nat without a reward, a rollout or a critic."""
    env, tree = small
    pairs, _ = all_pairs(env)
    model = models.table(env)
    algo = dpo.make(env, dpo.Config(batch_size=512), model=model, pairs=pairs)
    state, metrics = train(algo, dpo.HParams(learning_rate=0.05, beta=0.5, max_grad_norm=1e9), 60)
    uniform = [jnp.full(x.shape, -jnp.log(4.0)) for x in tree.reward]
    ours = [jax.nn.log_softmax(model.prefix(state.params, obs).logits) for obs in tree.obs]
    best = exact.soft_policy(tree, uniform, 0.5)
    assert exact.divergence(tree, uniform, best) > 0.3
    assert exact.divergence(tree, ours, best) <= 0.01
    assert metrics["accuracy"][-1] > 0.95


def test_dpo_in_a_grammar_weighs_what_the_policy_can_say():
    """Four texts, of which the grammar leaves some places no choice: there the logits are worth nothing."""
    texts = np.array([[0, 0, 0, 3], [0, 0, 1, 3], [0, 0, 2, 3], [0, 1, 1, 3]], np.int32)
    returns = np.array([0.0, 1.0, 2.0, 1.5])
    env = token_mdp(
        Prompts([[0]], [1]),
        environments.at_end(lambda text: jnp.float32(0.0)),
        vocab_size=4,
        max_new_tokens=3,
        eos=3,
        grammar=grammar.compile("a[abc]|bb", ["a", "b", "c", "<eos>"]),
    )
    first, second = np.triu_indices(4, 1)
    preference = 1.0 / (1.0 + np.exp(returns[second] - returns[first]))
    pairs = preferences.Pairs(texts[first], texts[second], np.ones(6, np.int32), preference)
    model = models.table(env)
    algo = dpo.make(env, dpo.Config(batch_size=64), model=model, pairs=pairs)
    state, _ = train(algo, dpo.HParams(learning_rate=0.05, beta=1.0, max_grad_norm=1e9), 60)
    allowed = environments.allowed_tokens(env.step, jnp.asarray(texts), jnp.ones(4, jnp.int32))
    said = imitation.Texts(jnp.asarray(texts), jnp.ones(4, jnp.int32))
    log_prob = imitation.log_likelihood(model, state.params, said, allowed)[0].sum(1)
    start = np.array([1 / 6, 1 / 6, 1 / 6, 1 / 2])  # of the masked reference, whose logits are equal
    best = start * np.exp(returns) / (start * np.exp(returns)).sum()
    np.testing.assert_allclose(np.exp(log_prob), best, atol=0.02)
    for tokens, message in (
        ([0, 1, 0, 3], "token 0 in text 1 of first"),
        ([0, 0, 3, -1], "token 3 in text 1 of first"),
    ):
        wrong = pairs._replace(first=np.where(np.arange(6)[:, None] == 1, tokens, pairs.first))
        with pytest.raises(ValueError, match=f"{message} is not allowed there by the grammar"):
            dpo.make(env, model=model, pairs=wrong)


def test_dpo_loss_is_the_papers_on_the_first_step():
    """A gradient-free check: at the reference the loss is log 2, whatever the preferences."""
    env = tasks.random_rewards(3, 2)
    algo = dpo.make(env, dpo.Config(num_pairs=16, batch_size=8, num_updates=1, hidden_sizes=(8,)))
    state = jax.jit(algo.init)(jax.random.key(0), dpo.HParams())
    assert ((state.pairs.preference > 0) & (state.pairs.preference < 1)).all()
    assert (state.pairs.first[:, 1:] >= 0).all()
    _, metrics = jax.jit(algo.step)(state, dpo.HParams())
    np.testing.assert_allclose(metrics["loss"], np.log(2.0), rtol=1e-6)
    random = np.random.default_rng(0)
    difference, preference = random.normal(size=20), random.uniform(size=20)
    slow = [-p * np.log(1 / (1 + np.exp(-d))) - (1 - p) * np.log(1 / (1 + np.exp(d)))
            for d, p in zip(difference, preference, strict=True)]  # fmt: skip
    ours = preferences.bradley_terry_loss(jnp.float32(difference), jnp.float32(preference))
    np.testing.assert_allclose(ours, np.mean(slow), rtol=1e-5)


def test_accuracy_is_half_where_the_margin_or_the_preference_is_undecided():
    env = tasks.random_rewards(3, 2)
    texts = np.array([[0, 1, 2], [0, 2, 1]], np.int32)
    model = models.table(env)
    params = model.init(jax.random.key(0))
    params["logits"] = params["logits"].at[0, 1].set(1.0)  # the first of the texts has become likelier
    for preference, start, later in ((1.0, 0.5, 1.0), (0.0, 0.5, 0.0), (0.5, 0.5, 0.5)):
        pairs = preferences.Pairs(texts[:1], texts[1:], np.ones(1, np.int32), np.array([preference]))
        swapped = pairs._replace(first=texts[1:], second=texts[:1], preference=1 - pairs.preference)
        for given in (pairs, swapped):
            algo = dpo.make(env, dpo.Config(batch_size=4, num_updates=1), model=model, pairs=given)
            state = algo.init(jax.random.key(0), dpo.HParams())
            assert algo.step(state, dpo.HParams())[1]["accuracy"] == start
            assert algo.step(state.replace(params=params), dpo.HParams())[1]["accuracy"] == later


def test_a_reward_model_recovers_returns_up_to_a_constant_and_can_be_maximised(small):
    env, _ = small
    pairs, returns = all_pairs(env)
    model = models.perceptron(env, (32,))
    params, losses = preferences.fit(jax.random.key(0), model, pairs, num_steps=800, learning_rate=1e-2)
    tokens = np.concatenate([pairs.first[:1], pairs.second[:63]])
    learned = np.asarray(preferences.values(model, params, tokens))
    np.testing.assert_allclose(learned - learned.mean(), returns - returns.mean(), atol=0.15)
    assert losses[-1] < losses[0]
    score = preferences.reward(model, params)
    judged = token_mdp(
        Prompts([[0]], [1]), jrl.language.environments.at_end(score), vocab_size=4, max_new_tokens=3,
        at_limit="terminate",
    )  # fmt: skip
    value = exact.optimal_values(exact.enumerate_prefixes(judged))[0].max()
    np.testing.assert_allclose(value, learned.max(), rtol=1e-5)


def test_what_preferences_refuse():
    pairs = preferences.Pairs(jnp.array([[0, 1]]), jnp.array([[0, -1]]), jnp.array([1]), jnp.array([1.0]))
    env = tasks.random_rewards(2, 1)
    with pytest.raises(ValueError, match="text 0 of second is empty"):
        dpo.make(env, pairs=pairs)
    with pytest.raises(ValueError, match="preferences must be probabilities"):
        preferences.check(pairs._replace(preference=jnp.array([jnp.nan])))
    texts, ones = np.array([[0, 1, 1], [0, 1, -1]]), np.ones(2, int)
    right = preferences.Pairs(texts, texts, ones, np.array([1.0, 0.5]))
    preferences.check(right)
    for change, message in (
        ({"preference": np.ones(3)}, r"first \(2, 3\), second \(2, 3\), preference \(3,\): expected"),
        ({"second": texts[:1]}, r"second \(1, 3\)"),
        ({"prompt_length": np.ones(1, int)}, r"tokens \(2, 3\) with prompt_length \(1,\)"),
        ({"first": np.array([[0, 1, 1], [0, -1, 1]])}, "text 1 of first has a -1 between its tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            preferences.fit(jax.random.key(0), models.table(env), right._replace(**change), num_steps=1)
    for change in ({"prompt_length": 0 * ones}, {"first": 2 * texts}, {}):  # the texts of env are of 2 tokens
        pairs = preferences.Pairs(texts[:, :2], texts[:, :2], ones, right.preference) if change else right
        with pytest.raises(
            ValueError, match=r"expected \[M, 2\], tokens below 2, at most 1 of them, and prompts"
        ):
            dpo.make(env, pairs=pairs._replace(**{name: x[..., :2] for name, x in change.items()}))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (imitation.Texts(np.zeros((0, 3), int), np.ones(0, int)), r"tokens \(0, 3\)"),
        (
            imitation.Texts(np.array([[0, 1]]), np.ones(2, int)),
            r"prompt_length \(2,\): expected \[M, L\] and",
        ),
        (imitation.Texts(np.array([[0, 1, 1], [0, -1, 1]]), np.ones(2, int)), "text 1 has a -1 between"),
        (
            imitation.Texts(np.array([[0, 1], [0, -1]]), np.ones(2, int)),
            "text 1 is empty: it has nothing behind",
        ),
    ],
)
def test_texts_that_are_none_are_not_imitated(texts, message):
    with pytest.raises(ValueError, match=message):
        imitation.fit(jax.random.key(0), models.table(tasks.random_rewards(2, 1)), texts, num_steps=1)


def test_a_scorer_is_part_of_the_kernel():
    """A score given to whole texts, its state in the checkpoint, is maximised like a reward."""
    silent = TokenReward(lambda text: (), lambda carry, text, over: (carry, 0.0, jnp.bool_(False)))
    env = token_mdp(Prompts([[0]], [1]), silent, vocab_size=3, max_new_tokens=3)
    scorer = jrl.language.rewards.weighted_sum(
        {"twos": lambda text: (text.tokens == 2).sum(), "ones": lambda text: (text.tokens == 1).sum()},
        {"twos": 1.0, "ones": 0.5},
        normalize=True,
    )
    algo = pg.make(
        env, pg.Config(variant="rloo", num_prompts=1, group_size=64, hidden_sizes=(16,)), scorer=scorer
    )
    state, metrics = train(algo, pg.HParams(learning_rate=0.02), 60)
    assert metrics["score/twos"][-1] > 2.8
    assert state.scorer.count == 60 * 64
