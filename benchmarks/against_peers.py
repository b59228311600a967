"""jrl against another library, in turn: A B A B, each in its own interpreter, on the same pinned core.

    git clone https://github.com/luchris429/purejaxrl CLONE
    python benchmarks/against_peers.py purejaxrl-ppo --peer-path CLONE --peer-python PYTHON --core 0
    python benchmarks/against_peers.py purejaxrl-dqn --peer-path CLONE --peer-python PYTHON --core 0

The peer is imported from the clone by an interpreter that has what the peer needs (PureJaxRL: gymnax 0.0.9,
distrax, flashbax; a current JAX will do, see ``load_peer``); nothing of it is in this repository. Both sides
train on the same environment with the same network sizes, hyperparameters and number of environment steps.
A repeat is a whole training from a fresh key, compiled beforehand, timed until its results are ready; then
the learned parameters are evaluated greedily, so that speed is not bought with learning. Only ratios within a
pair are to be trusted on a machine that others use. One JSON line a comparison, raw repeats included, is
appended to ``benchmarks/results/peers-<peer>.jsonl``.

This file is also what the two interpreters run (``--worker``): the peer's may lack jrl and be older, so that
everything of jrl is imported where it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EVAL_EPISODES = 128
EVAL_SEED = 10_000


def purejaxrl_ppo(work: dict[str, Any]) -> dict[str, Any]:
    return {
        "LR": work["learning_rate"],
        "NUM_ENVS": work["num_envs"],
        "NUM_STEPS": work["unroll_length"],
        "TOTAL_TIMESTEPS": work["env_steps"],
        "UPDATE_EPOCHS": work["num_epochs"],
        "NUM_MINIBATCHES": work["num_minibatches"],
        "GAMMA": 0.99,
        "GAE_LAMBDA": 0.95,
        "CLIP_EPS": 0.2,
        "ENT_COEF": 0.01,
        "VF_COEF": 0.5,
        "MAX_GRAD_NORM": 0.5,
        "ACTIVATION": "tanh",
        "ENV_NAME": work["env"],
        "ANNEAL_LR": True,
        "DEBUG": False,
    }


def purejaxrl_dqn(work: dict[str, Any]) -> dict[str, Any]:
    return {
        "NUM_ENVS": work["num_envs"],
        "BUFFER_SIZE": work["capacity"],
        "BUFFER_BATCH_SIZE": work["batch_size"],
        "TOTAL_TIMESTEPS": work["env_steps"],
        "EPSILON_START": 1.0,
        "EPSILON_FINISH": 0.05,
        "EPSILON_ANNEAL_TIME": work["env_steps"] / 2,
        "TARGET_UPDATE_INTERVAL": work["target_period"],
        "LR": work["learning_rate"],
        "LEARNING_STARTS": work["warmup_env_steps"],
        "TRAINING_INTERVAL": work["num_envs"],  # one update an iteration, as jrl does
        "LR_LINEAR_DECAY": False,
        "GAMMA": 0.99,
        "TAU": 1.0,
        "ENV_NAME": work["env"],
        "WANDB_MODE": "disabled",
    }


@dataclasses.dataclass(frozen=True)
class Peer:
    """The algorithm of jrl it is compared with, the file in its clone that has ``make_train``, its settings."""

    algorithm: str
    file: str
    config: Callable[[dict[str, Any]], dict[str, Any]]


PEERS = {
    "purejaxrl-ppo": Peer("ppo", "purejaxrl/ppo.py", purejaxrl_ppo),
    "purejaxrl-dqn": Peer("dqn", "purejaxrl/dqn.py", purejaxrl_dqn),
}


# ------------------------------------------------------------------------------------- the peer's interpreter

# Imported at the top of the peers' files, not used by what is measured.
OPTIONAL = ("brax", "navix", "wandb")


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, after all other finders, optional modules that are not installed: empty ones."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in OPTIONAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def load_peer(file: Path) -> Any:
    """Import the peer's file as it is, under a JAX newer than the one it was written for."""
    import jax

    # Removed from jax's top level since; the same function.
    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree_util.tree_map
    sys.meta_path.append(_StubFinder())
    sys.path.insert(0, str(file.parent))  # its siblings are imported by bare name
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class PeerTraining:
    """A peer's whole training, compiled; only ``make_train(config)`` of it is called."""

    def __init__(self, job: dict[str, Any]) -> None:
        import jax

        self.work = job["work"]
        train = load_peer(Path(job["file"])).make_train(PEERS[job["peer"]].config(self.work))
        began = time.perf_counter()
        lowered = jax.jit(train).lower(jax.random.PRNGKey(0))
        self.lower_seconds = time.perf_counter() - began
        began = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.evaluate = jax.jit(evaluate, static_argnums=(0, 3))

    def repeat(self, seed: int) -> dict[str, float]:
        import jax

        key = jax.random.PRNGKey(seed)
        began, cpu_began = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(self.compiled(key))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        learned = out["runner_state"][0]
        eval_key = jax.random.PRNGKey(EVAL_SEED + seed)
        returns = self.evaluate(learned.apply_fn, learned.params, eval_key, self.work["env"])
        return {
            "seed": seed,
            "seconds": round(seconds, 5),
            "cpu_seconds": round(cpu_seconds, 5),
            "env_steps_per_second": round(self.work["env_steps"] / seconds, 1),
            "episode_return": round(float(returns.mean()), 2),
        }


