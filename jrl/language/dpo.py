"""Direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290).

``L = −E[p log σ(β h) + (1 − p) log σ(−β h)]``, ``h = log π/π_ref (y) − log π/π_ref (y')``: where preferences are
Bradley-Terry's in the return, ``p = σ(R(y) − R(y'))``, its minimum is ``π* ∝ π_ref exp(R / β)``. Deviation: pairs may
carry the probability of their preference instead of the one draw. Without pairs, ``init`` draws two texts after each
prompt from the reference and prefers by their returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jrl import ops, rollout
from jrl.algos import checks
from jrl.envs import vectorize
from jrl.language import imitation, models, preferences
from jrl.language.environments import allowed_tokens, token_step
from jrl.language.policy_gradient import finished_texts
from jrl.language.preferences import Pairs
from jrl.optim import annealed_learning_rate, by_kernels, default_optimizer, global_norm
from jrl.types import Algorithm, Array, Environment, Key, Memory, Metrics, Params, Policy, PyTree


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices: each sets a shape, a loop length or a code path, and a new one compiles anew."""

    num_pairs: int = 1024
    """Pairs drawn from the reference, where none are given."""
    batch_size: int = 64
    """Pairs a gradient step."""
    num_updates: int = 10
    """Gradient steps a step."""
    model: str = "mlp"
    """mlp (over the one-hot text) or transformer."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Widths of an mlp."""
    num_layers: int = 2
    """Layers of a transformer."""
    num_heads: int = 4
    """Attention heads of a transformer."""
    width: int = 64
    """Of a transformer's residual stream."""

    def __post_init__(self) -> None:
        checks.sizes(self, "num_pairs", "batch_size", "num_updates")
        models.check(self)
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))


@struct.dataclass
class HParams:
    """Numbers, traced: a new value never recompiles, a leading axis sweeps them."""

    learning_rate: float = 1e-3
    """Adam's step size."""
    learning_rate_end: float = 0.0
    """Step size at the end of annealing."""
    anneal_env_steps: float = 0.0
    """Tokens over which the step size goes linearly to its end; 0 keeps it constant."""
    beta: float = 0.1
    """β, how far preferences pull from the reference."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    env: PyTree = None
    """The environment's own parameters; None means env.params."""


@struct.dataclass
class State:
    """Everything that evolves; this is the checkpoint. ``env_steps`` counts tokens learned from."""

    params: Params
    reference: Params
    opt_state: PyTree
    pairs: Pairs
    env_steps: Array
    key: Key


