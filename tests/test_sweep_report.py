"""What is printed at the end of a sweep, and of several side by side."""

import dataclasses
import math

import numpy as np
import pytest
from rich.console import Console
from sweep_tables import make_table

from jrl import statistics, sweep_report, tables


def printed(renderable):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(renderable, highlight=False)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in "".join(lines)  # nothing is cut
    return lines


def test_the_best_setting_comes_first_with_its_interval():
    table = make_table({"learning_rate": [1e-4, 1e-3, 1e-2]}, seeds=8, frozen=[16, 17])
    title, head, _, *rows, note = printed(sweep_report.render(table))
    assert title == "3 settings, 24 members: final evaluation"
    assert head.split("  ") == ["learning_rate", "seeds", "return, IQM [95 %]", "worst", "frozen"]
    assert [row.split()[0] for row in rows] == ["0.001", "0.01", "0.0001"]
    scores = table.where(learning_rate=1e-3).final_returns
    interval = statistics.bootstrap_interval(statistics.interquartile_mean, scores)
    expected = f"8 {interval.estimate:.0f} [{interval.low:.0f}, {interval.high:.0f}] {scores.min():.0f}"
    assert rows[0].split() == ["0.001", *expected.split()]
    assert rows[1].split()[-1] == "2"  # frozen
    assert note == "2 members frozen, the first at env step 525,000: loss is nan"


@pytest.mark.parametrize(("seeds", "settings"), [(1, 64), (8, 64), (2, 15), (512, 1)])
def test_about_twenty_lines_however_many_members(seeds, settings):
    values = {"learning_rate": list(np.logspace(-5, -1, settings))} if settings > 1 else {}
    table = make_table(values, seeds=seeds, points=3)
    lines = printed(sweep_report.render(table))
    assert len(lines) <= 20
    if settings > 1:
        assert lines[-1] in (
            f"... and {settings - 14} more settings, all in table.csv", "... and 1 more setting, all in table.csv"
        )  # fmt: skip
    assert ("[" in lines[3]) == (seeds > 1)  # one seed has no spread


def test_long_names_are_broken_and_many_swept_values_share_a_column():
    long = {"env.max_steps_in_episode": [100, 200], "learning_rate": [1e-4, 1e-3]}
    lines = printed(sweep_report.render(make_table(long, seeds=4, points=3)))
    assert "env.max_steps_in_" in lines[1]
    assert "episode" in lines[2]
    many = long | {f"coefficient_{i}": [0.123 + i] for i in range(4)}
    lines = printed(sweep_report.render(make_table(many, seeds=2, points=3, frozen=[0, 1])))
    assert len(lines) <= 21
    assert lines[1].startswith("setting ")
    assert "coefficient_3=3.12" in " ".join(lines)


def test_settings_without_any_return_come_last():
    table = make_table({"a": [1.0, 2.0]}, seeds=2, frozen=[2, 3], points=3)
    *_, last, note = printed(sweep_report.render(table))
    assert last.split() == ["2", "2", "–", "–", "2"]
    assert note.startswith("2 members frozen")
    columns = table.columns | {"frozen_why": [None, None, "loss [bold] is nan " * 9, None]}
    noted = printed(sweep_report.render(dataclasses.replace(table, columns=columns)))[-1]
    assert "[bold]" in noted  # the reason is text, not markup
    assert noted.endswith(" ...")


def test_tables_side_by_side():
    first, second = make_table(seeds=6, frozen=[2]), make_table(seeds=9, seed=4)
    lines = printed(sweep_report.compare([first, second], ["ppo", "dqn"]))
    text = "\n".join(lines)
    scores = [t.final_returns[np.isfinite(t.final_returns)] for t in (first, second)]
    target = max(s.max() for s in scores)
    for words in ("IQM", "median", "mean", f"gap to {target:.0f}", "6 members", "1 no return", "better than"):
        assert words in text
    ppo = next(line for line in lines if line.startswith("ppo"))
    assert ppo.split()[1:] == [
        *(
            tables.number(f(scores[0]))
            for f in (statistics.interquartile_mean, statistics.median, statistics.mean)
        ),
        tables.number(statistics.optimality_gap(scores[0], target)),
        "–",
    ]
    dqn = next(line for line in lines if line.startswith("dqn"))
    better = statistics.bootstrap_interval(statistics.probability_of_improvement, scores[1], scores[0])
    assert dqn.split()[-2:] == [tables.number(100 * better.estimate), "%"]
    below = lines[lines.index(dqn) + 1]
    assert below.endswith(f"[{tables.number(100 * better.low)}, {tables.number(100 * better.high)}]")


def test_wide_numbers_break_their_intervals_and_single_runs_have_none():
    wide = make_table(seeds=5, best=-12345.6)
    lines = printed(
        sweep_report.compare([make_table(seeds=1), wide], ["a-very-long-folder-name-of-a-run", "b"])
    )
    assert "[" not in next(line for line in lines if line.startswith("a-very"))
    folded = [line.split()[0] for line in lines[4:] if line[0] != " "]
    assert "".join(folded).startswith("a-very-long-folder-name-of-a-run")
    assert sum(line.count("[-") for line in lines) == 3
    assert not any(", -" in line for line in lines)


def test_a_table_without_returns_is_named():
    table = make_table(seeds=2, frozen=[0, 1])
    nothing = dataclasses.replace(table, columns=table.columns | {"train_return": [math.nan] * 2})
    with pytest.raises(ValueError, match="b: no member of 2 has a final return"):
        sweep_report.compare([make_table(seeds=2), nothing], ["a", "b"])
    assert printed(sweep_report.render(nothing))[3].split() == ["2", "–", "–", "2"]