def evaluate(apply: Callable[..., Any], params: Any, key: Any, env_id: str) -> Any:
    """Return the returns of one greedy episode in each of EVAL_EPISODES gymnax environments.

    All that start count, so that short episodes have no advantage.
    """
    import gymnax
    import jax
    import jax.numpy as jnp

    env, env_params = gymnax.make(env_id)
    reset_key, step_key = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(
        jax.random.split(reset_key, EVAL_EPISODES), env_params
    )

    def body(carry: tuple, key: Any) -> tuple:
        env_state, obs, total, going = carry
        head = apply(params, obs)
        head = head[0] if isinstance(head, tuple) else head
        action = jnp.argmax(getattr(head, "logits", head), axis=-1)
        keys = jax.random.split(key, EVAL_EPISODES)
        # done (gymnax 0.0.9) or terminated, truncated (1.x) stand between the reward and the info.
        obs, env_state, reward, *flags, _ = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            keys, env_state, action, env_params
        )
        total = total + jnp.where(going, reward, 0.0)
        for flag in flags:
            going = going & ~flag.astype(bool)
        return (env_state, obs, total, going), None

    start = (env_state, obs, jnp.zeros(EVAL_EPISODES), jnp.ones(EVAL_EPISODES, bool))
    keys = jax.random.split(step_key, env_params.max_steps_in_episode)
    (_, _, total, _), _ = jax.lax.scan(body, start, keys)
    return total


