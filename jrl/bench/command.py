"""``jrl bench WHAT ...``: parse the flags, measure, write each record as soon as it is there, show them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from jrl import _ALGORITHMS, configuration, flags
from jrl.bench import measure, recording, report
from jrl.bench.options import Options
from jrl.records import RunError

WHAT = {
    "env": "environment steps with random actions, resets included",
    "policy": "the network forward and drawing actions",
    "train": "whole calls of algo.step",
    "sweep": "whole calls of algo.step, seeds side by side",
    "update": "gradient steps alone",
    "replay": "adding to and sampling from a replay, over its capacity",
    "memory": "bytes the training program and the process take",
    "compile": "seconds of lowering and compiling, cold and cached",
    "all": "all of these",
}


def main(args: Sequence[str]) -> int:
    """Run ``jrl bench WHAT ...`` and return the exit code; ``args`` begin with what to measure.

    Raises:
        ValueError: a flag, an environment or a setting is wrong.
    """
    whats = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    for what in whats:
        if what not in WHAT:
            raise RunError(
                f"there is no benchmark {what!r}. {configuration.nearest(what, WHAT)}One of: {', '.join(WHAT)}."
            )
    options, settings = parse(whats, args[len(whats) :])
    kinds = measure.KINDS if "all" in whats else [kind for kind in measure.KINDS if kind in whats]
    if options.plot is not None and not report.can_plot(kinds):
        raise RunError(
            f"--plot {options.plot}: nothing of {', '.join(kinds)} scales; leave it out, or measure "
            f"{', '.join([*report.SCALING, 'sweep', 'replay'])} or all."
        )
    module = configuration.load(options.algo)
    setups = [
        configuration.build(options.algo, options.env, config=module.Config(num_envs=num_envs, **settings))
        for num_envs in options.num_envs or (module.Config().num_envs,)
    ]
    records = []
    try:
        for kind in kinds:
            for record in measure.records(kind, setups, options):
                records.append(record)
                if options.json is not None:
                    recording.append(options.json, record)
                if sys.stderr.isatty():
                    print("  ".join(part for part in report.row(record) if part), file=sys.stderr, flush=True)
    finally:  # what was measured before a failure is shown too
        if records:
            report.table(records)
        if options.plot is not None and report.can_plot([record["benchmark"] for record in records]):
            report.plot(records, options.plot)
            print(options.plot)
    return 0


def parse(whats: Sequence[str], args: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """Parse the flags; those of the algorithm's ``Config`` (but ``num_envs``) come back as a dictionary."""
    algorithm = configuration.load(_algorithm(args))
    bench, config = flags.parse_groups(
        f"jrl bench {' '.join(whats)}",
        f"Measure {'; '.join(WHAT[what] for what in whats)}.",
        {"bench": flags.flags(Options), "config": flags.flags(algorithm.Config, skip=("num_envs",))},
        args,
    )
    return Options(**bench), config


def _algorithm(args: Sequence[str]) -> str:
    """Find the algorithm before the flags are parsed: it decides which there are."""
    for arg, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, given = arg.partition("=")
        if name == "--algo" and (given if equals else value) in _ALGORITHMS:
            return given if equals else value
    return Options.algo
