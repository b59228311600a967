"""The known answers of small token environments: every prefix enumerated, solved backwards.

::

    tree = exact.enumerate_prefixes(env)
    q = exact.optimal_values(tree, gamma=1.0)                    # Q*, depth by depth
    log_policy = exact.soft_policy(tree, log_reference, beta)    # π* ∝ π_ref · exp(return / β)

Quantities are tuples over depths ``t = 0 … T−1``, each ``[V^t, …]``: prefix ``i`` at depth ``t`` followed by token
``a`` is prefix ``i · V + a`` at depth ``t + 1``. Rows behind the end of a text exist and mean nothing. The value of a
text that is cut by the limit is that of its rewards, as nothing follows it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.language.environments import token_step
from jrl.types import Array, Environment, PyTree

MOST = 10**6


class Tree(NamedTuple):
    """Every prefix of the texts after one prompt.

    Attributes:
        obs: what a policy sees of each prefix, leaves ``[V^t, …]``.
        allowed: bool ``[V^t, V]``, the action mask.
        reward: float32 ``[V^t, V]``, of each next token.
        ended: bool ``[V^t, V]``, whether it ends the text.
        alive: bool ``[V^t]``, whether the prefix is one that a text can have.
    """

    obs: tuple[PyTree, ...]
    allowed: tuple[Array, ...]
    reward: tuple[Array, ...]
    ended: tuple[Array, ...]
    alive: tuple[Array, ...]


def enumerate_prefixes(env: Environment, prompt: int = 0, params: PyTree = None) -> Tree:
    """Play every token after every prefix.

    Args:
        env: from :func:`jrl.language.environments.token_mdp`.
        prompt: its number among the environment's prompts.
        params: the environment's; None means ``env.params``.

    Raises:
        ValueError: more than 10^6 texts, or no such prompt.
        TypeError: another environment.
    """
    spec = token_step(env, "exact.enumerate_prefixes")
    size, depth, count = spec.vocab_size, spec.max_new_tokens, len(spec.prompts.length)
    if size**depth > MOST:
        raise ValueError(
            f"{env.name}: {size}^{depth} texts are more than {MOST:,}, which is what can be enumerated."
        )
    if not 0 <= prompt < count:
        raise ValueError(f"{env.name}: prompt={prompt}: there are {count} prompts, 0 to {count - 1}.")
    params = env.params if params is None else params
    state, obs = spec.start(prompt)
    states, observations = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (state, obs))
    tokens = jnp.arange(size)
    alive, levels = jnp.ones(1, bool), []
    play = jax.jit(jax.vmap(jax.vmap(spec.advance, (None, 0, None)), (0, None, None)))
    for _ in range(depth):
        successors, next_obs, reward, terminated, truncated = play(states, tokens, params)
        ended = terminated | truncated
        mask = getattr(observations, "action_mask", jnp.ones_like(ended))
        levels.append((observations, mask, reward.astype(jnp.float32), ended, alive))
        states, observations = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (successors, next_obs)
        )
        alive = (alive[:, None] & mask & ~ended).reshape(-1)
    return Tree(*map(tuple, zip(*levels, strict=True)))


def _backwards(tree: Tree, step: Callable[[Array, int], tuple[Array, Array]]) -> tuple[Array, ...]:
    """Run ``(value of what follows [V^t, V], t) -> (value [V^t], result)`` from the last depth to the first."""
    following, results = jnp.zeros(tree.reward[-1].size), []
    for t in reversed(range(len(tree.reward))):
        after = jnp.where(tree.ended[t], 0.0, following.reshape(tree.reward[t].shape))
        following, result = step(after, t)
        results.append(result)
    return tuple(reversed(results))


@jax.jit
def optimal_values(tree: Tree, gamma: Array | float = 1.0) -> tuple[Array, ...]:
    """``Q*(s, a) = r + γ max_b Q*(s', b)``, each ``[V^t, V]``; −inf for tokens that are not allowed."""

    def step(after: Array, t: int) -> tuple[Array, Array]:
        q = jnp.where(tree.allowed[t], tree.reward[t] + gamma * after, -jnp.inf)
        return jnp.where(tree.alive[t], q.max(-1), 0.0), q

    return _backwards(tree, step)


def _allowed(tree: Tree, log_policy: Sequence[Array], t: int) -> Array:
    """Return a policy over the tokens that are allowed, as learners have it under a mask; −inf for the others."""
    kept = jnp.where(tree.allowed[t], log_policy[t], -jnp.inf)
    return jnp.where(kept > -jnp.inf, kept - jax.nn.logsumexp(kept, -1, keepdims=True), -jnp.inf)


@jax.jit
def soft_policy(tree: Tree, log_reference: Sequence[Array], beta: Array | float) -> tuple[Array, ...]:
    """The policy that maximises ``E[return] − β KL(π ‖ π_ref)``, as log-probabilities ``[V^t, V]``.

    ``Q = r + V'``, ``V = β log Σ_a π_ref(a) exp(Q / β)``, ``π* = π_ref exp((Q − V) / β)``: over whole texts
    ``π* ∝ π_ref · exp(return / β)``. Of the reference what the action mask allows counts, as for a learner.

    Source: Levine 2018, "Reinforcement Learning and Control as Probabilistic Inference", section 2,
    https://arxiv.org/abs/1805.00909; Rafailov et al. 2023 (DPO), equation 4, https://arxiv.org/abs/2305.18290.
    """

    def step(after: Array, t: int) -> tuple[Array, Array]:
        reference = _allowed(tree, log_reference, t)
        weighed = jnp.where(reference > -jnp.inf, reference + (tree.reward[t] + after) / beta, -jnp.inf)
        value = jax.nn.logsumexp(weighed, -1)
        return beta * value, jnp.where(weighed > -jnp.inf, weighed - value[:, None], -jnp.inf)

    return _backwards(tree, step)


@jax.jit
def penalised_policy(tree: Tree, log_reference: Sequence[Array], beta: Array | float) -> tuple[Array, ...]:
    """Where GRPO comes to rest, whose penalty is the k3 estimate within the loss: log-probabilities ``[V^t, V]``.

    The gradient of that estimate is the one of ``KL(π_ref ‖ π)``, so that at rest
    ``π(a)(Q(a) − V) = β (π(a) − π_ref(a))``, i.e. ``π = β π_ref / (β + V − Q)`` with ``V`` such that it sums to 1.

    Source: derived so in Vojnović and Yun 2025, "What is the Alignment Objective of GRPO?",
    https://arxiv.org/abs/2502.18548. Here without the division by the group's standard deviation: divide β by it.
    The reference counts as in :func:`soft_policy`.
    """

    def step(after: Array, t: int) -> tuple[Array, Array]:
        q, reference = tree.reward[t] + after, jnp.exp(_allowed(tree, log_reference, t))
        possible = reference > 0  # what the reference never says has no part in V
        best = jnp.where(possible, q, -jnp.inf).max(-1, keepdims=True)
        worse = jnp.where(possible, best - q, 0.0)
        share = jnp.where(possible & (q == best), reference, 0.0).max(-1, keepdims=True)

        def weights(u: Array) -> Array:
            return jnp.where(possible, beta * reference / (u + worse), 0.0)

        def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            above = weights(jnp.exp(middle)).sum(-1, keepdims=True) > 1.0
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        # Of u = β + V − max Q, between β π_ref of the best and β; its logarithm, as π_ref may be tiny.
        bounds = jnp.log(beta * share), jnp.broadcast_to(jnp.log(beta), share.shape)
        u = jnp.exp(jax.lax.fori_loop(0, 60, halve, bounds)[1])
        log_policy = jnp.where(possible, jax.nn.log_softmax(jnp.log(weights(u)), -1), -jnp.inf)
        return jnp.where(possible, jnp.exp(log_policy) * q, 0.0).sum(-1), log_policy

    return _backwards(tree, step)


@jax.jit
def expectation(tree: Tree, log_policy: Sequence[Array], per_token: Sequence[Array] | None = None) -> Array:
    """``E[Σ_t x_t]`` over the texts of a policy, a scalar; ``x`` is the reward where None is given.

    Differentiable in ``log_policy``: the exact policy gradient is the gradient of this.
    """
    per_token = tree.reward if per_token is None else per_token

    def step(after: Array, t: int) -> tuple[Array, Array]:
        probability = jnp.exp(log_policy[t])
        # What has no probability may be worth −inf, in the gradient as well.
        value = (probability * jnp.where(probability > 0, per_token[t] + after, 0.0)).sum(-1)
        return value, value

    return _backwards(tree, step)[0][0]


@jax.jit
def divergence(tree: Tree, log_policy: Sequence[Array], log_other: Sequence[Array]) -> Array:
    """``KL(π ‖ π')`` between the distributions over whole texts, in nats, a scalar."""
    return expectation(tree, log_policy, [p - q for p, q in zip(log_policy, log_other, strict=True)])
