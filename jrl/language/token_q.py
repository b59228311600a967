"""Q-learning over texts: token DQN from its own texts, ILQL and CQL from logged ones.

A network gives ``Q(s, ·)`` for the token after every prefix, so that one pass over a text learns from all its tokens.

* ``dqn`` (Mnih et al., 2015, https://www.nature.com/articles/nature14236): ``y = r + γ max_a Q⁻(s', a)``, with double
  and dueling as choices, and Watkins's λ-returns: the trace goes on while the text follows the greedy policy.
* ``ilql`` (Snell et al., 2022, arXiv:2206.11871, after Kostrikov et al., 2021, arXiv:2110.06169): ``y = r + γ V(s')``,
  ``V`` the τ-expectile of ``min(Q₁⁻, Q₂⁻)(s, a)`` over logged tokens, and the policy ``π_β exp(w (min Q⁻ − V))`` with
  ``π_β`` cloned from the log beside it.
* ``cql_coef`` adds ``log Σ_a exp Q(s, a) − Q(s, a_t)`` (Kumar et al., 2020, arXiv:2006.04779) to either.

Deviations: a batch is whole texts; a text that the limit cuts is bootstrapped. With ``data`` nothing is played, and
``env_steps`` counts the tokens learned from.
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
from jrl.algos import checks, exploration
from jrl.envs import vectorize
from jrl.language import imitation, models
from jrl.language.environments import token_step
from jrl.language.policy_gradient import finished_texts, rate
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    variant: str = "dqn"
    """dqn or ilql."""
    double: bool = True
    """dqn: choose the next token by the online network, value it by the target network."""
    dueling: bool = False
    """Split the network's head into a value and advantages."""
    num_envs: int = 64
    """Texts generated a step."""
    num_updates: int = 4
    """Gradient steps a step."""
    batch_size: int = 64
    """Texts a gradient step."""
    capacity: int = 4096
    """Texts that the replay holds."""
    warmup_texts: int = 512
    """Texts said at random before the first update, within init."""
    model: str = "mlp"
    """mlp (over the one-hot text), transformer, or pretrained: the decoder that the environment brings (on the command
    line its folder)."""
    cache: bool = False
    """Generate with the model's memory (a key/value cache) instead of reading every prefix anew."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Widths of an mlp."""
    num_layers: int = 2
    """Layers of a transformer."""
    num_heads: int = 4
    """Attention heads of a transformer."""
    width: int = 64
    """Of a transformer's residual stream."""

    def __post_init__(self) -> None:
        checks.choice(self, "variant", ("dqn", "ilql"))
        checks.sizes(self, "num_envs", "num_updates", "batch_size", "capacity", "warmup_texts")
        models.check(self)
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        for name in ("num_envs", "warmup_texts"):
            if getattr(self, name) > self.capacity:
                raise ValueError(
                    f"{name}={getattr(self, name)} exceeds capacity={self.capacity}: the replay must hold them; raise "
                    "capacity."
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
    lambda_: float = 0.5
    """dqn: λ of the returns; 0 is one-step Q-learning."""
    epsilon_start: float = 1.0
    """Chance of a random token at env step 0."""
    epsilon_end: float = 0.05
    """Chance of a random token after epsilon_env_steps."""
    epsilon_env_steps: float = 100_000.0
    """Environment steps over which ε goes linearly to its end; 0 keeps it constant at its start."""
    tau: float = 0.05
    """Share of the online network that the target takes over at each update (0.005 is usual for large models)."""
    expectile: float = 0.8
    """ilql: τ of the value; 0.5 is the mean of the log, 1 its best."""
    cql_coef: float = 0.0
    """Weight of CQL's term; 0.1 is usual with ilql, 0 with dqn's own texts."""
    advantage_weight: float = 4.0
    """ilql: w, of the advantages beside the logarithm of the cloned policy."""
    q_scale: float = 0.1
    """Pretrained: Q starts as the logits times this, the α of Q = α log π + V; of the size of the returns."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this global norm."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


class Experience(NamedTuple):
    """Texts with what each token earned.

    Attributes:
        tokens: int32 ``[N, L]``, −1 behind the end.
        prompt_length: int32 ``[N]``.
        reward: float32 ``[N, T]``.
        terminated: bool ``[N, T]``.
        truncated: bool ``[N, T]``.
        allowed: bool ``[N, T + 1, V]``, after the prompt and every token; () without an action mask.
    """

    tokens: Array
    prompt_length: Array
    reward: Array
    terminated: Array
    truncated: Array
    allowed: Any = ()


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. ``rollout`` stands at the prompts of the next step."""

    params: Params
    target_params: Params
    opt_state: PyTree
    rollout: rollout.RolloutState
    replay: Experience
    num_texts: Array
    advantage_weight: Array
    env_steps: Array
    key: Key


def make(
    env: Environment,
    config: Config | None = None,
    *,
    model: models.Model | None = None,
    data: Experience | None = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
) -> Algorithm:
    """Return the kernel on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a token environment, as :func:`jrl.language.environments.token_mdp` made it.
        config: static choices.
        model: of the next token, with 1 estimate of Q (dqn) or 2 (ilql). None builds one from ``config``.
        data: logged texts (:func:`jrl.language.offline.replayed` rates them); the kernel then learns from them alone.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env`` or ``config`` is not what it should be.
        ValueError: shapes of ``data`` do not fit ``env``.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, "xla")
    spec, ilql = token_step(env, "token_q"), config.variant == "ilql"
    num_q = 2 if ilql else 1
    pretrained = model is None and config.model == "pretrained"
    model = models.of_config(env, config, num_q=num_q, dueling=config.dueling) if model is None else model
    steps, longest = spec.max_new_tokens, spec.max_prompt + spec.max_new_tokens
    if config.cache and (model.start is None or model.read is None):
        raise ValueError(
            "cache=True with a model that has no memory: use model='transformer', or cache=False."
        )
    # Whole texts are rated once, below, and not at every token.
    envs = vectorize(env._replace(step=spec.unrated), config.num_envs)
    if data is not None and (data.tokens.shape[1:] != (longest,) or data.reward.shape[1:] != (steps,)):
        raise ValueError(
            f"data with tokens {data.tokens.shape} and reward {data.reward.shape} on {env.name}: expected "
            f"[N, {longest}] and [N, {steps}]."
        )

    def scores(output: models.Output, weight: Array) -> Array:
        """Return what the policy maximises, ``[..., V]``."""
        if not ilql:
            return output.q[..., 0, :]
        return jax.nn.log_softmax(output.logits) + weight * (output.q.min(-2) - output.value[..., None])

    def act(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        params, epsilon, weight = acting
        tokens, mask = models.tokens_of(obs)
        output = model.prefix(params, tokens)
        score = scores(output, weight)
        score = score if mask is None else ops.masked(score, mask)
        # What ILQL maximises are log-probabilities with advantages on top, in no unit of the rewards.
        told = {"value": output.value} if ilql else {"q": score}
        return ops.epsilon_greedy(key, score, epsilon, mask), memory, told

    def speak(acting: PyTree, key: Key, obs: PyTree, memory: Memory) -> tuple[Array, Memory, PyTree]:
        """Act as in training: with the cache, where there is one, and nothing to be recorded."""
        if not config.cache:
            return *act(acting, key, obs, memory)[:2], ()
        params, epsilon, weight = acting
        tokens, mask = models.tokens_of(obs)
        output, memory = model.read(params, tokens, memory)  # type: ignore[misc]
        return ops.epsilon_greedy(key, scores(output, weight), epsilon, mask), memory, ()

    def next_prompts(key: Key, hparams: HParams) -> rollout.RolloutState:
        return rollout.start(key, envs, env.params if hparams.env is None else hparams.env, config.num_envs)

    def collect(
        key: Key, start: rollout.RolloutState, acting: PyTree, hparams: HParams
    ) -> tuple[Experience, Metrics]:
        """Say one text in each environment."""
        params = env.params if hparams.env is None else hparams.env
        if config.cache:
            memory = model.start(acting[0], models.tokens_of(start.obs)[0])  # type: ignore[misc]
            start = start._replace(memory=memory)
        behaviour = Policy(speak, acting, rollout.keep_memory)
        _, transitions, _ = rollout.unroll(key, envs, params, behaviour, start, steps)
        ended = transitions.terminated | transitions.truncated
        said = jnp.cumsum(ended, axis=0) - ended == 0
        last, reward = said & ended, jnp.where(said, transitions.reward, 0.0)
        texts = finished_texts(start.env_state.text, transitions, last, spec.eos)
        report: Metrics = {}
        if spec.rating:
            reward, report = rate(spec.rating, texts, reward, last)
        report |= rollout.episode_metrics(last, jnp.cumsum(reward, axis=0), jnp.cumsum(said, axis=0))
        masks = models.tokens_of(transitions.next_obs)[1]
        allowed: Any = ()
        if masks is not None:
            allowed = jnp.swapaxes(jnp.concatenate([start.obs.action_mask[None], masks]), 0, 1)
        by_text = (reward.T, transitions.terminated.T, transitions.truncated.T)
        return Experience(texts.tokens, texts.prompt_length, *by_text, allowed), report

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        model_key, reset_key, warmup_key, state_key = jax.random.split(key, 4)
        params = model.init(model_key)
        if pretrained:
            kernel = params["q"]["kernel"] * hparams.q_scale
            params = params | {"q": params["q"] | {"kernel": kernel}}
        start = next_prompts(reset_key, hparams)
        weight = jnp.asarray(hparams.advantage_weight, jnp.float32)
        replay: Any = data
        rounds = 0
        if data is None:
            acting = (params, jnp.float32(1.0), weight)
            one = jax.eval_shape(lambda key: collect(key, start, acting, hparams)[0], warmup_key)
            empty = jax.tree.map(lambda x: jnp.zeros((config.capacity, *x.shape[1:]), x.dtype), one)
            rounds = -(-config.warmup_texts // config.num_envs)

            def fill(replay: Experience, x: tuple[Key, Array]) -> tuple[Experience, None]:
                reset_key, play_key = jax.random.split(x[0])
                texts, _ = collect(play_key, next_prompts(reset_key, hparams), acting, hparams)
                return _put(replay, texts, x[1] * config.num_envs), None

            replay, _ = jax.lax.scan(fill, empty, (jax.random.split(warmup_key, rounds), jnp.arange(rounds)))
        return State(
            params=params,
            target_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            rollout=start,
            replay=jax.tree.map(jnp.asarray, replay),
            num_texts=jnp.int32(rounds * config.num_envs),
            advantage_weight=weight,
            env_steps=ops.counter.add(ops.counter.zero(), rounds * config.num_envs * steps),
            key=state_key,
        )

    def targets(
        online: models.Output, target: models.Output, batch: Experience, action: Array, hparams: HParams
    ) -> Array:
        """Return what ``Q(s_t, a_t)`` is to be, ``[N, T]``."""
        q, next_q = online.q[..., 0, :], target.q[:, 1:, 0]
        next_online = q[:, 1:]
        if not isinstance(batch.allowed, tuple):
            q = ops.masked(q, batch.allowed)
            next_q, next_online = (ops.masked(x, batch.allowed[:, 1:]) for x in (next_q, next_online))
        if ilql:
            next_value, trace = target.value[:, 1:], jnp.zeros_like(batch.reward)
        else:
            choosing = next_online if config.double else next_q
            next_value = ops.select_action(next_q, jnp.argmax(choosing, -1))
            greedy = jnp.argmax(q[:, :steps], -1) == action
            trace = hparams.lambda_ * jnp.concatenate([greedy[:, 1:], jnp.ones_like(greedy[:, :1])], axis=1)
        by_time = [x.T for x in (batch.reward, next_value, batch.terminated, batch.truncated)]
        return ops.lambda_returns(*by_time, gamma=hparams.gamma, lambda_=trace.T).T

    def loss(
        params: Params, target_params: Params, batch: Experience, hparams: HParams
    ) -> tuple[Array, Metrics]:
        online = model.text(params, batch.tokens, batch.prompt_length)
        target = model.text(target_params, batch.tokens, batch.prompt_length)
        action, said = imitation.actions(imitation.Texts(batch.tokens, batch.prompt_length), steps)

        def mean(x: Array) -> Array:
            return jnp.where(said, x, 0.0).sum() / said.sum()

        frozen = jax.lax.stop_gradient(online)
        wanted = jax.lax.stop_gradient(
            targets(frozen, target._replace(value=frozen.value), batch, action, hparams)
        )
        q = online.q[:, :steps]  # [N, T, Q, V]
        chosen = ops.select_action(q, jnp.broadcast_to(action[..., None], q.shape[:-1]))
        td_error = wanted[..., None] - chosen
        metrics = {"td_error": mean(jnp.abs(td_error).mean(-1)), "q": mean(chosen.mean(-1))}
        total = mean(0.5 * (td_error**2).sum(-1))
        total += hparams.cql_coef * mean((jax.nn.logsumexp(_allowed(q, batch), -1) - chosen).sum(-1))
        if ilql:
            least = ops.select_action(target.q[:, :steps].min(-2), action)
            above = least - online.value[:, :steps]
            weight = jnp.where(above > 0, hparams.expectile, 1.0 - hparams.expectile)
            cloned = jax.nn.log_softmax(_allowed(online.logits[:, :steps, None], batch)[:, :, 0], -1)
            metrics |= {
                "value_loss": mean(weight * above**2),
                "cloning_loss": -mean(ops.select_action(cloned, action)),
            }
            total += metrics["value_loss"] + metrics["cloning_loss"]
        return total, metrics | {"loss": total}

    def update(state: State, key: Key, hparams: HParams, learning_rate: Array) -> tuple[State, Metrics]:
        held = jnp.minimum(state.num_texts, config.capacity) if data is None else len(data.tokens)
        index = jax.random.randint(key, (config.batch_size,), 0, held)
        batch = jax.tree.map(lambda leaf: leaf[index], state.replay)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, state.target_params, batch, hparams)
        updates, opt_state = optimizer(hparams, learning_rate).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        target_params = optax.incremental_update(params, state.target_params, hparams.tau)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, target_params=target_params)
        return state, metrics | {"grad_norm": global_norm(grads)}

    tokens_a_step = steps * (config.num_envs if data is None else config.num_updates * config.batch_size)

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, play_key, reset_key, update_key = jax.random.split(state.key, 4)
        env_steps = ops.counter.to_float(state.env_steps)
        epsilon = exploration.annealed_epsilon(hparams, env_steps)
        learning_rate = annealed_learning_rate(hparams, env_steps)
        weight = jnp.asarray(hparams.advantage_weight, jnp.float32)
        nothing = jnp.zeros((1, 1), bool)
        report = rollout.episode_metrics(nothing, nothing.astype(jnp.float32), nothing.astype(jnp.int32))
        if data is None:
            texts, report = collect(play_key, state.rollout, (state.params, epsilon, weight), hparams)
            state = dataclasses.replace(
                state,
                rollout=next_prompts(reset_key, hparams),
                replay=_put(state.replay, texts, state.num_texts % config.capacity),
                # Wraps where the ring does, so that it never overflows.
                num_texts=_advance(state.num_texts, config.num_envs, config.capacity),
            )
        state, metrics = jax.lax.scan(
            lambda state, key: update(state, key, hparams, learning_rate),
            state,
            jax.random.split(update_key, config.num_updates),
        )
        state = dataclasses.replace(
            state,
            advantage_weight=weight,
            env_steps=ops.counter.add(state.env_steps, tokens_a_step),
            key=next_key,
        )
        metrics = jax.tree.map(jnp.mean, metrics)
        return state, report | metrics | {"epsilon": epsilon, "learning_rate": learning_rate}

    def policy(state: State, *, greedy: bool = True, epsilon: float = 0.05) -> Policy:
        """Return the greedy policy, or, with greedy=False, an ε-greedy one."""
        params = state.target_params if ilql else state.params
        return Policy(act, (params, jnp.float32(0.0 if greedy else epsilon), state.advantage_weight))

    return Algorithm(init, step, policy, tokens_a_step, env)


def flops_per_env_step(env: Environment, config: Config) -> float:
    """Return the operations of the model that each generated token takes: saying it, and learning from texts.

    Each gradient step reads its texts forwards and backwards, and by the target network.
    """
    num_q = 2 if config.variant == "ilql" else 1
    token, text = models.flops(env, config, num_q=num_q, dueling=config.dueling)
    read = 4 * text * config.num_updates * config.batch_size / config.num_envs
    return token + read / token_step(env, "token_q").max_new_tokens


def _allowed(q: Array, batch: Experience) -> Array:
    if isinstance(batch.allowed, tuple):
        return q
    return ops.masked(q, jnp.broadcast_to(batch.allowed[:, : q.shape[1], None], q.shape))


def _put(replay: Experience, texts: Experience, at: Array) -> Experience:
    """Write texts into the ring at ``at``."""
    capacity = len(replay.tokens)
    index = (at + jnp.arange(len(texts.tokens))) % capacity
    return jax.tree.map(lambda old, new: old.at[index].set(new), replay, texts)


def _advance(num_texts: Array, added: int, capacity: int) -> Array:
    total = num_texts + added
    return jnp.where(total >= 2 * capacity, total - capacity, total)