def make(
    env: Environment,
    config: Config | None = None,
    *,
    model: models.Model | None = None,
    pairs: Pairs | None = None,
    optimizer: Callable[[Any, Array], optax.GradientTransformation] = default_optimizer,
) -> Algorithm:
    """Return DPO on ``env`` as an :class:`~jrl.types.Algorithm`.

    Args:
        env: a token environment, as :func:`jrl.language.environments.token_mdp` made it.
        config: static choices.
        model: of the next token; what its ``init`` returns is the first policy and the reference.
        pairs: texts and which is preferred; None draws them from the reference.
        optimizer: ``(hparams, learning_rate) -> optax transformation``; its state must not depend on either.

    Raises:
        TypeError: ``env`` or ``config`` is not what it should be.
        ValueError: as :func:`jrl.language.preferences.check`, a text that the environment cannot hold, or one that its
            grammar does not allow.
    """
    config = checks.config(config, Config)
    optimizer = by_kernels(optimizer, "xla")
    spec = token_step(env, "dpo")
    model = models.of_config(env, config) if model is None else model
    if pairs is not None:
        preferences.check(pairs)
        _check_texts(env, pairs)
    act = models.actor(model, cache=False)

    def draw(key: Key, params: Params, env_params: PyTree) -> Pairs:
        """Draw two texts after each prompt."""
        reset_key, play_key = jax.random.split(key)
        start = rollout.start(reset_key, vectorize(env, config.num_pairs), env_params, config.num_pairs)
        twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), start)
        envs = vectorize(env, 2 * config.num_pairs)
        _, played, _ = rollout.unroll(
            play_key, envs, env_params, Policy(act, params), twice, spec.max_new_tokens
        )
        ended = played.terminated | played.truncated
        said = jnp.cumsum(ended, axis=0) - ended == 0
        text = finished_texts(twice.env_state.text, played, said & ended, spec.eos)
        first, second = jnp.where(said, played.reward, 0.0).sum(0).reshape(2, -1)
        tokens = text.tokens.reshape(2, config.num_pairs, -1)
        return Pairs(tokens[0], tokens[1], start.env_state.text.prompt_length, jax.nn.sigmoid(first - second))

    def init(key: Key, hparams: HParams) -> State:
        checks.hparams(hparams, HParams)
        model_key, pair_key, state_key = jax.random.split(key, 3)
        params = model.init(model_key)
        env_params = env.params if hparams.env is None else hparams.env
        return State(
            params=params,
            reference=jax.tree.map(jnp.copy, params),
            opt_state=optimizer(hparams, jnp.float32(0)).init(params),
            pairs=draw(pair_key, params, env_params) if pairs is None else jax.tree.map(jnp.asarray, pairs),
            env_steps=ops.counter.zero(),
            key=state_key,
        )

    def log_ratio(params: Params, reference: Params, tokens: Array, prompt_length: Array) -> Array:
        """Return ``log π(y) − log π_ref(y)`` of whole texts, ``[N]``."""
        texts = imitation.Texts(tokens, prompt_length)
        allowed = allowed_tokens(spec, tokens, prompt_length)
        ours, said = imitation.log_likelihood(model, params, texts, allowed)
        theirs, _ = imitation.log_likelihood(model, reference, texts, allowed)
        return jnp.where(said, ours - theirs, 0.0).sum(-1)

    def loss(params: Params, reference: Params, batch: Pairs, hparams: HParams) -> tuple[Array, Metrics]:
        first = log_ratio(params, reference, batch.first, batch.prompt_length)
        second = log_ratio(params, reference, batch.second, batch.prompt_length)
        margin = hparams.beta * (first - second)
        total = preferences.bradley_terry_loss(margin, batch.preference)
        # Either side may be undecided, as all margins are at first: that is half right, whichever text is the first.
        agrees = 0.5 + 0.5 * jnp.sign(margin) * jnp.sign(batch.preference - 0.5)
        return total, {"loss": total, "accuracy": agrees.mean(), "margin": jnp.abs(margin).mean()}

    def update(state: State, key: Key, hparams: HParams, learning_rate: Array) -> tuple[State, Metrics]:
        index = jax.random.randint(key, (config.batch_size,), 0, len(state.pairs.preference))
        batch = jax.tree.map(lambda leaf: leaf[index], state.pairs)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, state.reference, batch, hparams)
        updates, opt_state = optimizer(hparams, learning_rate).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = global_norm(grads)
        return dataclasses.replace(state, params=params, opt_state=opt_state), metrics

    tokens_a_step = 2 * config.num_updates * config.batch_size * spec.max_new_tokens

    def step(state: State, hparams: HParams) -> tuple[State, Metrics]:
        checks.hparams(hparams, HParams)
        next_key, update_key = jax.random.split(state.key)
        learning_rate = annealed_learning_rate(hparams, ops.counter.to_float(state.env_steps))
        state, metrics = jax.lax.scan(
            lambda state, key: update(state, key, hparams, learning_rate),
            state,
            jax.random.split(update_key, config.num_updates),
        )
        state = dataclasses.replace(
            state, env_steps=ops.counter.add(state.env_steps, tokens_a_step), key=next_key
        )
        nothing = jnp.zeros((1, 1), bool)
        report = rollout.episode_metrics(nothing, nothing.astype(jnp.float32), nothing.astype(jnp.int32))
        return state, report | jax.tree.map(jnp.mean, metrics) | {"learning_rate": learning_rate}

    def play(greedy: bool, params: Params, key: Key, obs: PyTree, memory: Memory) -> tuple:
        tokens, mask = models.tokens_of(obs)
        policy = models.next_token(model.prefix(params, tokens).logits, mask)
        return policy.mode() if greedy else policy.sample(key), memory, ()

    play_greedily, play_sampled = jax.tree_util.Partial(play, True), jax.tree_util.Partial(play, False)

    def policy(state: State, *, greedy: bool = True) -> Policy:
        """Return the current policy: the most probable token, or samples."""
        return Policy(play_greedily if greedy else play_sampled, state.params)

    return Algorithm(init, step, policy, tokens_a_step, env)


def _check_texts(env: Environment, pairs: Pairs) -> None:
    """Raise ValueError for a text that cannot be said: its probability is 0 whatever the policy."""
    spec = token_step(env, "dpo")
    texts, least = np.stack([pairs.first, pairs.second]), np.min(pairs.prompt_length)
    longest, most = spec.max_prompt + spec.max_new_tokens, ((texts >= 0).sum(-1) - pairs.prompt_length).max()
    if texts.shape[2] != longest or texts.max() >= spec.vocab_size or most > spec.max_new_tokens or least < 1:
        raise ValueError(
            f"dpo: texts {texts.shape[1:]} of tokens up to {texts.max()}, at most {most} of them behind prompts of at "
            f"least {least}, on {env.name}: expected [M, {longest}], tokens below {spec.vocab_size}, at most "
            f"{spec.max_new_tokens} of them, and prompts of at least 1."
        )
    for name in ("first", "second"):
        tokens, prompt_length = (
            jnp.asarray(x, jnp.int32) for x in (getattr(pairs, name), pairs.prompt_length)
        )
        allowed = allowed_tokens(spec, tokens, prompt_length)
        if allowed is None:
            return
        action, said = imitation.actions(imitation.Texts(tokens, prompt_length), spec.max_new_tokens)
        wrong = said & ~jnp.take_along_axis(allowed, action[..., None], axis=-1)[..., 0]
        if wrong.any():
            row = int(jnp.argmax(wrong.any(axis=1)))
            token = int(action[row, jnp.argmax(wrong[row])])
            raise ValueError(
                f"dpo: token {token} in text {row} of {name} is not allowed there by the grammar of {env.name}; leave "
                "the pair out."
            )
