"""What a person sees of a run: a bar on a terminal, a few plain lines elsewhere, and a report at the end."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

_NUM_LINES = 15  # lines a run prints where the output is no terminal


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to a stream, by default standard output; nothing where its reader has gone.

    ``jrl train ... | head`` trains to its end: what nobody reads must not cost what was learned.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Send nowhere what a stream without a reader still holds, and all that is written to it from now on."""
    with contextlib.suppress(OSError, ValueError):  # no file of the system: the next line is dropped as well
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def console(width: int | None = None) -> Any:
    """Return a console of rich that falls silent, as :func:`say` does, where rich itself would end the process."""
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            silence(sys.stdout)

        def _check_buffer(self) -> None:
            try:
                super()._check_buffer()
            except BrokenPipeError:  # of releases of rich that know of no on_broken_pipe
                self.on_broken_pipe()

    return Patient(width=width)


class Progress(Protocol):
    """Shown while training runs."""

    def start(self, done: int, total: int) -> None:
        """Begin at ``done`` of ``total`` environment steps."""

    def update(self, env_steps: int, row: Mapping[str, Any]) -> None:
        """Show the metrics of a chunk, a line of ``metrics.jsonl``."""

    def message(self, text: str) -> None:
        """Say something in between."""

    def stop(self) -> None:
        """End; called once, also after an error."""


def choose(kind: str | None) -> Progress:
    """Return the progress display of a name.

    Args:
        kind: ``"bar"``, ``"lines"``, ``"none"``, or None for a bar where standard output is a terminal and
            lines elsewhere.

    Raises:
        ValueError: another name.
    """
    if kind is None:
        kind = "bar" if sys.stdout.isatty() else "lines"
    kinds: dict[str, Callable[[], Progress]] = {"bar": Bar, "lines": Lines, "none": Silent}
    if kind not in kinds:
        raise ValueError(
            f"progress={kind!r}: expected one of {sorted(kinds)}, or None to choose by the output."
        )
    return kinds[kind]()


class Silent:
    """Shows nothing."""

    def start(self, done: int, total: int) -> None:
        """Nothing."""

    def update(self, env_steps: int, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines(Silent):
    """About 15 plain lines over a run, for log files and pipes."""

    def start(self, done: int, total: int) -> None:
        """Remember where the run is, so that the remaining time can be told."""
        self._first, self._total, self._shown = done, total, -1
        self._seconds = 0.0
        self._best: str = ""

    def update(self, env_steps: int, row: Mapping[str, Any]) -> None:
        """Print a line, if it is time for the next one."""
        share = env_steps / max(self._total, 1)
        self._best = _return(row) or self._best
        rate = row["env_steps_per_second"]
        part = int(share * _NUM_LINES)
        if part == self._shown and share < 1:
            return
        self._shown = part
        left = readable_duration(max(self._total - env_steps, 0) / rate) if rate else "?"
        say(
            f"{env_steps:>13,} {_unit(row, 'env steps')} {min(share, 1):>5.0%}   {self._best or 'return -':<18} "
            f"{rate:>12,.0f} {_unit(row, 'steps')}/s   {left} left"
        )

    def message(self, text: str) -> None:
        """Print it."""
        say(text)


class Bar:
    """A progress bar with the time left, the return and the speed."""

    def __init__(self) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[episode_return]}"),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=console(),
        )
        self._task: Any = None
        self._return = ""

    def start(self, done: int, total: int) -> None:
        """Draw the bar."""
        self._task = self._bar.add_task(
            "training", completed=done, total=total, episode_return="return -", speed=""
        )
        self._bar.start()

    def update(self, env_steps: int, row: Mapping[str, Any]) -> None:
        """Redraw it."""
        self._return = _return(row) or self._return
        self._bar.update(
            self._task,
            completed=env_steps,
            episode_return=self._return or "return -",
            speed=f"{row['env_steps_per_second']:,.0f} {_unit(row, 'steps')}/s",
        )

    def message(self, text: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


def _return(row: Mapping[str, Any]) -> str:
    if "text" in row:  # a sweep says more than one return
        return str(row["text"])
    if "validation_loss" in row:  # a language model: what counts is the loss on text it has not seen
        return (
            f"loss {row['loss']:.3f}, validation {row['validation_loss']:.3f}, "
            f"{row['model_flop_utilization']:.0%} of peak"
        )
    value = row.get("episode_return")
    return "" if value is None else f"return {value:.4g}"


def _unit(row: Mapping[str, Any], otherwise: str) -> str:
    return "tokens" if "validation_loss" in row else otherwise


def readable_duration(seconds: float) -> str:
    """Write seconds as in ``1:05`` or ``2:01:05``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def report(summary: Mapping[str, Any], out: Path | None) -> str:
    """Return what a finished or interrupted run says at its end, a few lines of plain text."""
    lines = []
    evaluation = summary.get("evaluation")
    if evaluation:
        lines.append(evaluation_line(evaluation))
    unit = summary.get("unit", "env steps")
    lines.append(
        f"training     {summary['env_steps']:,} {unit} in {readable_duration(summary['train_seconds'])} "
        f"({summary['env_steps_per_second']:,.0f} {unit.removeprefix('env ')}/s), "
        f"after {summary['compile_seconds']:.1f} s of compiling"
    )
    if out is not None:
        lines.append(f"run folder   {out}")
        quoted = shlex.quote(str(out))  # to be pasted into a shell
        if summary["interrupted"]:
            lines.append(f"interrupted  continue with: jrl resume {quoted}")
        else:
            more = "jrl generate {0}   jrl plot {0}" if unit == "tokens" else "jrl eval {0}   jrl plot {0}"
            lines.append(f"more         {more.format(quoted)}   jrl resume {quoted} --env-steps N")
    return "\n".join(lines)


def evaluation_line(evaluation: Mapping[str, Any]) -> str:
    """Return one line on an evaluation."""
    if "validation_loss" in evaluation:
        return (
            f"evaluation   validation loss {evaluation['validation_loss']:.4f} nats a token, perplexity "
            f"{evaluation['perplexity']:.3f}, over {evaluation['num_tokens']:,} tokens"
        )
    how = "greedy" if evaluation["greedy"] else "sampled actions"
    text = (
        f"evaluation   return {evaluation['episode_return_mean']:.4g} "
        f"± {evaluation['episode_return_std']:.3g} (min {evaluation['episode_return_min']:.4g}, "
        f"max {evaluation['episode_return_max']:.4g}) over "
        f"{evaluation['num_episodes']} episodes, {how}"
    )
    if evaluation["num_cut_short"]:
        text += (
            f"\n             {evaluation['num_cut_short']} of them cut short after "
            f"{evaluation['max_steps']:,} steps: their returns are of the part played"
        )
    return text
