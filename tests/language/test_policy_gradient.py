"""Policy gradients over texts against slow loops from the papers, exact gradients, and known best policies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jrl
from jrl import rollout
from jrl.envs import vectorize
from jrl.language import exact, models, surrogates, tasks
from jrl.language import policy_gradient as pg
from jrl.language.environments import Prompts, at_end, token_mdp
from jrl.types import Policy


def log_policy(model, params, tree):
    return tuple(jax.nn.log_softmax(model.prefix(params, obs).logits, -1) for obs in tree.obs)


# ------------------------------------------------------------------------------------------------------- losses


def random_batch(seed=0, texts=6, steps=4):
    random = np.random.default_rng(seed)
    length = random.integers(1, steps + 1, texts)
    said = np.arange(steps) < length[:, None]
    old = np.log(random.uniform(0.1, 0.9, (texts, steps)))
    new = old + random.normal(size=old.shape) * 0.3
    reference = old + random.normal(size=old.shape) * 0.3
    reward = np.where(said, random.normal(size=said.shape), 0.0)
    advantage = random.normal(size=said.shape)
    return length, said, old, new, reference, reward, advantage


def test_advantages_equal_slow_loops():
    length, said, _, _, _, reward, _ = random_batch()
    last = said & (np.arange(4) == length[:, None] - 1)
    gamma, group = 0.9, 3
    to_go = np.zeros(said.shape)
    for i in range(6):
        for t in range(length[i]):
            to_go[i, t] = sum(gamma**k * reward[i, t + k] for k in range(length[i] - t))
    returns = to_go[:, 0]
    for variant, choice in surrogates.VARIANTS.items():
        if variant == "ppo":
            continue
        ours = surrogates.compare(choice, jnp.float32(reward.T), jnp.array(last.T), gamma, group).T
        for i in range(6):
            mates = [j for j in range(6) if j // group == i // group]
            others = [j for j in mates if j != i]
            for t in range(length[i]):
                expected = {
                    "grpo": (returns[i] - returns[mates].mean()) / (returns[mates].std(ddof=1) + 1e-4),
                    "dr_grpo": returns[i] - returns[mates].mean(),
                    "rloo": returns[i] - returns[others].mean(),
                    "reinforce": to_go[i, t] - np.delete(to_go[:, t], i).mean(),
                }[variant]
                np.testing.assert_allclose(ours[i, t], expected, rtol=2e-5, atol=1e-6, err_msg=variant)


def test_losses_equal_slow_loops_from_the_papers():
    length, said, old, new, reference, _, advantage = random_batch()
    low, high = 0.2, 0.28
    ours = [jnp.float32(x) for x in (new, old, advantage)]
    clipped, k3, plain = (np.zeros(said.shape) for _ in range(3))
    for i, t in np.argwhere(said):
        ratio = np.exp(new[i, t] - old[i, t])
        a = advantage[i, t]
        clipped[i, t] = -min(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
        k3[i, t] = np.exp(reference[i, t] - new[i, t]) - (reference[i, t] - new[i, t]) - 1
        plain[i, t] = -a * new[i, t]

    def weigh(x, tokens):
        if tokens == "all":
            return sum(x[i, t] for i, t in np.argwhere(said)) / length.sum()
        of_each = [
            sum(x[i, : length[i]]) / {"each": length[i], "fixed": 4, "sum": 1}[tokens] for i in range(6)
        ]
        return np.mean(of_each)

    for variant, choice in surrogates.VARIANTS.items():
        expected = weigh(clipped if choice.clipped else plain, choice.tokens)
        loss = surrogates.surrogate_loss(choice, *ours, said, low, high)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, err_msg=variant)
        penalty = surrogates.penalty_loss(choice, ours[0], jnp.float32(reference), said)
        np.testing.assert_allclose(penalty, weigh(k3, choice.tokens), rtol=1e-5, err_msg=variant)


# ------------------------------------------------------------------------------------------- the gradient itself


def mean_gradient(env, model, params, config, kl_coef, batches):
    """The mean over many batches of the gradient that one step takes, and its standard error."""
    algo = pg.make(
        env,
        config,
        model=model._replace(init=lambda key: params),
        optimizer=lambda hparams, rate: optax.sgd(1.0),
    )
    hparams = pg.HParams(kl_coef=kl_coef)

    def one(key):
        state = algo.init(key, hparams)
        # The reference is uniform; the policy is not.
        state = state.replace(reference=jax.tree.map(jnp.zeros_like, params))
        stepped, _ = algo.step(state, hparams)
        return (stepped.params["logits"] - params["logits"]).reshape(-1)

    samples = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=64))(
        jax.random.split(jax.random.key(3), batches)
    ), np.float64)  # fmt: skip
    return samples.mean(0), samples.std(0, ddof=1) / np.sqrt(batches)


@pytest.fixture(scope="module")
def small():
    env = tasks.random_rewards(3, 2, seed=1, scale=1.0)
    tree, model = exact.enumerate_prefixes(env), models.table(env)
    params = model.init(jax.random.key(0))
    params["logits"] = jax.random.normal(jax.random.key(1), params["logits"].shape)
    return env, tree, model, params


@pytest.mark.parametrize(("variant", "scale"), [("rloo", 1.0), ("reinforce", 1.0), ("dr_grpo", 0.75 / 2)])
def test_the_mean_gradient_is_the_exact_one(small, variant, scale):
    """Within three standard errors, component by component. Dr. GRPO's is (1 − 1/G) / T of it."""
    env, tree, model, params = small
    beta = 0.3
    uniform = [jnp.full(x.shape, -jnp.log(3.0)) for x in tree.reward]

    def objective(params):
        log_p = log_policy(model, params, tree)
        return exact.expectation(tree, log_p) - beta * exact.divergence(tree, log_p, uniform)

    expected = scale * jax.grad(objective)(params)["logits"].reshape(-1)
    config = pg.Config(variant=variant, penalty="reward", num_prompts=4, group_size=4)
    mean, error = mean_gradient(env, model, params, config, beta, 4000)
    used = np.arange(mean.size) < 4 * 3  # the prefixes that are followed by a token
    assert (error[used] > 0).all()
    np.testing.assert_array_less(np.abs(mean - expected)[used], 3 * error[used])
    assert np.abs(expected).max() > 20 * error.max()  # otherwise anything would pass


