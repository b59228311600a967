"""Any ``init``/``apply`` pair as a :class:`jrl.types.Network`: linen modules, nnx modules, plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jrl.types import (
    ActionSpace,
    Box,
    Discrete,
    MaskedObservation,
    MultiDiscrete,
    Network,
    PyTree,
    TokenObservation,
    no_memory,
)


def as_network(network: Any) -> Network:
    """Return ``network`` as a :class:`~jrl.types.Network`.

    Args:
        network: a Network; or anything with ``init(key, obs) -> params`` and ``apply(params, obs) -> output``
            (a flax linen module, a NamedTuple, a module of functions); or, with a memory, one that also has
            ``init_memory(batch_shape)``, and whose ``init`` and ``apply`` take the memory as a third argument
            and whose ``apply`` returns ``(output, memory)``; or a pair ``(init, apply)``. It is called on
            observations with any leading axes: none, ``[B]`` or ``[T, B]``. Of a linen module the collection
            ``params`` is trained, others (running averages) have no gradient.

    Raises:
        TypeError: ``network`` is none of these.
    """
    if isinstance(network, Network):
        return network
    if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
        init, apply = network
    elif callable(getattr(network, "init", None)) and callable(getattr(network, "apply", None)):
        init, apply = network.init, network.apply
        if isinstance(network, nn.Module):
            apply = _trained_by_params(apply)
    else:
        raise TypeError(
            f"network={network!r}: needs init(key, obs) -> params and apply(params, obs) -> output, as a flax "
            "linen module, an (init, apply) pair or a jrl.Network; wrap an nnx module in jrl.networks.from_nnx."
        )
    init_memory = getattr(network, "init_memory", None)
    if init_memory is not None:
        return Network(init, apply, init_memory)
    return Network(
        init=lambda key, obs, memory=(): init(key, obs),
        apply=lambda params, obs, memory=(): (apply(params, obs), memory),
        init_memory=no_memory,
    )


def _trained_by_params(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Return a linen module's ``apply`` without gradients of its other collections."""

    def trained(variables: PyTree, *arguments: PyTree) -> Any:
        fixed = {name: part for name, part in variables.items() if name != "params"}
        return apply({**variables, **jax.lax.stop_gradient(fixed)}, *arguments)

    return trained


def from_nnx(constructor: Callable[..., Any]) -> Network:
    """Return an ``nnx`` module as a Network.

    Args:
        constructor: ``rngs -> nnx.Module``, for instance ``lambda rngs: MyModule(4, 2, rngs=rngs)``; the module
            is called on observations with any leading axes. Its ``nnx.Param`` variables are trained; others of
            real numbers (running averages) stay as they were made, and what a call changes in it is dropped.

    Raises:
        TypeError: a module in place of its constructor, or one with state that is not of real numbers, such as
            the random streams of dropout.
    """
    from flax import nnx

    if isinstance(constructor, nnx.Module):
        raise TypeError(
            f"from_nnx({type(constructor).__name__} instance): give a function that makes it, as every seed needs "
            "parameters of its own: from_nnx(lambda rngs: MyModule(..., rngs=rngs))."
        )
    graph, *(_, other) = nnx.split(nnx.eval_shape(lambda: constructor(nnx.Rngs(0))), nnx.Param, ...)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(other)):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"from_nnx: the module has state {jax.tree_util.keystr(path)} of dtype {leaf.dtype}, a random stream "
                "or a counter, which a network without a memory cannot advance: make it deterministic (no dropout)."
            )

    def init(key: jax.Array, obs: PyTree, memory: PyTree = ()) -> PyTree:
        _, *(trained, fixed) = nnx.split(constructor(nnx.Rngs(key)), nnx.Param, ...)
        return {"trained": nnx.to_pure_dict(trained), "fixed": nnx.to_pure_dict(fixed)}

    def apply(params: PyTree, obs: PyTree, memory: PyTree = ()) -> tuple[PyTree, PyTree]:
        fixed = jax.lax.stop_gradient(params["fixed"])
        module = nnx.merge(graph, nnx.State(params["trained"]), nnx.State(fixed))
        return module(obs), memory

    return Network(init, apply)


def observation_flattener(spec: PyTree) -> Callable[[PyTree], jax.Array]:
    """Return ``obs -> features float32 [..., F]``: every leaf of ``obs`` flattened, cast and joined.

    uint8 leaves are taken for pixels and divided by 255, see :func:`as_float`; tokens become one-hot.

    Args:
        spec: pytree of ShapeDtypeStruct of one observation; what stands before these axes is batch.
    """
    specs = jax.tree.leaves(spec)

    def flatten(obs: PyTree) -> jax.Array:
        leaves = [
            as_float(_one_hot(leaf, spec).reshape(*leaf.shape[: leaf.ndim - len(spec.shape)], -1))
            for leaf, spec in zip(jax.tree.leaves(obs), specs, strict=True)
        ]
        return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=-1)

    return flatten


