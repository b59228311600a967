"""What the command and its two interpreters say to each other: one JSON line a message, over pipes.

The interpreter says once that it is ready (compile seconds, what the program needs of memory, versions), then
answers each seed it is sent with a repeat, until its input ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import select
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    *("jax", "jaxlib", "flax", "optax", "gymnax", "distrax", "flashbax", "rejax", "stoa-env", "gymnasium"),
    *("stable-baselines3", "sbx-rl", "torch"),
)


@dataclasses.dataclass
class Training:
    """One side's whole training, compiled.

    Attributes:
        prepare: seed -> what ``run`` takes; not timed.
        run: the training; its result is waited for, and timed.
        returns: (result, seed) -> ``episode_return``, the mean of greedy episodes; ``sampled_return``, of
            episodes played as in training (sampled, or ε-greedy); ``training_return``, of the last ones of
            training, None where none ended or none are logged.
        compiled: ``lower_seconds``, ``compile_seconds`` and ``program_bytes`` (see :func:`compile_program`).
    """

    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]
    returns: Callable[[Any, int], dict[str, float | None]]
    compiled: dict[str, Any] = dataclasses.field(default_factory=dict)


# ------------------------------------------------------------------------------------- in either interpreter


def compile_program(jitted: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return the compiled program, and its seconds and bytes."""
    began = time.perf_counter()
    lowered = jitted.lower(*arguments)
    lower_seconds = time.perf_counter() - began
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    parts = {
        name: getattr(memory, f"{name}_size_in_bytes", 0) for name in ("argument", "output", "temp", "alias")
    }
    return compiled, {
        "lower_seconds": round(lower_seconds, 3),
        "compile_seconds": round(compile_seconds, 3),
        # An aliased output lies in its argument.
        "program_bytes": {**parts, "total": sum(parts.values()) - 2 * parts["alias"]},
    }


def serve(job: dict[str, Any]) -> None:
    """Be a side's interpreter: compile, say so, then run one repeat for each seed read."""
    # The library may print: the pipe gets a descriptor of its own, and stdout becomes stderr.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    work = types.SimpleNamespace(**job["work"])
    source = Path(job["source"]) if job["source"] else None
    adapter = importlib.import_module(f"peers.{job['module']}")
    training: Training = adapter.training(job["algorithm"], work, source)
    send({**training.compiled, "machine": where()})
    for line in sys.stdin:
        send(repeat(training, work, json.loads(line)["seed"]))


def repeat(training: Training, work: Any, seed: int) -> dict[str, Any]:
    """Train once; return the time, the memory and the returns.

    Processor time does not count what other processes took of the core, so that it tells a disturbed repeat.
    """
    prepared = training.prepare(seed)
    before = reset_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    result = training.run(prepared)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    peak = _status("VmHWM")
    returns = training.returns(result, seed)
    return {
        "seed": seed,
        "seconds": round(seconds, 5),
        "cpu_seconds": round(cpu_seconds, 5),
        "env_steps_per_second": round(work.env_steps * work.seeds / seconds, 1),
        **{name: None if value is None else round(value, 2) for name, value in returns.items()},
        "resident_bytes": before,
        "peak_bytes": peak,
    }


def reset_peak() -> int | None:
    """Forget the process's peak of resident memory (that of compiling); return what is resident now (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def where() -> dict[str, Any]:
    """Return what a record says about an interpreter."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if "jax" in sys.modules:
        jax = sys.modules["jax"]
        found["device"] = str(jax.devices()[0])
        found["devices"] = len(jax.devices())
        found["matmul_precision"] = str(jax.config.jax_default_matmul_precision or "default")
    found["cpu"] = _cpu()
    found["cores"] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    found["NPROC"] = os.environ.get("NPROC")
    found["XLA_FLAGS"] = os.environ.get("XLA_FLAGS")
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


# --------------------------------------------------------------------------------------------- in the command


@dataclasses.dataclass(frozen=True)
class Job:
    """One side: its interpreter, its environment variables and what :func:`serve` is given."""

    python: str
    environ: Mapping[str, str]
    module: str
    algorithm: str
    work: dict[str, Any]
    source: str | None = None

    def message(self) -> str:
        fields = ("module", "algorithm", "work", "source")
        return json.dumps({name: getattr(self, name) for name in fields})


class Worker:
    """One side's interpreter, kept alive; it computes only between a request and its answer."""

    def __init__(self, name: str, job: Job, limit: float):
        self.name, self.limit = name, limit
        self.process = subprocess.Popen(
            [job.python, str(Path(__file__).with_name("worker.py").resolve()), job.message()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(job.environ),
            text=True,
        )
        try:
            self.ready = self._receive()
        except BaseException:
            self.close()
            raise

    def repeat(self, seed: int) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"seed": seed}) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _receive(self) -> dict[str, Any]:
        # A worker writes whole lines, one an answer, so that what select sees is what readline returns.
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.process.kill()
            self.process.wait()
            raise SystemExit(
                f"{self.name}: no answer within {self.limit:g} s; it was stopped. Raise --limit if it was only slow."
            )
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: it ended with exit status {self.process.wait()}; see above.")
        return json.loads(line)