def test_grpos_own_penalty_comes_to_rest_where_it_is_said_to(small):
    """At ``penalised_policy`` the mean gradient of GRPO without its division by the deviation vanishes."""
    env, tree, model, params = small
    beta, group = 0.3, 4
    uniform = [jnp.full(x.shape, -jnp.log(3.0)) for x in tree.reward]
    rest = exact.penalised_policy(tree, uniform, beta)
    for log_p in rest:
        np.testing.assert_allclose(np.exp(log_p).sum(-1), 1.0, rtol=1e-5)
    at_rest = params | {"logits": jnp.concatenate([*rest, jnp.zeros((9, 3))])}
    config = pg.Config(variant="dr_grpo", num_prompts=4, group_size=group)
    mean, error = mean_gradient(env, model, at_rest, config, beta * (1 - 1 / group), 4000)
    np.testing.assert_array_less(np.abs(mean[:12]), 3 * error[:12])
    # The policy that a penalty in the reward leads to is another.
    other = exact.soft_policy(tree, uniform, beta)
    at_other = params | {"logits": jnp.concatenate([*other, jnp.zeros((9, 3))])}
    mean, error = mean_gradient(env, model, at_other, config, beta * (1 - 1 / group), 4000)
    assert (np.abs(mean[:12]) > 5 * error[:12]).any()


def test_ppo_learns_nothing_from_a_reward_that_is_always_the_same():
    """The rounding of its mean is no advantage: it was one of a standard deviation, the same for whatever was said."""
    env = token_mdp(
        Prompts([[0]], [1]), at_end(lambda text: jnp.float32(-7.7)), vocab_size=3, max_new_tokens=1, eos=2
    )
    config = pg.Config(variant="ppo", num_prompts=1, group_size=100)
    algo, hparams = pg.make(env, config, model=models.table(env)), pg.HParams(kl_coef=0.0)
    _, metrics = jax.jit(lambda key: algo.step(algo.init(key, hparams), hparams))(jax.random.key(0))
    assert metrics["policy_loss"] == 0.0


# ---------------------------------------------------------------------------------------------- known best policies


