"""How much memory a sweep takes and how many members fit, from the compiled program's own analysis."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrl import doctor
from jrl.configuration import Setup
from jrl.doctor import readable_size
from jrl.progress import readable_duration
from jrl.records import RunError
from jrl.sweep import members, processes, program
from jrl.types import PyTree

USABLE_SHARE = (
    0.8  # of the memory that is free: the evaluation, what a checkpoint is compressed into, other people
)


PROCESS_BYTES = 8 << 20
"""What a process takes in main memory beside its arrays while it trains: threads, metrics, what the allocator rounds
up. Between 9 and 17 MiB were measured for 32 to 512 members of PPO and DQN, the same program on different days
(``benchmarks/results/sweep-memory-dqn.json``, ``sweep-ppo-512-memory.json``); this is the round number below them."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sweep will be computed.

    Attributes:
        members: all of them.
        devices: devices over which they are sharded.
        width: members computed side by side on a device; None for all that it holds.
        chunk: members held at once, over all devices; each chunk runs to its end before the next one starts.
        bytes_per_member: state and hyperparameters of one member, replay included.
        bytes_total: of the whole program with ``chunk`` members: states, temporaries and results; where a search
            moves members, what moving the largest array of the states takes beside the others, if that is more;
            on a CPU :data:`PROCESS_BYTES` for each process.
        bytes_available: what it may take; None where the system does not say.
        compile_seconds: what lowering and compiling the training took (less with a warm cache).
        env_steps: of all members together.
        env_steps_per_second: measured over a few steps, all members together; None where not measured.
    """

    members: int
    devices: int
    width: int | None
    chunk: int
    bytes_per_member: int
    bytes_total: int
    bytes_available: int | None
    compile_seconds: float
    env_steps: int
    env_steps_per_second: float | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks of members, one after the other."""
        return -(-self.members // self.chunk)

    @property
    def seconds(self) -> float | None:
        """Predicted time of the training, compilation left out; None where the speed was not measured."""
        return None if self.env_steps_per_second is None else self.env_steps / self.env_steps_per_second

    def __str__(self) -> str:
        side = "all of a device" if self.width is None else str(self.width)
        member = readable_size(self.bytes_per_member)
        lines = [
            f"members        {self.members:,} on {self.devices} device{'s' * (self.devices > 1)}, {side} side by side",
            f"chunks         {self.num_chunks} of {self.chunk:,} members",
            f"memory         {readable_size(self.bytes_total)} for a chunk ({member} a member)"
            + (f", {readable_size(self.bytes_available)} may be used" if self.bytes_available else ""),
            f"compiled in    {self.compile_seconds:.1f} s",
            f"work           {self.env_steps:,} env steps in all",
        ]
        if self.seconds is not None:
            speed = f"{self.env_steps_per_second:,.0f} env steps/s"
            lines.append(f"predicted      {readable_duration(self.seconds)} at {speed}, measured")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where members are computed.

    Attributes:
        mesh: the devices.
        width: members side by side on a device; None for all of it.
        per_device: members each device holds, padding included.
    """

    mesh: Mesh
    width: int | None
    per_device: int

    @property
    def slots(self) -> int:
        """Members held at once, padding included."""
        return self.per_device * self.mesh.size

    def place(self, tree: PyTree) -> PyTree:
        """Put leaves ``[slots, ...]``, the same in every process, onto the devices."""
        where = program.sharding(self.mesh)

        def put(leaf: Any) -> jax.Array:
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(
                    put(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
                )
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

        return jax.tree.map(put, tree)

    def homes(self, n: int) -> np.ndarray:
        """Return the slot of each of ``n`` members, ``[n]``: dealt out to the devices one by one.

        So the first ones are spread evenly, whichever of them are still trained.
        """
        index = np.arange(n)
        return index % self.mesh.size * self.per_device + index // self.mesh.size

    def sources(self, n: int) -> np.ndarray:
        """Return which of ``n`` members each slot holds, ``[slots]``; a free slot repeats the last one."""
        sources = np.full(self.slots, n - 1)
        sources[self.homes(n)] = np.arange(n)
        return sources

    def spread(self, tree: PyTree) -> PyTree:
        """Put leaves ``[n, ...]`` into slots and onto the devices."""
        index = self.sources(members.size(tree))
        return self.place(jax.tree.map(lambda leaf: leaf[index], tree))


def choose_devices(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
    """Return the devices to shard over, all for None.

    Raises:
        RunError: there are none.
    """
    chosen = jax.devices() if devices is None else list(devices)
    if not chosen:
        raise RunError("devices=[]: a sweep needs at least one device; leave it out (devices=None) for all.")
    return chosen


def choose_width(width: int | str | None, devices: Sequence[jax.Device]) -> int | None:
    """Return the members to compute side by side: 1 on a CPU, all of a device (None) on an accelerator.

    Raises:
        RunError: neither "auto", "all" nor a positive number.
    """
    if width == "auto":
        return 1 if devices[0].platform == "cpu" else None
    if width is None or width == "all":
        return None
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise RunError(f"width={width!r}: expected a number of members of at least 1, 'all' or 'auto'.")
    return width


def layout(num: int, width: int | None, devices: Sequence[jax.Device]) -> Layout:
    """Return where ``num`` members are computed, on no more devices than there are members.

    Among several processes every one keeps its devices, and some of them may have nothing to do.
    """
    if processes.alone():
        devices = devices[: max(1, min(len(devices), num))]
    per_device = -(-num // len(devices))
    if width is not None:
        width = min(width, per_device)
        per_device = -(-per_device // width) * width
    return Layout(program.mesh(devices), width, per_device)


def available_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Return how many bytes a program may take on all ``devices`` together, or None where nobody says."""
    if devices[0].platform == "cpu":
        free = doctor.available_memory()
        if free is None:
            return None
        # Several processes share a machine's memory or have one each; nobody says, so that they share it here.
        return int(USABLE_SHARE * processes.smallest(free))
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in stats):
        return None
    return int(USABLE_SHARE * sum(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats))


