"""Records and protocols shared by every ring of jrl.

Shapes in docstrings: ``T`` unroll length, ``B`` environments, ``N`` minibatch, ``A`` actions; ``...`` is
what an observation or action adds. Everything here is a plain record: no behaviour beyond drawing from an
action space and calling a policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Key = jax.Array  # a typed key, jax.random.key(seed)
PyTree = Any
Params = PyTree
Memory = PyTree  # () for a feed-forward policy
Metrics = dict[str, jax.Array]


# ---------------------------------------------------------------------------------------- action spaces


@dataclasses.dataclass(frozen=True)
class Discrete:
    """Actions ``0 … n-1``, int32 of shape ``[]``."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Discrete(n={self.n}): an action space needs at least one action.")

    def sample(self, key: Key) -> Array:
        """Draw a uniform action, int32 ``[]``."""
        return jax.random.randint(key, (), 0, self.n, jnp.int32)


@dataclasses.dataclass(frozen=True)
class MultiDiscrete:
    """Several discrete choices at once, int32 of shape ``[len(ns)]``, entry ``i`` in ``0 … ns[i]-1``."""

    ns: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ns", tuple(int(n) for n in self.ns))
        if not self.ns or min(self.ns) < 1:
            raise ValueError(f"MultiDiscrete(ns={self.ns}): needs one or more sizes, each at least 1.")

    def sample(self, key: Key) -> Array:
        """Draw independent uniform choices, int32 ``[len(ns)]``."""
        return jax.random.randint(key, (len(self.ns),), 0, jnp.asarray(self.ns), jnp.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Box:
    """Real vectors, float32 of shape ``shape`` with ``low <= action <= high`` (entries may be infinite).

    ``low`` and ``high`` broadcast to ``shape`` and are kept as NumPy arrays. The largest float32, with which others
    write "no bound", is infinite here: nothing can be scaled to it.
    """

    shape: tuple[int, ...]
    low: Any
    high: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        for name in ("low", "high"):
            bound = np.asarray(getattr(self, name), np.float32)
            bound = np.where(np.abs(bound) == np.finfo(np.float32).max, np.copysign(np.inf, bound), bound)
            object.__setattr__(self, name, np.broadcast_to(bound.astype(np.float32), self.shape))
        if not np.all(self.low < self.high):
            raise ValueError(f"Box(low={self.low}, high={self.high}): low must be below high everywhere.")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Box)
            and self.shape == other.shape
            and np.array_equal(self.low, other.low)
            and np.array_equal(self.high, other.high)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.low.tobytes(), self.high.tobytes()))

    def sample(self, key: Key) -> Array:
        """Draw uniformly where both bounds are finite, else a standard normal clipped to the finite bound."""
        bounded = np.isfinite(self.low) & np.isfinite(self.high)
        low, high = np.where(bounded, self.low, 0.0), np.where(bounded, self.high, 1.0)
        uniform_key, normal_key = jax.random.split(key)
        uniform = jax.random.uniform(uniform_key, self.shape, jnp.float32, low, high)
        normal = jnp.clip(jax.random.normal(normal_key, self.shape, jnp.float32), self.low, self.high)
        return jnp.where(bounded, uniform, normal)


ActionSpace = Discrete | MultiDiscrete | Box


# ----------------------------------------------------------------------------------------- environments


class FiniteObservation(jax.ShapeDtypeStruct):
    """Specification of an observation that is one of ``n``: an int32 index ``[]``, or one-hot ``[n]``.

    What a table has a row for. Equal to the plain specification of the same shape and dtype; a wrapper that
    changes observations puts its own specification in its place.
    """

    n: int

    def __init__(self, n: int, *, one_hot: bool) -> None:
        if n < 1:
            raise ValueError(f"FiniteObservation(n={n}): there is at least one observation.")
        super().__init__((n,) if one_hot else (), jnp.float32 if one_hot else jnp.int32)
        self.n = n


class TokenObservation(jax.ShapeDtypeStruct):
    """Specification of an observation that is a text: int32 ``[length]``, tokens ``0 … n-1``, −1 behind its end.

    The default networks see it one-hot, 0 behind the end.
    """

    n: int

    def __init__(self, length: int, n: int) -> None:
        super().__init__((length,), jnp.int32)
        self.n = n


class TimeStep(NamedTuple):
    """What one step of an environment returns.

    Attributes:
        obs: what the policy sees next; after an episode's end, the first observation of the next one.
        reward: float32 ``[]``.
        terminated: bool ``[]``; the episode ended by its own rules, the value of ``next_obs`` is 0.
        truncated: bool ``[]``; a time limit cut it, the value of ``next_obs`` is *not* 0. Both flags may be
            true on one step: then termination decides.
        next_obs: the true successor of the state acted in, before any reset.
    """

    obs: PyTree
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: PyTree