@pytest.mark.parametrize("variant", ["grpo", "ppo"])
def test_the_penalised_optimum_is_reached(variant):
    """KL(π ‖ π*) ≤ 0.01 nat; every variant at 8^5 texts is a row of benchmarks/ladder.py."""
    env, beta = tasks.random_rewards(4, 3), 0.5
    tree, model = exact.enumerate_prefixes(env), models.table(env)
    config = pg.Config(variant=variant, penalty="reward", num_prompts=1, group_size=512)
    algo = pg.make(env, config, model=model)
    horizon = 300 * algo.env_steps_per_step
    hparams = pg.HParams(
        learning_rate=0.05, anneal_env_steps=float(horizon), kl_coef=beta, value_coef=1.0, value_clip_eps=1e9
    )
    hparams = jax.tree.map(jnp.float32, hparams)
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    uniform = log_policy(model, state.params, tree)
    best = exact.soft_policy(tree, uniform, beta)
    assert exact.divergence(tree, uniform, best) > 0.3
    state, _ = jrl.train(algo, state, hparams, num_steps=300)
    assert exact.divergence(tree, log_policy(model, state.params, tree), best) <= 0.01
    assert exact.divergence(tree, log_policy(model, state.reference, tree), uniform) == 0.0


# --------------------------------------------------------------------------------------------------- the fast path


def test_the_cache_says_the_same_texts():
    """Same keys: the same tokens, rewards and ends, log-probabilities and values to 1e-5, across several prompts."""
    env = jrl.make("Addition-jrl")
    config = pg.Config(model="transformer", num_layers=2, num_heads=2, width=16)
    model = models.of_config(env, config)
    params = model.init(jax.random.key(0))
    params["embedding"] *= 20.0  # far from uniform
    envs = vectorize(env, 8)
    start = rollout.start(jax.random.key(1), envs, env.params, 8)
    steps = env.step.max_new_tokens

    def play(cache):
        memory = model.start(params, start.obs) if cache else ()
        policy = Policy(models.actor(model, cache=cache), params, rollout.keep_memory)
        return rollout.unroll(
            jax.random.key(2), envs, env.params, policy, start._replace(memory=memory), steps
        )[1]

    fast, slow = jax.jit(play, static_argnums=0)(True), jax.jit(play, static_argnums=0)(False)
    ended = np.asarray(slow.terminated | slow.truncated)
    said = np.cumsum(ended, axis=0) - ended == 0
    assert said.sum() > 16
    for field in ("obs", "action", "reward", "terminated", "truncated", "next_obs"):
        np.testing.assert_array_equal(getattr(fast, field)[said], getattr(slow, field)[said], err_msg=field)
    for ours, expected in zip(fast.extras, slow.extras, strict=True):
        np.testing.assert_allclose(ours[said], expected[said], atol=1e-5)
    # The log-probabilities of losses, read from whole texts, are those that were sampled from.
    last = said & ended
    text = pg.finished_texts(start.env_state.text, slow, jnp.array(last), env.step.eos)
    logits = jnp.swapaxes(model.text(params, text.tokens, text.prompt_length).logits[:, :steps], 0, 1)
    whole = models.next_token(logits, None).log_prob(slow.action)
    np.testing.assert_allclose(whole[said], slow.extras[0][said], atol=1e-5)


def test_what_it_refuses():
    env = tasks.random_rewards(3, 2)
    with pytest.raises(ValueError, match="variant='trpo': must be one of ppo, grpo"):
        pg.Config(variant="trpo")
    with pytest.raises(ValueError, match=r"group_size=1 with variant='rloo'.*at least 2"):
        pg.Config(variant="rloo", group_size=1)
    with pytest.raises(ValueError, match=r"num_minibatches=3 does not divide.*32 × 8 texts"):
        pg.Config(num_minibatches=3)
    with pytest.raises(ValueError, match="model='rnn': must be one of mlp, transformer"):
        pg.Config(model="rnn")
    with pytest.raises(ValueError, match="cache=True with a model that has no memory"):
        pg.make(env, pg.Config(cache=True))
    with pytest.raises(TypeError, match=r"policy_gradient on 'CartPole-v1': needs a token environment"):
        pg.make(jrl.make("CartPole-v1"))
    wrapped = jrl.envs.scale_reward(env, 2.0)
    with pytest.raises(TypeError, match="needs a token environment as it was made"):
        pg.make(wrapped)


def test_a_reward_of_nan_stops_the_run_and_says_when(tmp_path):
    def score(text):
        return jnp.where((text.tokens == 1).sum() == 3, jnp.nan, 1.0)

    env = token_mdp(Prompts([[0]], [1]), at_end(score), vocab_size=2, max_new_tokens=3)
    config = {"variant": "rloo", "num_prompts": 2, "group_size": 4, "hidden_sizes": (4,)}
    with pytest.raises(FloatingPointError, match=r"is nan at env step \d+"):
        jrl.run("grpo", env, config=config, env_steps=2400, out=tmp_path / "run", eval_episodes=0)
    assert (tmp_path / "run" / "run.json").exists()
