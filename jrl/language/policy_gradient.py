"""Policy gradients over texts: PPO with a KL penalty, GRPO, Dr. GRPO, RLOO and REINFORCE as choices of one kernel.

One step samples ``group_size`` texts after each of ``num_prompts`` prompts, rates them, and takes gradient steps on
``L = Σ_t −A_t · surrogate(ρ_t)``, ``ρ_t = π(a_t|s_t) / π_old(a_t|s_t)``. The variants differ in

============  ====================================  ==============================  ============  ===============
variant       advantage ``A``                       penalty towards the reference   surrogate     a text's tokens
============  ====================================  ==============================  ============  ===============
``ppo``       GAE(λ) of a value head, standardised  −β log(π_old/π_ref) in reward   clipped       mean over all
``grpo``      (R − mean) / (std + 1e-4)             β k3 in the loss                clipped       mean of each
``dr_grpo``   R − mean                              β k3 in the loss                clipped       sum / T
``rloo``      R − mean of the others                in the reward                   log π         sum
``reinforce`` return to go − mean of all others     in the reward                   log π         sum
============  ====================================  ==============================  ============  ===============

with ``R`` the return of the text and the mean over its group. Sources: PPO: Schulman et al., 2017, arXiv:1707.06347,
for language Ziegler et al., 2019, arXiv:1909.08593 (and its adaptive β); GRPO: Shao et al., 2024, arXiv:2402.03300;
Dr. GRPO: Liu et al., 2025, arXiv:2503.20783; RLOO: Ahmadian et al., 2024, arXiv:2402.14740; REINFORCE: Williams, 1992.
k3 = π_ref/π − log(π_ref/π) − 1 (Schulman, 2020). Its gradient is that of KL(π_ref ‖ π), so that GRPO comes to rest at
:func:`jrl.language.exact.penalised_policy`; with ``penalty="reward"`` every variant aims at π* ∝ π_ref exp(return/β).

Deviations: a batch is whole texts, so that what a slot says after its text has ended is generated and dropped
(``env_steps`` counts it); a text that the limit cuts is bootstrapped by the value with ``ppo``, unless the limit is
part of the environment's task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jrl import ops, rollout
from jrl.algos import checks
from jrl.envs import vectorize
from jrl.language import models, surrogates
from jrl.language.environments import Rating, token_step
from jrl.language.rewards import Scorer, Text
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree, Transition


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    variant: str = "grpo"
    """ppo, grpo, dr_grpo, rloo or reinforce."""
    penalty: str = "auto"
    """Where the KL penalty is: reward, loss, none, or auto: where the variant's paper has it."""
    num_prompts: int = 32
    """Prompts a step."""
    group_size: int = 8
    """Texts sampled after each prompt; more than 1 for grpo, dr_grpo and rloo."""
    num_epochs: int = 1
    """Passes over each batch; 4 is usual for ppo."""
    num_minibatches: int = 1
    """Parts of a batch, each one gradient step; must divide num_prompts × group_size."""
    adaptive_kl: bool = False
    """Let β follow target_kl (Ziegler et al., 2019) instead of staying kl_coef, which must then be above 0."""
    cache: bool = False
    """Generate with the model's memory (a key/value cache) instead of reading every prefix anew."""
    model: str = "mlp"
    """mlp (over the one-hot text), transformer, or pretrained: the decoder that the environment brings (on the command
    line its folder)."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Widths of an mlp."""
    num_layers: int = 2
    """Layers of a transformer."""
    num_heads: int = 4
    """Attention heads of a transformer."""
    width: int = 64
    """Of a transformer's residual stream."""

    def __post_init__(self) -> None:
        checks.choice(self, "variant", tuple(surrogates.VARIANTS))
        checks.choice(self, "penalty", ("auto", "reward", "loss", "none"))
        checks.sizes(self, "num_prompts", "group_size", "num_epochs", "num_minibatches")
        models.check(self)
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        if self.num_prompts * self.group_size % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} does not divide the batch of num_prompts × group_size = "
                f"{self.num_prompts} × {self.group_size} texts; use a divisor of it."
            )
        if (
            surrogates.VARIANTS[self.variant].advantage in ("group_std", "group", "others")
            and self.group_size < 2
        ):
            raise ValueError(
                f"group_size={self.group_size} with variant={self.variant!r}: a text is compared with others after "
                "the same prompt; use at least 2."
            )


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-3
    """Adam's step size."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Environment steps over which the step size goes linearly to its end; 0 keeps it constant."""
    gamma: float = 1.0
    """Discount factor γ per token."""
    gae_lambda: float = 0.95
    """λ of ppo's advantage estimate."""
    clip_eps: float = 0.2
    """The ratio is clipped at 1 − this."""
    clip_eps_high: float = 0.2
    """The ratio is clipped at 1 + this (0.28 in DAPO, Yu et al., 2025, arXiv:2503.14476)."""
    value_clip_eps: float = 0.2
    """ε of ppo's clipped value."""
    value_coef: float = 0.1
    """Weight of ppo's value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_coef: float = 0.0
    """β of the penalty towards the reference; 0.05 to 0.15 is usual where there is a pretrained one. With adaptive_kl
    β begins with it and is multiplied: from 0 it never leaves 0."""
    target_kl: float = 6.0
    """With adaptive_kl: the divergence from the reference (nats a text) that β steers to."""
    kl_horizon: float = 10_000.0
    """With adaptive_kl: texts over which β adapts."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. ``rollout`` stands at the prompts of the next step."""

    params: Params
    reference: Params
    opt_state: PyTree
    rollout: rollout.RolloutState
    scorer: PyTree
    kl_coef: Array
    env_steps: Array
    key: Key