def compile_for(
    setup: Setup,
    num: int,
    env_steps: int,
    length: int,
    *,
    width: int | None,
    devices: Sequence[jax.Device],
    chunk: int | None,
    moving: bool = False,
) -> tuple[Plan, Layout, Callable[..., Any]]:
    """Choose how many members are held at once, and compile their training.

    Args:
        setup: algorithm, environment, and the hyperparameters of one member.
        num: members.
        env_steps: of one member.
        length: algorithm steps that one call trains for at most.
        width: members side by side; None for all of a device.
        devices: to shard over.
        chunk: members held at once; None for as many as fit.
        moving: whether a search moves members from slot to slot, one array of the states after the other.

    Raises:
        RunError: not even one member on each device fits, or ``chunk`` is below 1.
    """
    if chunk is not None and chunk < 1:
        raise RunError(f"chunk={chunk}: at least one member is held at once.")
    available = available_bytes(devices)
    state = jax.eval_shape(setup.algo.init, jax.random.key(0), setup.hparams)
    of_member = num_bytes((state, setup.hparams))
    held = min(num, chunk or num)
    if chunk is None and available is not None:
        held = max(1, min(held, available // of_member))
    of_processes = PROCESS_BYTES * jax.process_count() if devices[0].platform == "cpu" else 0
    began = time.perf_counter()
    while True:
        where = layout(held, width, devices)
        compiled = compile_chunk(setup, state, where, length)
        taken = program_bytes(compiled) * where.mesh.size
        if moving:
            largest = max(jax.tree.leaves(state), key=num_bytes)
            at_rest = where.slots * (of_member - num_bytes(largest))
            moved = program_bytes(compile_move(where, (where.slots, *largest.shape), largest.dtype))
            taken = max(taken, at_rest + moved * where.mesh.size)
        taken += of_processes
        if chunk is not None or available is None or taken <= available:
            break
        if held == 1:
            raise RunError(
                f"one member takes {readable_size(taken)} and {readable_size(available)} may be used. Give "
                "Config a smaller replay or batch, free some memory, or go on regardless with chunk=1 (--chunk 1)."
            )
        room, needed = available - of_processes, taken - of_processes
        held = max(1, min(held - 1, int(held * room / needed)))
    # chunks of about the same size, and each a full load of the devices
    num_chunks = -(-num // held)
    held = min(held, -(-num // num_chunks)) if chunk is None else held
    plan = Plan(
        members=num,
        devices=where.mesh.size,
        width=where.width,
        chunk=held,
        bytes_per_member=of_member,
        bytes_total=taken,
        bytes_available=available,
        compile_seconds=time.perf_counter() - began,
        env_steps=env_steps * num,
    )
    return plan, where, compiled


def compile_chunk(setup: Setup, state: PyTree, where: Layout, length: int) -> Any:
    """Lower and compile :func:`jrl.sweep.program.chunk` for the slots of a layout."""
    shard = program.sharding(where.mesh)

    def batched(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((where.slots, *leaf.shape), leaf.dtype, sharding=shard), tree
        )

    failed_at = jax.ShapeDtypeStruct((where.slots,), jnp.int32, sharding=shard)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    train: Any = program.chunk(setup.algo, where.mesh, where.width, length)
    lowered = train.lower(batched(state), failed_at, batched(setup.hparams), number, number, number)
    return lowered.compile()


def compile_move(where: Layout, shape: tuple[int, ...], dtype: Any) -> Any:
    """Compile ``(leaf, index [slots]) -> leaf[index]`` for an array of the states in their slots."""
    on = program.sharding(where.mesh)
    move = jax.jit(lambda leaf, index: leaf[index], out_shardings=on)
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=on)
    return move.lower(leaf, jax.ShapeDtypeStruct((where.slots,), jnp.int32)).compile()


def program_bytes(compiled: Any) -> int:
    """Return the bytes a compiled program holds on one device: arguments, results that reuse none, temporaries."""
    analysis = compiled.memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def num_bytes(tree: PyTree) -> int:
    """Return the bytes of all leaves, those of typed keys included."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape, dtype = jnp.shape(leaf), leaf.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
            shape, dtype = data.shape, data.dtype
        total += int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return total