def _one_hot(x: jax.Array, spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.nn.one_hot(x, spec.n, dtype=jnp.float32) if isinstance(spec, TokenObservation) else x


def as_float(x: jax.Array) -> jax.Array:
    """Return ``x`` as float32; uint8, the dtype of pixels, scaled to [0, 1]."""
    return x.astype(jnp.float32) / (255.0 if x.dtype == jnp.uint8 else 1.0)


def mask_aware(network: Network, mask_output: Callable[[PyTree, jax.Array], PyTree]) -> Network:
    """Let ``network`` see the observation within a MaskedObservation, and mask its output.

    Args:
        network: takes plain observations.
        mask_output: ``(output, action_mask) -> output``.
    """

    def init(key: jax.Array, obs: PyTree, memory: PyTree) -> PyTree:
        return network.init(key, obs.obs if isinstance(obs, MaskedObservation) else obs, memory)

    def apply(params: PyTree, obs: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        if not isinstance(obs, MaskedObservation):
            return network.apply(params, obs, memory)
        output, memory = network.apply(params, obs.obs, memory)
        return mask_output(output, obs.action_mask), memory

    def sequence(params: PyTree, obs: PyTree, memory: PyTree, reset: jax.Array) -> tuple[PyTree, PyTree]:
        if not isinstance(obs, MaskedObservation):
            return network.sequence(params, obs, memory, reset)  # type: ignore[misc]
        output, memory = network.sequence(params, obs.obs, memory, reset)  # type: ignore[misc]
        return mask_output(output, obs.action_mask), memory

    return Network(init, apply, network.init_memory, sequence if network.sequence else None)


def _plain(observation: PyTree) -> PyTree:
    return observation.obs if isinstance(observation, MaskedObservation) else observation


def check_policy_output(network: Network, observation: PyTree, action: ActionSpace) -> None:
    """Raise unless ``network`` maps an observation to ``(policy head, value)`` of the sizes ``action`` needs.

    Shapes are found abstractly; nothing is computed.

    Raises:
        ValueError: the wrong structure or a wrong width, with both named.
    """
    output = _output_shape(network, _plain(observation))
    if not (isinstance(output, tuple) and len(output) == 2):
        raise ValueError(f"network returns {_describe(output)}: PPO needs (policy head, value).")
    head, value = output
    widths = {
        Discrete: lambda a: [(a.n,)],
        MultiDiscrete: lambda a: [(sum(a.ns),)],
        Box: lambda a: [a.shape, a.shape],
    }[type(action)](action)
    if [leaf.shape for leaf in jax.tree.leaves(head)] != widths:
        raise ValueError(
            f"network's policy head is {_describe(head)} for one observation, but {action!r} needs "
            f"{' and '.join(map(str, widths))}: change the width of its last layer (and keep every leading axis: "
            "a network is called on [...], not only on [batch, ...])."
        )
    if getattr(value, "shape", None) != ():
        raise ValueError(
            f"network's value is {_describe(value)} for one observation: it must be a scalar, ()."
        )


def check_q_output(
    network: Network, observation: PyTree, action: Discrete, num_atoms: int | None = None
) -> None:
    """Raise unless ``network`` maps an observation to ``[A]`` action values, or ``[A, num_atoms]`` atoms of them.

    Raises:
        ValueError: a wrong width, with both named.
    """
    output = _output_shape(network, _plain(observation))
    shape = (action.n,) if num_atoms is None else (action.n, num_atoms)
    if getattr(output, "shape", None) != shape:
        what = "action values" if num_atoms is None else "atoms of action values"
        raise ValueError(
            f"network returns {_describe(output)} for one observation, but {action!r} needs {shape} {what}: change "
            "the width of its last layer (and keep every leading axis: a network is called on [...], not only on "
            "[batch, ...])."
        )


def check_output(network: Network, observation: PyTree, expected: list[tuple[int, ...]], name: str) -> None:
    """Raise unless the leaves of ``network``'s output for one observation have the expected shapes.

    Raises:
        ValueError: other shapes, with both named.
    """
    output = _output_shape(network, observation)
    if [leaf.shape for leaf in jax.tree.leaves(output)] != expected:
        raise ValueError(
            f"the {name} returns {_describe(output)} for one observation, where {' and '.join(map(str, expected))} is "
            "needed: change the width of its last layer (and keep every leading axis)."
        )


def _output_shape(network: Network, observation: PyTree) -> PyTree:
    def forward(key: jax.Array, obs: PyTree) -> PyTree:
        memory = network.init_memory(())
        return network.apply(network.init(key, obs, memory), obs, memory)[0]

    return jax.eval_shape(forward, jax.random.key(0), observation)


def _describe(tree: PyTree) -> str:
    shapes = [str(leaf.shape) for leaf in jax.tree.leaves(tree)]
    return f"{type(tree).__name__} of shapes {', '.join(shapes)}" if len(shapes) != 1 else shapes[0]