def serve(job: dict[str, Any]) -> None:
    """Be a worker: compile, say so, then run one repeat for each seed read, until the input ends."""
    # The peer may print: the pipe gets a descriptor of its own, and stdout becomes stderr.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    here = str(Path(__file__).parent)
    sys.path[:] = [folder for folder in sys.path if folder not in ("", here)]

    def send(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    if job["peer"] is None:
        sys.path.append(here)
        import throughput

        training: Any = throughput.Training(throughput.Work(**job["work"]))
        where = throughput.machine()
    else:
        training = PeerTraining(job)
        where = peer_versions()
    send(
        {
            "lower_seconds": round(training.lower_seconds, 3),
            "compile_seconds": round(training.compile_seconds, 3),
            "machine": where,
        }
    )
    for line in sys.stdin:
        send(training.repeat(json.loads(line)["seed"]))


def peer_versions() -> dict[str, Any]:
    import importlib.metadata as metadata
    import platform

    import jax

    found: dict[str, Any] = {"python": platform.python_version(), "device": str(jax.devices()[0])}
    for name in ("jax", "jaxlib", "flax", "optax", "gymnax", "distrax", "flashbax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if hasattr(os, "sched_getaffinity"):
        found["cores"] = sorted(os.sched_getaffinity(0))
    found["NPROC"] = os.environ.get("NPROC")
    found["XLA_FLAGS"] = os.environ.get("XLA_FLAGS")
    return found


# ---------------------------------------------------------------------------------------------- the comparison


class Worker:
    """One side's interpreter, kept alive; it computes only between a request and its answer."""

    def __init__(self, name: str, python: str, job: dict[str, Any], environ: dict[str, str], limit: float):
        self.name, self.limit = name, limit
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
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


def compare(
    name: str, work: Any, peer_path: Path, peer_python: str, pairs: int, limit: float
) -> dict[str, Any]:
    """Run ``pairs`` pairs after one that warms up; return the record."""
    import throughput

    peer = PEERS[name]
    file = peer_path.resolve() / peer.file
    if not file.exists():
        raise SystemExit(f"--peer-path {peer_path}: it has no {peer.file}; pass a clone of the peer.")
    # No cache: compile seconds are those of a first start. Flags, cores and pool size are inherited by both.
    environ = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    plain = dataclasses.asdict(work)
    jobs = {
        "jrl": (sys.executable, {"peer": None, "work": plain}, environ),
        "peer": (
            peer_python,
            {"peer": name, "file": str(file), "work": {**plain, "target_period": work.target_period}},
            # jrl's own path must not decide which packages the peer gets.
            {key: value for key, value in environ.items() if key != "PYTHONPATH"},
        ),
    }
    record = throughput.header(f"peers-{name}", work)
    workers: dict[str, Worker] = {}
    try:
        for side, (python, job, variables) in jobs.items():  # one after the other: both on the same core
            workers[side] = Worker(side if side == "jrl" else name, python, job, variables, limit)
        rows = []
        for pair in range(pairs + 1):
            row = {side: worker.repeat(pair) for side, worker in workers.items()}
            if pair == 0:  # first calls allocate, and page in what others pushed out
                continue
            row["ratio"] = round(row["peer"]["seconds"] / row["jrl"]["seconds"], 4)
            row["cpu_ratio"] = round(row["peer"]["cpu_seconds"] / row["jrl"]["cpu_seconds"], 4)
            rows.append(row)
            rates = ", ".join(f"{side} {row[side]['env_steps_per_second']:,.0f}/s" for side in workers)
            returns = ", ".join(f"{row[side]['episode_return']:.0f}" for side in workers)
            print(f"pair {pair}: {rates}, ratio {row['ratio']:.2f}, returns {returns}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return {
        **record,
        "peer": name,
        "peer_commit": throughput.commit(peer_path),
        "ratio": throughput.spread([row["ratio"] for row in rows]),
        "cpu_ratio": throughput.spread([row["cpu_ratio"] for row in rows]),
        **{
            side: {
                "env_steps_per_second": throughput.spread(
                    [row[side]["env_steps_per_second"] for row in rows]
                ),
                "episode_return": throughput.spread([row[side]["episode_return"] for row in rows]),
                **worker.ready,
            }
            for side, worker in workers.items()
        },
        "compile_ratio": round(_compile(workers["peer"]) / _compile(workers["jrl"]), 3),
        "load_after": throughput.load(),
        "pairs": rows,
    }


def _compile(worker: Worker) -> float:
    return worker.ready["lower_seconds"] + worker.ready["compile_seconds"]


def main(argv: Sequence[str] | None = None) -> None:
    import throughput

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=tuple(PEERS))
    parser.add_argument("--peer-path", type=Path, required=True, help="a clone of the peer")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that can import it")
    throughput.add_work_flags(parser)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--core", type=throughput.cores, default=[0], help="core(s) for both, as 0 or 0,1")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a worker may take for an answer")
    parser.add_argument("--out", type=Path, default=throughput.RESULTS)
    arguments = parser.parse_args(argv)
    work = throughput.work_from(arguments, PEERS[arguments.peer].algorithm)
    throughput.pin(arguments.core)
    record = compare(
        arguments.peer, work, arguments.peer_path, arguments.peer_python, arguments.pairs, arguments.limit
    )
    throughput.append(arguments.out / f"peers-{arguments.peer}.jsonl", record)
    print(
        f"jrl / {arguments.peer}: {record['ratio']['median']:.2f} × its speed (min {record['ratio']['min']:.2f}, "
        f"max {record['ratio']['max']:.2f}), {record['compile_ratio']:.2f} × faster to compile, returns "
        f"{record['jrl']['episode_return']['median']:.0f} and {record['peer']['episode_return']['median']:.0f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(json.loads(sys.argv[2]))
    else:
        main()
