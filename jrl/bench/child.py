"""What a fresh process measures of itself, as one JSON line: ``python -m jrl.bench.child JOB``.

``compile``: seconds of importing (the environment included), lowering and compiling. ``memory``: what XLA's
analysis says the training program needs, and the most that the process and the device held.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # before jax is imported
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SIZES = ("argument", "output", "alias", "temp", "generated_code")


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job: ``what``, ``algo``, ``env``, ``config``, ``members``."""
    import jax
    import jax.numpy as jnp

    from jrl import configuration
    from jrl.bench import measure, recording
    from jrl.bench.work import nbytes

    module = configuration.load(job["algo"])
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in job["config"].items()}
    setup = configuration.build(job["algo"], job["env"], config=module.Config(**config))
    jax.devices()
    import_seconds = time.perf_counter() - BEGAN
    imported = peak_rss()
    algo, key = setup.algo, jax.random.key(0)
    if job["members"] > 1:
        algo = measure.side_by_side(algo, job["members"])
    state = jax.eval_shape(algo.init, key, setup.hparams)
    metrics = jax.eval_shape(algo.step, state, setup.hparams)[1]
    began = time.perf_counter()
    lowered = [
        jax.jit(algo.init).lower(key, setup.hparams),
        measure.trace(measure.one_step(algo), (state, metrics), setup.hparams).lower(),
    ]
    lower_seconds = time.perf_counter() - began
    began = time.perf_counter()
    init, run = (one.compile() for one in lowered)
    compile_seconds = time.perf_counter() - began
    if job["what"] == "compile":
        return {
            "import_seconds": round(import_seconds, 3),
            "lower_seconds": round(lower_seconds, 3),
            "compile_seconds": round(compile_seconds, 3),
            "machine": recording.machine(),
        }
    compiled = peak_rss()
    reset_peak_rss()
    start = (init(key, setup.hparams), measure.zeros(metrics))
    jax.block_until_ready(run(start, setup.hparams, jnp.int32(2)))
    analysis = run.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "unit": "bytes",
        "program": {name: getattr(analysis, f"{name}_size_in_bytes") for name in SIZES},
        "state_bytes": nbytes(state),
        # Compiling takes memory too, so the peak while running is told apart where the system can.
        "peak_rss": {"imported": imported, "compiled": compiled, "running": peak_rss()},
        "device": {name: stats[name] for name in ("peak_bytes_in_use", "bytes_limit") if name in stats},
        "machine": recording.machine(),
    }


def peak_rss() -> int:
    """Return the most memory this process has held, in bytes."""
    if STATUS.exists():  # getrusage would count what the parent held when this process was forked
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak_rss() -> None:
    """Begin to measure the peak anew, where the system allows it."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