class Batch(NamedTuple):
    """``N`` texts. Arrays over tokens are ``[N, T]``, of which ``said`` (bool) are part of the text.

    ``tokens``: int32 ``[N, L]``, ``prompt_length``: int32 ``[N]``, ``allowed``: bool ``[N, T, V]`` or ().
    """

    tokens: Array
    prompt_length: Array
    allowed: Any
    action: Array
    said: Array
    log_prob: Array
    reference_log_prob: Array
    value: Array
    advantage: Array
    target: Array


def make(
    env: Environment,
    config: Config | None = None,
    *,
    model: models.Model | None = None,
    scorer: Scorer | None = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
) -> Algorithm:
    """Return the kernel on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a token environment, as :func:`jrl.language.environments.token_mdp` made it.
        config: static choices.
        model: of the next token; what its ``init`` returns is the first policy and the reference. None builds one
            from ``config``.
        scorer: rates whole texts, once, in addition to the environment's own reward.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env`` or ``config`` is not what it should be.
        ValueError: ``cache`` with a model that has no memory.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, "xla")
    spec = token_step(env, "policy_gradient")
    model = models.of_config(env, config) if model is None else model
    if config.cache and (model.start is None or model.read is None):
        raise ValueError(
            "cache=True with a model that has no memory: use model='transformer', or cache=False."
        )
    choice, penalty = surrogates.VARIANTS[config.variant], _penalty(config)
    num_texts, steps = config.num_prompts * config.group_size, spec.max_new_tokens
    # Whole texts are rated once, below, and not at every token.
    prompts, envs = vectorize(env, config.num_prompts), vectorize(env._replace(step=spec.unrated), num_texts)

    act = models.actor(model, cache=config.cache)

    def play(greedy: bool, params: Params, key: Key, obs: PyTree, memory: Memory) -> tuple:
        tokens, mask = models.tokens_of(obs)
        output = model.prefix(params, tokens)
        policy = models.next_token(output.logits, mask)
        # Without a critic nothing fits the value head to returns.
        told = {"value": output.value} if choice.advantage == "value" else {}
        return policy.mode() if greedy else policy.sample(key), memory, told

    play_greedily, play_sampled = jax.tree_util.Partial(play, True), jax.tree_util.Partial(play, False)

    def env_params(hparams: HParams) -> PyTree:
        return env.params if hparams.env is None else hparams.env

    def next_prompts(key: Key, hparams: HParams) -> rollout.RolloutState:
        start = rollout.start(key, prompts, env_params(hparams), config.num_prompts)
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, config.group_size, axis=0), start)

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        model_key, reset_key, state_key = jax.random.split(key, 3)
        params = model.init(model_key)
        return State(
            params=params,
            reference=jax.tree.map(jnp.copy, params) if penalty != "none" else (),
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            rollout=next_prompts(reset_key, hparams),
            scorer=scorer.init() if scorer else (),
            kl_coef=jnp.asarray(hparams.kl_coef, jnp.float32),
            env_steps=ops.counter.zero(),
            key=state_key,
        )

    def collect(key: Key, state: State, hparams: HParams) -> Transition:
        """Generate one text in each environment; what lies behind its end belongs to none."""
        start = state.rollout
        if config.cache:
            memory = model.start(state.params, models.tokens_of(start.obs)[0])  # type: ignore[misc]
            start = start._replace(memory=memory)
        behaviour = Policy(act, state.params, rollout.keep_memory)
        return rollout.unroll(key, envs, env_params(hparams), behaviour, start, steps)[1]

    def targets(state: State, transitions: Transition, hparams: HParams) -> tuple[Batch, PyTree, Metrics]:
        before, ended = state.rollout.env_state.text, transitions.terminated | transitions.truncated
        said = jnp.cumsum(ended, axis=0) - ended == 0
        last = said & ended
        text = finished_texts(before, transitions, last, spec.eos)
        tokens, allowed = text.tokens, models.tokens_of(transitions.obs)[1]
        log_prob, value = transitions.extras
        reward, scorer_state = jnp.where(said, transitions.reward, 0.0), state.scorer
        report: Metrics = {}
        if spec.rating:
            reward, report = rate(spec.rating, text, reward, last)
        report |= _episodes(reward, said, last)
        if scorer:
            scorer_state, score, scores = scorer.apply(state.scorer, text)
            reward, report = jnp.where(last, reward + score, reward), report | scores
        report |= {"score": reward.sum(0).mean()}
        reference_log_prob, kl = log_prob, jnp.zeros_like(log_prob)
        if penalty != "none":
            output = model.text(state.reference, tokens, before.prompt_length)
            logits = jnp.swapaxes(output.logits[:, :steps], 0, 1)
            reference_log_prob = models.next_token(logits, allowed).log_prob(transitions.action)
            kl = jnp.where(said, log_prob - reference_log_prob, 0.0)
        if penalty == "reward":
            reward = reward - state.kl_coef * kl
        if choice.advantage == "value":
            final = model.prefix(state.params, tokens).value
            next_value = jnp.where(last, final, jnp.concatenate([value[1:], final[None]]))
            advantage, target = ops.gae(
                reward, value, next_value, transitions.terminated, transitions.truncated,
                gamma=hparams.gamma, gae_lambda=hparams.gae_lambda,
            )  # fmt: skip
            advantage = ops.standardize(advantage, mean=lambda x: surrogates.mean(x, said))
        else:
            advantage, target = (
                surrogates.compare(choice, reward, last, hparams.gamma, config.group_size),
                jnp.zeros_like(reward),
            )
        per_token = (transitions.action, said, log_prob, reference_log_prob, value, advantage, target)
        by_text = [jnp.swapaxes(x, 0, 1) for x in per_token]
        masks = () if allowed is None else jnp.swapaxes(allowed, 0, 1)
        report |= {"kl": kl.sum(0).mean()}
        return Batch(tokens, before.prompt_length, masks, *by_text), scorer_state, report

    def loss(params: Params, batch: Batch, kl_coef: Array, hparams: HParams) -> tuple[Array, Metrics]:
        output = model.text(params, batch.tokens, batch.prompt_length)
        policy = models.next_token(
            output.logits[:, :steps], None if isinstance(batch.allowed, tuple) else batch.allowed
        )
        # Nothing of what was not said may be infinite, forwards or backwards.
        log_prob = jnp.where(batch.said, policy.log_prob(batch.action), batch.log_prob)
        policy_loss = surrogates.surrogate_loss(
            choice,
            log_prob,
            batch.log_prob,
            batch.advantage,
            batch.said,
            hparams.clip_eps,
            hparams.clip_eps_high,
        )
        total, metrics = policy_loss, {"policy_loss": policy_loss}
        if penalty == "loss":
            total += kl_coef * surrogates.penalty_loss(choice, log_prob, batch.reference_log_prob, batch.said)
        if choice.advantage == "value":
            value = output.value[:, :steps]
            moved = batch.value + jnp.clip(
                value - batch.value, -hparams.value_clip_eps, hparams.value_clip_eps
            )
            error = jnp.maximum((value - batch.target) ** 2, (moved - batch.target) ** 2)
            metrics["value_loss"] = 0.5 * surrogates.mean(error, batch.said)
            total += hparams.value_coef * metrics["value_loss"]
        entropy = surrogates.mean(policy.entropy(), batch.said)
        total -= hparams.entropy_coef * entropy
        log_ratio = log_prob - batch.log_prob
        ratio = jnp.exp(log_ratio)
        outside = (ratio < 1.0 - hparams.clip_eps) | (ratio > 1.0 + hparams.clip_eps_high)
        return total, metrics | {
            "loss": total,
            "entropy": entropy,
            "approx_kl": surrogates.mean(jnp.expm1(log_ratio) - log_ratio, batch.said),
            "clip_fraction": surrogates.mean(outside, batch.said),
        }

    def update(state: State, batch: Batch, key: Key, hparams: HParams) -> tuple[State, Metrics]:
        """Take num_epochs × num_minibatches gradient steps on ``batch``."""
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        gradient_step = optimizer(hparams, learning_rate).update
        shuffles = ops.shuffled_indices(key, num_texts, config.num_epochs)
        shuffles = shuffles.reshape(config.num_epochs * config.num_minibatches, -1)

        def minibatch_step(carry: tuple, index: Array) -> tuple[tuple, Metrics]:
            params, opt_state = carry
            minibatch = jax.tree.map(lambda leaf: leaf[index], batch)
            grads, metrics = jax.grad(loss, has_aux=True)(params, minibatch, state.kl_coef, hparams)
            metrics["grad_norm"] = global_norm(grads)
            updates, opt_state = gradient_step(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics

        (params, opt_state), metrics = jax.lax.scan(minibatch_step, (state.params, state.opt_state), shuffles)
        metrics = jax.tree.map(jnp.mean, metrics) | {"learning_rate": learning_rate}
        return dataclasses.replace(state, params=params, opt_state=opt_state), metrics

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, unroll_key, reset_key, update_key = jax.random.split(state.key, 4)
        if not config.adaptive_kl:
            state = dataclasses.replace(state, kl_coef=jnp.asarray(hparams.kl_coef, jnp.float32))
        transitions = collect(unroll_key, state, hparams)
        batch, scorer_state, report = targets(state, transitions, hparams)
        kl_coef = state.kl_coef
        state, metrics = update(state, batch, update_key, hparams)
        if config.adaptive_kl:
            error = jnp.clip(report["kl"] / hparams.target_kl - 1.0, -0.2, 0.2)
            # The paper's factor is 1 to a few per cent; a batch larger than the horizon must not make β negative.
            factor = jnp.maximum(1.0 + error * num_texts / hparams.kl_horizon, 0.5)
            state = dataclasses.replace(state, kl_coef=kl_coef * factor)
        state = dataclasses.replace(
            state,
            rollout=next_prompts(reset_key, hparams),
            scorer=scorer_state,
            env_steps=ops.counter.add(state.env_steps, num_texts * steps),
            key=next_key,
        )
        return state, report | metrics | {"kl_coef": kl_coef}

    def policy(state: State, *, greedy: bool = True) -> Policy:
        """Return the current policy: the most probable token, or samples. It reads every prefix anew."""
        return Policy(play_greedily if greedy else play_sampled, state.params)

    return Algorithm(init, step, policy, num_texts * steps, env)


def _penalty(config: Config) -> str:
    return surrogates.VARIANTS[config.variant].penalty if config.penalty == "auto" else config.penalty


def flops_per_env_step(env: Environment, config: Config) -> float:
    """Return the operations of the model that each generated token takes: saying it, and learning from its text.

    Its text is read by the reference, and ``num_epochs`` times forwards and backwards.
    """
    token, text = models.flops(env, config)
    readings = 3 * config.num_epochs + (_penalty(config) != "none")
    return token + readings * text / token_step(env, "policy_gradient").max_new_tokens


def finished_texts(before: Text, transitions: Transition, last: Array, eos: int | None) -> Text:
    """Return the texts as they ended, leaves ``[N, ...]``; ``last`` is bool ``[T, N]``, true once for each."""
    index = jnp.argmax(last, axis=0)
    texts = jnp.take_along_axis(models.tokens_of(transitions.next_obs)[0], index[None, :, None], axis=0)[0]
    token = jnp.take_along_axis(transitions.action, index[None], axis=0)[0]
    finished = jnp.zeros(token.shape, bool) if eos is None else token == eos
    return before._replace(tokens=texts, length=before.prompt_length + index + 1, finished=finished)


def rate(rating: Rating, texts: Text, reward: Array, last: Array) -> tuple[Array, Metrics]:
    """Add the rating of whole texts to the reward ``[T, N]`` of their last tokens; its scores are the metrics."""
    total, scores = jax.vmap(rating.__call__)(texts)
    return jnp.where(last, reward + total, reward), {name: value.mean() for name, value in scores.items()}


def _episodes(reward: Array, said: Array, last: Array) -> Metrics:
    return rollout.episode_metrics(last, jnp.cumsum(reward, axis=0), jnp.cumsum(said, axis=0))
