"""Checkpoints: a whole training state on disk, written atomically, read back path by path.

A folder of checkpoints holds one sub-folder for each saved step::

    checkpoints/000000000512/metadata.json   what was saved: every leaf, size and CRC-32 of every file, its own CRC-32
    checkpoints/000000000512/arrays/         the leaves, written by orbax as one flat dictionary

A checkpoint is written under a hidden name, flushed to the disk and then renamed. So a folder with a step's
name is always a complete one, whenever the process may have been killed. There is no pickle anywhere:
reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.ops.keys import HASHED, NAME
from jrl.records import CheckpointError, CorruptCheckpointError, check_path, write_json
from jrl.types import PyTree

FORMAT = "jrl-checkpoint-1"
_METADATA = "metadata.json"
_ARRAYS = "arrays"
_NUM_NAMED = 5  # differing leaves named in a message
_PIECE_BYTES = 16 << 20  # of a leaf, compressed and written at a time: so a large replay takes no second one


class Snapshot(NamedTuple):
    """A copy of a state in host memory, which survives the donation of the state to the next computation.

    Attributes:
        arrays: leaf path -> NumPy array (a key's ``key_data``).
        leaves: for each leaf its ``path``, ``shape``, ``dtype`` and, for keys, ``key_impl``.
    """

    arrays: dict[str, np.ndarray]
    leaves: list[dict[str, Any]]


def snapshot(state: PyTree) -> Snapshot:
    """Copy every leaf of ``state`` to host memory; waits until they are computed."""
    arrays, leaves = _described(state)
    # A copy: np.asarray would alias a buffer that is donated later. What other processes hold a part of
    # stays where it is: each writes its own.
    return Snapshot(
        {path: leaf if _is_shared(leaf) else np.array(leaf) for path, leaf in arrays.items()}, leaves
    )


def save(
    folder: str | os.PathLike,
    state: PyTree,
    step: int,
    *,
    metadata: dict[str, Any] | None = None,
    keep: int | None = 3,
) -> Path:
    """Write ``state`` as the checkpoint ``step`` of ``folder``, atomically and synchronously.

    Where several processes run together (``jax.distributed``) all of them call this, with a folder that all of them
    see: each writes the parts of the arrays that it holds, and the first one completes the checkpoint.

    Args:
        folder: made if it does not exist; one process at a time may write to it.
        state: any pytree of arrays and typed keys, or a :func:`snapshot` of one.
        step: the number it is saved under, 0 or more; an earlier checkpoint of the same number is replaced.
        metadata: JSON values to keep beside it, see :func:`metadata`.
        keep: how many of the newest checkpoints stay; None keeps all.

    Returns:
        The folder of this checkpoint.

    Raises:
        ValueError: ``step < 0`` or ``keep < 1``, or the path has one of ``*?[`` (:func:`jrl.records.check_path`).
        OSError: the disk is full or the folder cannot be written to; what was saved before is still there.
    """
    if step < 0:
        raise ValueError(f"step={step}: a checkpoint is saved under a number that is 0 or more.")
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint must stay; pass keep=None to keep all.")
    # As they are, with no copy: they are written before this returns, and nothing can be donated until then.
    arrays, leaves = state if isinstance(state, Snapshot) else _described(state)
    folder = Path(folder).absolute()
    check_path(folder)
    first = jax.process_index() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    unfinished = folder / f".saving-{step}-{os.getpid() if jax.process_count() == 1 else 'all'}"
    if first:
        unfinished.mkdir()
    _wait_for_all("made")
    leaves = [_with_file(leaf) for leaf in leaves]
    # orbax refuses arrays of size zero; the list of leaves is enough to make them again.
    arrays = {_file(leaf): arrays[leaf["path"]] for leaf in leaves if arrays[leaf["path"]].size}
    final = _path(folder, step)
    with _quiet_orbax() as checkpointer, _removed_if_it_fails(unfinished):
        if arrays:
            checkpointer.save(unfinished / _ARRAYS, arrays, save_args=dict.fromkeys(arrays, _in_pieces()))
        _wait_for_all("written")
        if first:
            record = {
                "format": FORMAT,
                "step": step,
                "metadata": metadata or {},
                "leaves": leaves,
                "files": _checksums(unfinished),
            }
            write_json(unfinished / _METADATA, record | {"crc": _crc(record)})
            for file in _files(unfinished):
                _flush(file)
    if first:
        if final.exists():
            _discard(final)
        unfinished.rename(final)
        _flush(folder)
        if keep is not None:
            for old in steps(folder)[:-keep]:
                if old != step:
                    _discard(_path(folder, old))
    _wait_for_all("complete")
    return final


@contextlib.contextmanager
def _removed_if_it_fails(unfinished: Path) -> Iterator[None]:
    """Leave nothing of a checkpoint that could not be written, as on a full disk it would take what room there is.

    The system's errors are OSErrors then, of orbax's too, whose storage library has ValueErrors for them.
    """
    try:
        yield
    except BaseException as error:
        for thread in threading.enumerate():  # what orbax does not end when one of them fails
            if type(thread).__module__.startswith("orbax."):
                thread.join(10)
        if jax.process_count() == 1:  # others may still be writing
            _remove_for_good(unfinished)
        code = re.search(r"os_error_code='?(\d+)", str(error)) if isinstance(error, ValueError) else None
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(unfinished.parent)) from error


def _remove_for_good(unfinished: Path) -> None:
    """Delete a folder to which threads of orbax's storage library may go on writing for a moment."""
    for _ in range(50):
        shutil.rmtree(unfinished, ignore_errors=True)
        time.sleep(0.1)
        if not unfinished.exists():
            return


def _wait_for_all(what: str) -> None:
    """Wait until every process is here, where there are several (``jax.distributed``)."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"checkpoint {what}")


def load_library() -> None:
    """Import orbax now rather than at the first :func:`save`: a second, and 20 MiB."""
    import orbax.checkpoint  # noqa: F401


def restore(folder: str | os.PathLike, like: PyTree, step: int | None = None) -> PyTree:
    """Read a state back, bit for bit.

    Args:
        folder: what :func:`save` was given.
        like: a pytree of the same structure, concrete or abstract (``jax.eval_shape(algo.init, ...)``); its
            values are not looked at.
        step: which checkpoint; the newest one by default.

    Returns:
        A pytree of the structure of ``like``, its leaves on the default device and strongly typed.

    Raises:
        CheckpointError: there is no such checkpoint, it is corrupt, something other than jrl wrote it, or a
            leaf is missing, unexpected, or of another shape or dtype; the message names the first ones.
    """
    path, record = _verified(folder, step)
    wanted = [(name, _describe(leaf)) for name, leaf in _leaves_with_paths(like)]
    saved = {leaf["path"]: leaf for leaf in record["leaves"]}
    _compare(path, saved, dict(wanted))

    arrays: dict[str, np.ndarray] = {}
    if any(0 not in leaf["shape"] for leaf in saved.values()):
        try:
            with _quiet_orbax() as checkpointer:
                # as NumPy arrays, also what was sharded over devices or processes that are not here now
                kinds = {
                    _file(leaf): _restore_as_numpy() for leaf in saved.values() if 0 not in leaf["shape"]
                }
                arrays = checkpointer.restore(path / _ARRAYS, restore_args=kinds)
        except (ValueError, KeyError, OSError) as error:  # what orbax and tensorstore raise on a bad store
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            raise CorruptCheckpointError(
                _corrupt(path, f"its arrays cannot be read ({first_line})")
            ) from error
    leaves = [_load(saved[name], arrays) for name, _ in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def metadata(folder: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """Return what :func:`save` was given as ``metadata``; the arrays are not looked at.

    Raises:
        CheckpointError: there is no such checkpoint, or its record cannot be read.
    """
    return _record(folder, step)[1]["metadata"]


def steps(folder: str | os.PathLike) -> list[int]:
    """Return the numbers of all complete checkpoints, ascending; intact or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


def latest_step(folder: str | os.PathLike) -> int | None:
    """Return the number of the newest complete checkpoint, or None."""
    return max(steps(folder), default=None)


def verify(folder: str | os.PathLike, step: int) -> None:
    """Compare every file of a checkpoint with its checksum.

    Raises:
        CheckpointError: it is missing, corrupt, or not written by jrl.
    """
    _verified(folder, step)


def remove(folder: str | os.PathLike, step: int) -> None:
    """Delete the checkpoint of ``step``."""
    _discard(_path(Path(folder), step))


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Delete what a process that was killed in the middle of a save, or of a clean-up, left behind."""
    for entry in Path(folder).glob(".*"):
        if entry.name.startswith((".saving-", ".discarded-")):
            shutil.rmtree(entry)


# ------------------------------------------------------------------------------------------------ leaves


def _leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Name each leaf, as in ``params/Dense_0/kernel``; with brackets where short names would collide."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    if len(set(names)) < len(names):
        names = [jax.tree_util.keystr(path) for path, _ in flat]
    return [(name, leaf) for name, (_, leaf) in zip(names, flat, strict=True)]


def _with_file(leaf: dict[str, Any]) -> dict[str, Any]:
    """Add the ``file`` under which orbax is given a leaf, where that is not its path.

    A dot in a name is to orbax what a slash is, a backslash it does not read back: both would be saved and lost.
    """
    file = re.sub(r"[%.\\\0]", lambda found: f"%{ord(found[0]):02X}", leaf["path"])
    return leaf if file == leaf["path"] else {**leaf, "file": file}


def _file(leaf: dict[str, Any]) -> str:
    return leaf.get("file", leaf["path"])


def _described(state: PyTree) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what :class:`Snapshot` holds, the arrays where they are."""
    arrays, leaves = {}, []
    for path, leaf in _leaves_with_paths(state):
        description = _describe(leaf)
        if _is_key(leaf):
            description["key_impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[path] = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        leaves.append({"path": path, **description})
    return arrays, leaves


def _is_shared(leaf: Any) -> bool:
    """Tell whether other processes hold a part of an array."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    if not hasattr(leaf, "dtype"):
        leaf = jnp.asarray(leaf)  # the dtype a Python number has inside a computation
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _load(leaf: dict[str, Any], arrays: dict[str, np.ndarray]) -> jax.Array:
    impl = leaf.get("key_impl")
    impl = HASHED if impl == NAME else impl  # jax finds only its own by their names
    if 0 in leaf["shape"]:
        if impl:
            return jax.random.split(jax.random.key(0, impl=impl), tuple(leaf["shape"]))
        return jnp.zeros(leaf["shape"], leaf["dtype"])
    # A copy: on a CPU jax may otherwise alias NumPy's memory, and the driver donates these buffers.
    array = jnp.array(arrays.pop(_file(leaf)), copy=True)
    return jax.random.wrap_key_data(array, impl=impl) if impl else array


def _compare(path: Path, saved: dict[str, dict], wanted: dict[str, dict]) -> None:
    differences = [f"{name} is missing in the checkpoint" for name in wanted if name not in saved]
    differences += [f"{name} is in the checkpoint only" for name in saved if name not in wanted]
    for name in wanted:
        for fact in ("shape", "dtype"):
            if name in saved and saved[name][fact] != wanted[name][fact]:
                there, here = saved[name][fact], wanted[name][fact]
                differences.append(f"{name} has {fact} {there} in the checkpoint and {here} here")
    if differences:
        more = len(differences) - _NUM_NAMED
        named = "; ".join(differences[:_NUM_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(
            f"checkpoint {path} does not fit this state: {named}. "
            "A checkpoint can only be restored into the algorithm, Config and environment it was saved from. "
            "Build the algorithm as it was then (run.json of the run has the whole configuration), or start "
            "a new run."
        )


# ------------------------------------------------------------------------------------------------- files


def _path(folder: str | os.PathLike, step: int) -> Path:
    return Path(folder).absolute() / f"{step:012d}"


def _record(folder: str | os.PathLike, step: int | None) -> tuple[Path, dict[str, Any]]:
    """Return the path and the record of a checkpoint."""
    available = steps(folder)
    if step is None and not available:
        raise CheckpointError(
            f"{Path(folder).absolute()} holds no checkpoint. Checkpoints are sub-folders named by their "
            "step; pass the folder that jrl.checkpoint.save was given (of a run: its checkpoints folder)."
        )
    path = _path(folder, available[-1] if step is None else step)
    if step is not None and step not in available:
        raise CheckpointError(
            f"{path} does not exist. The checkpoints there are: {available}; pass one of them as step."
        )
    try:
        record = json.loads((path / _METADATA).read_bytes())
    except FileNotFoundError as error:
        raise _foreign(path, f"it has no {_METADATA}") from error
    except (ValueError, OSError) as error:
        raise _corrupt(path, f"{_METADATA} cannot be read") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _foreign(path, f"its {_METADATA} does not say {FORMAT!r}")
    if record.pop("crc", None) not in (None, _crc(record)):  # older ones have none
        raise _corrupt(path, f"{_METADATA} is not as it was written")
    return path, record


def _verified(folder: str | os.PathLike, step: int | None) -> tuple[Path, dict[str, Any]]:
    """Return the path and the record of a checkpoint whose files are all as they were written."""
    path, record = _record(folder, step)
    try:
        found = _checksums(path)
    except OSError as error:
        raise _corrupt(path, str(error)) from error
    for name, facts in record["files"].items():
        if name not in found:
            raise _corrupt(path, f"{name} is missing")
        if found[name] != facts:
            what = "its checksum differs" if found[name][0] == facts[0] else f"has {found[name][0]} bytes"
            raise _corrupt(path, f"{name} was written with {facts[0]} bytes, now {what}")
    return path, record


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    others = [other for other in steps(path.parent) if other != int(path.name)]
    fix = f"pass one of the others, step in {others}" if others else "there is no other one: start a new run"
    return CorruptCheckpointError(
        f"checkpoint {path} is corrupt: {what}. Every file must be as it was saved; {fix}."
    )


def _foreign(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path} is not a checkpoint of jrl: {what}. Only folders written by jrl.checkpoint.save can be "
        "restored; pass one of those."
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Return the size and the CRC-32 of every file, by its path in ``folder``."""
    sums = {}
    for file in _files(folder):
        if file.name == _METADATA and file.parent == folder:
            continue
        size = crc = 0
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                size, crc = size + len(block), zlib.crc32(block, crc)
        sums[file.relative_to(folder).as_posix()] = [size, crc]
    return sums


def _crc(record: dict[str, Any]) -> int:
    """Return the CRC-32 of a record, the same before it is written and after it is read."""
    return zlib.crc32(json.dumps(record).encode())


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk, safe from a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    # Renamed first: a kill in the middle of rmtree must not leave half a checkpoint under a step's name.
    hidden = path.with_name(f".discarded-{path.name}-{os.getpid()}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _restore_as_numpy() -> Any:
    import orbax.checkpoint as ocp

    return ocp.RestoreArgs(restore_type=np.ndarray)


def _in_pieces() -> Any:
    import orbax.checkpoint as ocp

    return ocp.SaveArgs(chunk_byte_size=_PIECE_BYTES)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[Any]:
    """Open an orbax checkpointer, its log switched off; imported here because it is slow."""
    logs = {log: log.level for log in map(logging.getLogger, ("absl", "asyncio"))}
    unraisable = sys.unraisablehook
    import orbax.checkpoint as ocp

    # It warns of every checkpoint that is not OCDBT, and tells of an error, from every thread, that is raised as well;
    # its storage library then calls back into a loop that has ended.
    for log, level in logs.items():
        log.setLevel(max(level, logging.CRITICAL))
    sys.unraisablehook = lambda found: None if "loop is closed" in str(found.exc_value) else unraisable(found)
    try:
        # One file for each piece of a leaf. In orbax's other layout (OCDBT) everything compressed is held in
        # memory until the end, as much again as the state; what several processes write it puts together.
        with ocp.PyTreeCheckpointer(use_ocdbt=jax.process_count() > 1) as checkpointer:
            yield checkpointer
    finally:
        for log, level in logs.items():
            log.setLevel(level)
        sys.unraisablehook = unraisable
