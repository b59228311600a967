"""The safetensors format: a header in JSON that says where each tensor lies, then their bytes.

Every number of a header is checked against the file before it is used: nothing is read beyond the end.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jrl.records import replacing

_DTYPES: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_RANK = 16


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Read a safetensors file: the header's length (uint64), the header (JSON), the tensors' bytes.

    Returns:
        Arrays by name.

    Raises:
        ValueError: truncated or malformed: an offset outside the file, tensors that overlap or leave gaps, a shape
            that does not fit its bytes, an unknown dtype, a header that is too long or no JSON.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            entries, start = _header(stream, size)
            arrays = {}
            for name, dtype, shape, begin, end in entries:
                stream.seek(start + begin)
                data = stream.read(end - begin)
                if len(data) < end - begin:
                    raise ValueError(f"it ends within tensor {name!r}")
                array = np.frombuffer(data, dtype).reshape(shape)
                if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
                    raise ValueError(f"tensor {name!r} is BOOL and has bytes that are neither 0 nor 1")
                arrays[name] = array
            return arrays
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}.") from error


def _header(stream: Any, size: int) -> tuple[list[tuple[str, np.dtype, list[int], int, int]], int]:
    """Return ``(name, dtype, shape, begin, end)`` of every tensor, all of them checked, and where their bytes start."""
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise ValueError(f"it has {size} bytes, and the length of the header alone takes 8")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header is said to have {length} bytes, the file has {size}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("its header has a name twice")
        return dict(pairs)

    header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=once)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {dtype!r}, known are {', '.join(_DTYPES)}")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError(
                    f"tensor {name!r} has {what} {numbers!r}: must be a list of integers from 0 on"
                )
        if len(shape) > _MAX_RANK or len(offsets) != 2:
            raise ValueError(f"tensor {name!r} has {len(shape)} axes and {len(offsets)} offsets")
        begin, end = offsets
        if not begin <= end <= size - 8 - length:
            raise ValueError(
                f"tensor {name!r} lies at {begin} to {end}, the file has {size - 8 - length} bytes of data"
            )
        needed = math.prod(shape) * _DTYPES[dtype].itemsize
        if needed != end - begin:
            raise ValueError(
                f"tensor {name!r} of shape {shape} takes {needed} bytes, the file gives it {end - begin}"
            )
        entries.append((name, _DTYPES[dtype], shape, begin, end))
    at, last = 0, "the header"
    for name, _, _, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != at:
            what = "overlaps" if begin < at else "leaves a gap after"
            raise ValueError(f"tensor {name!r} {what} {last}")
        at, last = end, repr(name)
    if at != size - 8 - length:
        raise ValueError(f"{size - 8 - length - at} bytes follow its last tensor")
    return entries, 8 + length


def write(path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as a safetensors file, which takes the place of an older one once it is complete.

    Raises:
        ValueError: an array of a dtype that the format lacks.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, chunks = 0, []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
        if dtype not in codes:
            raise ValueError(f"{name} has dtype {array.dtype}, which safetensors has no code for.")
        data = array.astype(dtype).tobytes()
        header[name] = {
            "dtype": codes[dtype],
            "shape": list(np.shape(arrays[name])),
            "data_offsets": [at, at + len(data)],
        }
        chunks.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as unfinished, unfinished.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for chunk in chunks:
            stream.write(chunk)
