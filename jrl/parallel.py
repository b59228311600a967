"""One run on several devices: its environments are sharded, its gradients averaged.

The environments are split into shards, whose number is part of the run: each draws its own random numbers, shuffles
its own transitions, and gives an equal part of every minibatch. On how many devices the shards are computed is not:
one device that computes them all side by side gives the same numbers to rounding as one device for each.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jrl.native import build
from jrl.native import mean as native_mean
from jrl.training import summarize
from jrl.types import Algorithm, Array, Key, Metrics, PyTree, Shards

DEVICES, LOCAL = "devices", "shards of a device"
_programs = itertools.count()  # of this process; their exchanges by native kernels are told apart by numbers


def data_parallel(
    make: Callable[..., Algorithm],
    devices: Sequence[jax.Device] | None = None,
    *,
    num_shards: int | None = None,
    kernels: str = "xla",
) -> Algorithm:
    """Return the algorithm with its environments split into shards, and those spread over ``devices``.

    ::

        make = functools.partial(jrl.ppo.make, env, config)
        algo = jrl.parallel.data_parallel(make, jax.devices()[:2])

    With ``g_i`` the gradient of the loss over shard i's part of a minibatch, every device takes the same step
    along ``1/n Σ g_i`` (synchronous data parallelism, as in Stooke and Abbeel, 2018, "Accelerated Methods for
    Deep Reinforcement Learning", https://arxiv.org/abs/1803.02811). One vector is exchanged for each minibatch,
    and a few more for each step; statistics (of advantages, observations, returns) are those of all shards.

    ``init`` is that of the algorithm in one piece and the state has the same leaves, those over environments
    sharded and all others on every device: a checkpoint may be continued on another number of devices (the same
    run, if ``num_shards`` is the same), or in one piece. Call ``step`` within ``jit``; not within ``vmap``.

    Args:
        make: ``make()`` returns the algorithm and ``make(shards=...)`` the kernel of one shard, as
            :func:`jrl.ppo.make` does; its State has a ``key``.
        devices: of this process; None means all.
        num_shards: a multiple of the devices; None means one for each.
        kernels: by what devices exchange: ``"xla"``; or ``"native"``, on a CPU, where two threads meet sooner (the
            sum of more than two devices may differ by rounding). The algorithm's own are those of its ``Config``.

    Raises:
        TypeError: ``make`` takes no ``shards``.
        ValueError: ``devices`` is empty or does not divide ``num_shards``; what ``make`` refuses, such as a
            number of environments that cannot be split; ``kernels`` is neither, or 'native' where there is no CPU.
        RuntimeError: ``kernels="native"`` cannot be compiled (:func:`jrl.native.build.load`).
    """
    if not callable(make) or "shards" not in inspect.signature(make).parameters:
        function = getattr(make, "func", make)  # of a partial, which would show the whole environment
        name = getattr(function, "__qualname__", type(function).__name__)
        module = getattr(function, "__module__", "")
        raise TypeError(
            f"data_parallel(make) with {module}.{name}: no function that takes shards=..., so that its environments "
            "cannot be split over devices. jrl.ppo.make and jrl.pqn.make do; other algorithms run on one device."
        )
    build.check(kernels)
    if kernels == "native":
        build.require()
    devices = jax.devices() if devices is None else list(devices)
    num_shards = len(devices) if num_shards is None else num_shards
    if not devices or num_shards < 1 or num_shards % len(devices):
        raise ValueError(
            f"num_shards={num_shards} on {len(devices)} devices: every device computes the same number of "
            "shards; use a multiple of the devices."
        )
    if num_shards == 1:
        is_default = jnp.zeros(()).devices() == set(devices)
        return make() if is_default else _placed(make(), devices[0])
    num_local = num_shards // len(devices)
    mesh = Mesh(np.array(devices), DEVICES)
    whole = make()
    names = DEVICES if num_local == 1 else (LOCAL, DEVICES)
    sites = itertools.count(next(_programs) << 32)

    def mean(tree: PyTree) -> PyTree:
        # As one vector: what an exchange costs is its being one.
        vector, unravel = ravel_pytree(tree)
        return unravel(jax.lax.pmean(vector, names))

    def mean_by_kernel(tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        if any(leaf.dtype != jnp.float32 for leaf in leaves):
            return mean(tree)
        if num_local > 1:
            leaves = jax.lax.pmean(leaves, LOCAL)
        return jax.tree.unflatten(structure, native_mean.mean(leaves, DEVICES, next(sites)))

    by_kernel = kernels == "native" and len(devices) > 1
    shard = make(shards=Shards(num_shards, mean_by_kernel if by_kernel else mean))

    def specs(state: PyTree, hparams: PyTree) -> PyTree:
        """Return the partition of each leaf: over the axis that is shorter in a shard, if there is one."""
        part = jax.eval_shape(shard.init, state.key, hparams)
        return jax.tree.map(lambda a, b: PartitionSpec(*_split_axis(a.shape, b.shape)), state, part)

    def init(key: Key, hparams: PyTree) -> PyTree:
        layout = specs(jax.eval_shape(whole.init, key, hparams), hparams)

        def own_part(key: Key, hparams: PyTree) -> PyTree:
            # All of it on every device: cheap, and no partitioner decides how a device gets its part.
            def own(leaf: Array, spec: PartitionSpec) -> Array:
                if DEVICES not in spec:
                    return leaf
                axis = spec.index(DEVICES)
                size = leaf.shape[axis] // len(devices)
                start = jax.lax.axis_index(DEVICES) * size
                return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)

            return jax.tree.map(own, whole.init(key, hparams), layout)

        replicated = PartitionSpec()
        return jax.shard_map(own_part, mesh=mesh, in_specs=replicated, out_specs=layout, check_vma=False)(
            key, hparams
        )

    def step(state: PyTree, hparams: PyTree) -> tuple[PyTree, Metrics]:
        layout = specs(state, hparams)
        next_key, step_key = jax.random.split(state.key)
        keys = jax.random.split(step_key, num_shards)
        # In a device's part: the axis to split again into its shards, None for what all shards share.
        axes = jax.tree.map(lambda spec: spec.index(DEVICES) if DEVICES in spec else None, layout)

        def step_shard(state: PyTree, key: Key, hparams: PyTree) -> tuple[PyTree, Metrics]:
            stepped, metrics = shard.step(dataclasses.replace(state, key=key), hparams)
            return dataclasses.replace(stepped, key=state.key), metrics

        def step_device(state: PyTree, keys: Key, hparams: PyTree) -> tuple[PyTree, Metrics]:
            if num_local == 1:
                state, metrics = step_shard(state, keys[0], hparams)
                return state, _gather({name: value[None] for name, value in metrics.items()})
            state = jax.tree.map(lambda axis, leaf: _fold(leaf, axis, num_local), axes, state, is_leaf=_none)
            state, metrics = jax.vmap(
                step_shard, in_axes=(axes, 0, None), out_axes=(axes, 0), axis_name=LOCAL
            )(state, keys, hparams)
            state = jax.tree.map(lambda axis, leaf: _unfold(leaf, axis), axes, state, is_leaf=_none)
            return state, _gather(metrics)

        state, metrics = jax.shard_map(
            step_device,
            mesh=mesh,
            in_specs=(layout, PartitionSpec(DEVICES), PartitionSpec()),
            out_specs=(layout, PartitionSpec()),
            check_vma=False,
        )(state, keys, hparams)
        return dataclasses.replace(state, key=next_key), metrics

    return whole._replace(init=init, step=step)


def _placed(algo: Algorithm, device: jax.Device) -> Algorithm:
    """Return ``algo`` with its state on ``device``; the numbers stay those of the run in one piece."""
    there = NamedSharding(Mesh(np.array([device]), DEVICES), PartitionSpec())

    def init(key: Key, hparams: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(algo.init(key, hparams), there)

    def step(state: PyTree, hparams: PyTree) -> tuple[PyTree, Metrics]:
        return jax.lax.with_sharding_constraint(algo.step(state, hparams), there)

    return algo._replace(init=init, step=step)


def _gather(metrics: Metrics) -> Metrics:
    """Reduce metrics ``[shards of a device]`` over the shards of all devices, in one exchange."""
    rows = jax.lax.all_gather(jnp.stack(list(metrics.values()), axis=1), DEVICES, tiled=True)
    return summarize(dict(zip(metrics, rows.T, strict=True)))


def _split_axis(whole: tuple[int, ...], part: tuple[int, ...]) -> list[str | None]:
    """Return what a PartitionSpec is made of: the name of the devices at the axis that is shorter in a part."""
    differ = [axis for axis, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
    return [None] * differ[0] + [DEVICES] if differ else []


def _fold(leaf: Array, axis: int | None, parts: int) -> Array:
    if axis is None:
        return leaf
    return leaf.reshape(*leaf.shape[:axis], parts, -1, *leaf.shape[axis + 1 :])


def _unfold(leaf: Array, axis: int | None) -> Array:
    if axis is None:
        return leaf
    return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])


def _none(x: Any) -> bool:
    return x is None