class Environment(NamedTuple):
    """An environment as a record of pure functions, resetting itself within the step that ends an episode.

    Attributes:
        reset: ``(key, params) -> (env_state, obs)``.
        step: ``(key, env_state, action, params) -> (env_state, TimeStep)``.
        params: default parameters, a pytree, traced: new values never recompile.
        observation: pytree of :class:`jax.ShapeDtypeStruct`, the shape and dtype the observations really
            have.
        action: :class:`Discrete`, :class:`MultiDiscrete` or :class:`Box`.
        name: for messages and records.
    """

    reset: Callable[..., tuple[PyTree, PyTree]]
    step: Callable[..., tuple[PyTree, TimeStep]]
    params: PyTree
    observation: PyTree
    action: ActionSpace
    name: str = "environment"


class MaskedObservation(NamedTuple):
    """An observation with the actions allowed in it (``action_mask``: bool ``[A]``, True = allowed)."""

    obs: PyTree
    action_mask: Array


class QuantileQuery(NamedTuple):
    """What an implicit quantile network is called on: observations, and fractions τ in [0, 1], float32 ``[..., K]``."""

    obs: PyTree
    fraction: Array


class Transition(NamedTuple):
    """Experience as :func:`jrl.rollout.unroll` records it, time-major ``[T, B, ...]``.

    ``obs`` is what the policy acted on and ``next_obs`` its true successor (the last observation of the
    episode where one ended, never the reset one). ``extras`` is what the policy returned beside the action.
    """

    obs: PyTree
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: PyTree
    extras: PyTree


# --------------------------------------------------------------------------------- policies and networks


def no_memory(batch_shape: tuple[int, ...]) -> Memory:
    """Return the memory of a feed-forward policy: ``()``."""
    del batch_shape
    return ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """``policy(key, obs, memory) -> (action, memory, extras)``, for any leading batch shape.

    A pytree whose leaves are the parameters it acts with, so that a jitted function takes it as an argument
    and a new policy of the same architecture does not recompile.

    Attributes:
        apply: ``(params, key, obs, memory) -> (action, memory, extras)``; static.
        params: whatever ``apply`` needs.
        init_memory: ``batch_shape -> memory`` at the start of an episode; static.
    """

    apply: Callable[..., tuple[Array, Memory, PyTree]] = dataclasses.field(metadata={"static": True})
    params: PyTree = ()
    init_memory: Callable[[tuple[int, ...]], Memory] = dataclasses.field(
        default=no_memory, metadata={"static": True}
    )

    def __call__(self, key: Key, obs: PyTree, memory: Memory = ()) -> tuple[Array, Memory, PyTree]:
        """Act: ``(action, memory, extras)``."""
        return self.apply(self.params, key, obs, memory)


class Network(NamedTuple):
    """A network with a memory; :func:`jrl.networks.as_network` makes one of any ``init``/``apply`` pair.

    Attributes:
        init: ``(key, obs, memory) -> params``.
        apply: ``(params, obs, memory) -> (output, memory)``.
        init_memory: ``batch_shape -> memory``.
        sequence: ``(params, obs [T, B], memory [B], reset [T, B]) -> (output [T, B], memory [B])``, the same as
            ``apply`` step by step, but faster; None scans ``apply`` (:func:`jrl.networks.apply_sequence`).
    """

    init: Callable[..., Params]
    apply: Callable[..., tuple[PyTree, Memory]]
    init_memory: Callable[[tuple[int, ...]], Memory] = no_memory
    sequence: Callable[..., tuple[PyTree, Memory]] | None = None


# ------------------------------------------------------------------------------------------- algorithms


class Algorithm(NamedTuple):
    """A learning algorithm as a record of pure functions.

    Attributes:
        init: ``(key, hparams) -> State``.
        step: ``(State, hparams) -> (State, Metrics)``: one unroll and its updates.
        policy: ``(State, *, greedy=True) -> Policy``.
        env_steps_per_step: environment steps taken by one ``step``.
        env: the single environment it was made for; None where an algorithm does not say.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Metrics]]
    policy: Callable[..., Policy]
    env_steps_per_step: int
    env: Environment | None = None


class Shards(NamedTuple):
    """Equal parts of one run's environments, of which a kernel computes one (:mod:`jrl.parallel`).

    The default is a run in one piece.

    Attributes:
        count: number of parts, static.
        mean: a pytree of float arrays to its means over the parts, the same in each.
    """

    count: int = 1  # type: ignore[assignment]  # hides tuple.count
    mean: Callable[[PyTree], PyTree] = lambda tree: tree
