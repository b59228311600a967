"""One sweep on its way: compiled, started, trained chunk by chunk and evaluated."""

from __future__ import annotations

import dataclasses
import datetime
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl import checkpoint, doctor, loggers, memory, progress, records, statistics, xla
from jrl.configuration import Setup
from jrl.interrupt import StopRequest, wait
from jrl.ops import counter
from jrl.records import RunError, RunWarning
from jrl.sweep import batching, outcome, planning, processes, program, rounds, storing
from jrl.sweep.choosing import Members, moving
from jrl.sweep.outcome import Finished
from jrl.sweep.planning import Plan
from jrl.sweep.results import Results
from jrl.sweep.search import PBT, Halving
from jrl.sweep.storing import Position
from jrl.types import PyTree


class Session:
    """One sweep on its way: what its parts share, and the order in which they happen."""

    def __init__(
        self,
        setup: Setup,
        who: Members,
        record: Mapping[str, Any],
        folder: Path | None,
        devices: Sequence[jax.Device] | None,
        progress_kind: str | None,
        figures: bool,
    ) -> None:
        # jitted here: then each is traced once, however often its shapes are asked for
        algo = setup.algo._replace(init=jax.jit(setup.algo.init), step=jax.jit(setup.algo.step))
        self.setup = dataclasses.replace(setup, algo=algo)
        self.who, self.record, self.folder = who, record, folder
        self.devices = planning.choose_devices(devices)
        self.width = planning.choose_width(record["width"], self.devices)
        self.show = progress.choose(progress_kind if processes.is_first() else "none")
        self.figures = figures
        self.num = len(who.seeds)
        state = jax.eval_shape(algo.init, jax.random.key(0), setup.hparams)
        metrics = jax.eval_shape(algo.step, state, setup.hparams)[1]
        if wrong := [name for name, metric in metrics.items() if metric.shape != ()]:
            raise RunError(f"metrics {', '.join(wrong)} are no scalars: algo.step must return shape ().")
        self.state_shape = state
        self.latest: dict[str, np.ndarray] = {}  # metrics of each member in its last chunk
        self.shown: float | None = None  # the best return of the last chunk in which an episode ended
        on_cpu = self.devices[0].platform == "cpu"
        if on_cpu and self.width != 1 and (texts := xla.diagnose()):  # members one by one cannot hang
            keys = jax.random.split(jax.random.key(0), 2)
            both = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), setup.hparams)
            if batching.factorizes_batches(jax.vmap(algo.init), keys, both):
                warnings.warn("\n".join(texts), RunWarning, stacklevel=4)

    def compile(self) -> None:
        """Plan the memory and compile the training."""
        chunk = self.record["chunk"]
        if chunk is None:
            # Of one that goes on, what fitted when it began: where members are follows from it.
            chunk = storing.held_before(self.folder)
        self.plan_, self.layout, self.train_chunk = planning.compile_for(
            self.setup,
            self.num,
            self.record["env_steps"],
            self.record["chunk_length"],
            width=self.width,
            devices=self.devices,
            chunk=chunk,
            moving=bool(self.record.get("halving") or self.record.get("pbt")),
        )
        self.init: Callable[..., Any] | None = None  # compiled where members start
        self.play: Callable[..., program.Evaluation] | None = None  # and where they end
        self.movers: dict[tuple[Any, ...], Callable[..., jax.Array]] = {}  # by shape and dtype of a leaf
        self.draw: Callable[..., Any] | None = None  # of a population's rounds
        if self.folder is not None:
            checkpoint.load_library()
        # From here on: the plan is of what the training takes once it is compiled.
        self.watch = memory.Watch()

    def start(self, who: np.ndarray) -> Any:
        """Initialise the members ``who``, and learn how many steps their warm-up took."""
        arguments = self.spread((self.who.seeds.astype(np.uint32), self.who.hparams), who)
        if self.init is None:  # by itself, so that the memory of compiling is none of the training's
            with self.watch.outside():
                init: Any = program.init(self.setup.algo, self.layout.mesh, self.layout.width)
                self.init = init.lower(*arguments).compile()
        states = self.init(*arguments)
        self.warmup = 0
        if hasattr(states, "env_steps"):
            self.warmup = counter.to_int(states.env_steps.addressable_shards[0].data[0])
        per_step = self.setup.algo.env_steps_per_step
        self.total = -(-(self.record["env_steps"] - self.warmup) // per_step)
        if self.total < 1:
            raise RunError(
                f"env_steps={self.record['env_steps']}: the warm-up alone takes {self.warmup} environment steps. "
                "Training starts after it; pass more env_steps, or a Config with a shorter warm-up."
            )
        return states

    def spread(self, tree: PyTree, who: np.ndarray) -> PyTree:
        """Put the members ``who`` of leaves ``[M, ...]`` into the devices' slots."""
        return self.layout.spread(jax.tree.map(lambda leaf: np.asarray(leaf)[who], tree))

    def plan(self, measure: bool) -> Plan:
        """Return the plan; where asked for, with the speed of a few steps."""
        self.compile()
        if not measure:
            return self.plan_
        who = np.arange(min(self.plan_.chunk, self.num))
        states = self.start(who)
        failed_at, hparams = (
            self.spread(np.full(self.num, program.RUNNING, np.int32), who),
            self.spread(self.who.hparams, who),
        )
        num_steps, seconds = 1, 0.0
        while True:
            began = time.perf_counter()
            (states, failed_at), _ = jax.block_until_ready(
                self.train_chunk(
                    states, failed_at, hparams, *_numbers(0, num_steps, self.num_groups(len(who)))
                )
            )
            seconds = time.perf_counter() - began
            if seconds > 1.0 or num_steps >= self.record["chunk_length"]:
                break
            num_steps = min(2 * num_steps, self.record["chunk_length"])
        rate = len(who) * num_steps * self.setup.algo.env_steps_per_step / seconds
        return dataclasses.replace(self.plan_, env_steps_per_second=rate)

    def num_groups(self, num_active: int) -> int:
        """Return how many groups of a device hold the first ``num_active`` members."""
        width = self.layout.width or self.layout.per_device
        on_a_device = -(-num_active // self.layout.mesh.size)
        return -(-on_a_device // width)

    def run(self, search: Halving | PBT | None) -> Finished:
        """Train all chunks of members, from the newest checkpoint on if there is one; evaluate; write it all."""
        began = time.perf_counter()
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest(self.show.message))
            name = f"{self.setup.algorithm} on {self.setup.env.name}"
            self.show.message(f"sweep of {self.num} members, {name}: compiling for {doctor.device()} ...")
            self.compile()
            if search is not None and self.plan_.num_chunks > 1:
                raise RunError(
                    f"{type(search).__name__.lower()}: {self.num} members do not fit into memory at once, only "
                    f"{self.plan_.chunk}, and their returns are compared with one another. Sweep "
                    "fewer, or set chunk (--chunk) yourself."
                )
            self.show.message(str(self.plan_))
            with self.watch.during("training"):
                states = self.train(search, stop, stack)
        complete = not stop.requested or bool(self.ended.all())
        seconds, trained = self.seconds, self.env_steps_done > self.env_steps_before
        table = outcome.table(self)
        best = None if not complete else outcome.best_setting(table)
        if complete and (self.results.failed_at >= 0).all():
            self.show.message(f"all {self.num} members were frozen: there is no best setting.")
        summary = {
            "algorithm": self.setup.algorithm,
            "environment": self.setup.env.name,
            "members": self.num,
            "frozen": int((self.results.failed_at >= 0).sum()),
            "stopped": int((self.results.stopped_at >= 0).sum()),
            "interrupted": not complete,
            "best": best,
            "env_steps": self.env_steps_done,
            "train_seconds": seconds,
            "env_steps_per_second": self.env_steps_done / seconds if seconds else 0.0,
            "total_seconds": time.perf_counter() - began,
            "plan": dataclasses.asdict(self.plan_),
            # by how much the process grew at the highest once it had compiled: what the plan speaks of. One that found
            # all members trained has only read them: 0
            "training_bytes": self.watch.peaks.get("training", 0) if trained else 0,
            "evaluating_bytes": self.watch.peaks.get("evaluating", 0),
            "saving_bytes": self.watch.peaks.get("saving", 0),
            "device": doctor.device(),
            "precision": doctor.precision(),
            "versions": doctor.versions(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if self.folder is not None and processes.is_first():
            table.to_csv(self.folder / records.TABLE)
            records.write_json(self.folder / records.SUMMARY, records.plain(summary))
            if self.figures and complete:
                from jrl import sweep_plots

                sweep_plots.figures(table, self.folder)
        return Finished(table, summary, self.plan_, self.folder, not complete, states)

    # ----------------------------------------------------------------------------------------- training

    def train(self, search: Halving | PBT | None, stop: StopRequest, stack: ExitStack) -> Any:
        """Train and evaluate each chunk of members in turn; return the states of the last one, in their slots."""
        self.seconds, self.env_steps_done, self.saved_at = 0.0, 0, time.perf_counter()
        held = self.plan_.chunk
        begin = storing.restore(self)
        if begin is None:
            states = self.start(np.arange(min(held, self.num)))
            self.results = self.no_results()
            self.ended = np.zeros(self.num, bool)
            begin = Position(0, 0, np.arange(min(held, self.num)), states)
        self.env_steps_before = self.env_steps_done
        sink = None
        if self.folder is not None and processes.is_first():
            records.drop_metrics_after(self.folder, chunk=begin.chunk, step=begin.step)
            sink = loggers.JsonlLogger(self.folder / records.METRICS)
            stack.callback(sink.close)
        work = self.num * self.total * self.setup.algo.env_steps_per_step
        self.show.start(self.env_steps_done, work)
        stack.callback(self.show.stop)
        first = begin.chunk
        for chunk in range(first, self.plan_.num_chunks):
            if chunk > first:
                # Memory holds one chunk of members, not the next one's start beside it. Said, for what has saved
                # them may hold them a while longer.
                jax.tree.map(lambda leaf: leaf.delete(), states)
                order = np.arange(chunk * held, min((chunk + 1) * held, self.num))
                begin = Position(chunk, 0, order, self.start(order))
            states = self.train_one_chunk(begin, search, stop, sink)
            if stop.requested:
                break
        stop.announce()
        return states

    def train_one_chunk(
        self,
        begin: Position,
        search: Halving | PBT | None,
        stop: StopRequest,
        sink: loggers.Logger | None,
    ) -> Any:
        """Train and evaluate the members that are held in memory together."""
        chunk, step, order, states = begin
        length = self.record["chunk_length"]
        rungs = rounds.rungs(self, search)
        active = self.num_active(order)
        failed_at, hparams = self.placed(order)
        pending: list[tuple[int, int, np.ndarray, program.Report]] = []
        last = time.perf_counter()

        def fetch() -> None:
            nonlocal last
            before, num_steps, whom, report = pending.pop(0)
            wait(report, stop)
            now = time.perf_counter()
            self.seconds += now - last
            taken = self.note(before, num_steps, whom, report)
            self.watch.look()
            self.env_steps_done += taken
            row = self.row(before + num_steps, chunk, taken / max(now - last, 1e-9))
            last = now
            if sink is not None:
                sink.write(self.env_steps_done, {k: v for k, v in row.items() if k != "text"})
            self.show.update(self.env_steps_done, row)

        while step < self.total:
            num_steps = min(length, self.total - step)
            (states, failed_at), report = self.train_chunk(
                states, failed_at, hparams, *_numbers(step, num_steps, self.num_groups(active))
            )
            pending.append((step, num_steps, order[:active], report))
            step += num_steps
            at_rung = step in rungs
            if not processes.alone():
                wait(report, stop)
            stopping, due = processes.any_of(stop.requested, storing.due(self))
            while len(pending) > (0 if at_rung or due or stopping or step >= self.total else 1):
                fetch()
            if at_rung:
                if isinstance(search, PBT):
                    states = rounds.replace_the_worst(self, search, states, step)
                else:
                    order, states = rounds.stop_the_worst(self, order, states, step, rungs[step])
                active = self.num_active(order)
                failed_at, hparams = self.placed(order)
            if (due or stopping) and step < self.total:
                storing.save(self, chunk, step, order, states)
                last = time.perf_counter()
            if stopping:
                stop.requested = True
                break
        if step >= self.total and not stop.requested and not self.ended[order].all():
            if self.record["eval_episodes"]:
                self.evaluate(order, states, hparams)
            self.ended[order] = True
            storing.save(self, chunk, step, order, states)
        return states

    def no_results(self) -> Results:
        """Return that nothing is known of any member."""
        num_rows = -(-self.total // self.record["chunk_length"])
        return Results.empty(num_rows, self.num, moving(self.who, self.record))

    def num_active(self, order: np.ndarray) -> int:
        """Return how many members, the first ones of ``order``, no search has stopped."""
        return int((self.results.stopped_at[order] < 0).sum())

    def placed(self, order: np.ndarray) -> tuple[jax.Array, Any]:
        """Return ``failed_at`` and the hyperparameters of the members ``order``, in the devices' slots."""
        failed_at = self.results.failed_at[order]
        failed_at = np.where(self.results.stopped_at[order] >= 0, program.STOPPED, failed_at).astype(np.int32)
        slots = np.full(self.layout.slots, program.STOPPED, np.int32)  # a free slot's too
        slots[self.layout.homes(len(order))] = failed_at
        return self.layout.place(slots), self.spread(self.who.hparams, order)

    def note(self, before: int, num_steps: int, whom: np.ndarray, report: program.Report) -> int:
        """Enter a chunk's report on the members ``whom`` into the results; return the environment steps it took."""
        row, per_step = before // self.record["chunk_length"], self.setup.algo.env_steps_per_step
        home = self.layout.homes(len(whom))
        report = jax.tree.map(lambda leaf: leaf[home], processes.fetch(report))
        was_running = self.results.failed_at[whom] == program.RUNNING
        running = report.failed_at == program.RUNNING
        ended = running & (report.summary["num_episodes"] > 0)
        self.results.history[row, whom[ended]] = report.summary["episode_return"][ended]
        for i in np.flatnonzero(was_running & ~running):
            self.results.failed_at[whom[i]] = report.failed_at[i]
            self.results.reasons[int(whom[i])] = _reason(report, int(i), self.latest, int(whom[i]))
        for name, values in report.summary.items():
            self.latest.setdefault(name, np.full(self.num, np.nan))[whom] = values
        if not running.any():
            self.show.message(f"all members in progress have failed by env step {before * per_step:,}")
        return int(was_running.sum()) * num_steps * per_step

    def row(self, step: int, chunk: int, rate: float) -> dict[str, Any]:
        """Return a line of ``metrics.jsonl``."""
        newest = self.results.history[(step - 1) // self.record["chunk_length"]]
        newest = newest[np.isfinite(newest)]
        done, failed = int(self.ended.sum()), int((self.results.failed_at >= 0).sum())
        best = None if not newest.size else float(f"{newest.max():.7g}")
        self.shown = self.shown if best is None else best
        return {
            "step": step,
            "chunk": chunk,
            "seconds": round(self.seconds, 4),
            "env_steps_per_second": round(rate, 1),
            "members_done": done,
            "members_frozen": failed,
            "episode_return": best,
            "episode_return_iqm": (
                None if not newest.size else float(f"{statistics.interquartile_mean(newest):.7g}")
            ),
            "text": f"{done}/{self.num} done, best {'-' if self.shown is None else f'{self.shown:.4g}'}"
            + (f", {failed} frozen" if failed else ""),
        }

    def evaluate(self, order: np.ndarray, states: Any, hparams: Any) -> None:
        """Evaluate the members ``order`` greedily."""
        self.show.message(
            f"evaluating {len(order)} members over {self.record['eval_episodes']} episodes each ..."
        )
        arguments = states, self.spread(self.who.seeds.astype(np.uint32), order), hparams
        if self.play is None:
            with self.watch.outside():
                play: Any = program.evaluate(
                    self.setup.algo,
                    self.setup.env,
                    self.layout.mesh,
                    self.layout.width,
                    self.record["eval_episodes"],
                )
                self.play = play.lower(*arguments).compile()
        with self.watch.during("evaluating"):
            evaluation = processes.fetch(self.play(*arguments))
        home = self.layout.homes(len(order))
        for name, values in evaluation._asdict().items():
            self.results.evaluation[name][order] = values[home]


def _numbers(*values: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.int32(value) for value in values)


def _reason(report: program.Report, i: int, latest: Mapping[str, np.ndarray], member: int) -> str:
    """Say what was not finite, and what it was before: one step, or on average in the chunk before."""
    parts = []
    for name, values in sorted(report.at_failure.items(), key=lambda item: "loss" not in item[0]):
        if np.isfinite(values[i]):
            continue
        before = report.before_failure[name][i]
        if not np.isfinite(before) and name in latest:
            before = latest[name][member]
        parts.append(f"{name} {values[i]:g}" + (f" after {before:.4g}" if np.isfinite(before) else ""))
    return ", ".join(parts[:3]) or "a parameter is not finite"
