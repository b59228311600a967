"""Figures of sweeps: what is on the axes, and that nothing on them covers or cuts a text."""

import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
from sweep_tables import make_table

from jrl import statistics, sweep_plots
from jrl.plots import COLOURS
from jrl.tables import Table

LOG64 = [float(value) for value in np.logspace(-5, -1, 64)]


def lines(axes):
    """The drawn lines, without marks, which have no line style."""
    return [line for line in axes.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata())]


def marks(axes, marker):
    return [line for line in axes.get_lines() if line.get_marker() == marker and len(line.get_xdata())]


def legend(figure):
    found = figure.axes[0].get_legend() or figure.legends[0]
    return [text.get_text() for text in found.get_texts()]


def assert_legible(figure):
    """Every text lies within the figure, tick labels of an axis do not touch, nor do titles and legends."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    whole = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [tick.label1 for tick in axis.get_major_ticks() if tick.label1.get_text()]
            low, high = sorted(axis.get_view_interval())
            places = [v for v in axis.get_majorticklocs() if low <= v <= high]
            boxes = [
                text.get_window_extent(renderer).expanded(1.0 + 0.1 * (axis is axes.xaxis), 1.0)
                for text, place in zip(ticks, axis.get_majorticklocs(), strict=False)
                if place in places and text.get_visible() and text.get_rotation() == 0
            ]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)), axis
            whole += boxes
        texts = [axes.xaxis.label, axes.yaxis.label, axes._left_title, axes.title]
        parts = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        if axes.get_legend():
            parts.append(axes.get_legend().get_window_extent(renderer))
        assert not any(one.overlaps(other) for one, other in itertools.combinations(parts, 2))
        cells = [text.get_window_extent(renderer) for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(cells, 2))
        whole += parts + cells
    whole += [found.get_window_extent(renderer) for found in figure.legends]
    for box in whole:
        assert page.x0 - 1 <= box.x0 <= box.x1 <= page.x1 + 1
        assert page.y0 - 1 <= box.y0 <= box.y1 <= page.y1 + 1


# ------------------------------------------------------------------------------------------------- curves


def test_few_groups_have_a_line_a_band_and_their_evaluation(tmp_path):
    table = make_table({"learning_rate": [1e-4, 1e-3, 1e-2]}, seeds=8, frozen=[17, 18])
    figure = sweep_plots.learning_curves(table, out=tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "episode return in training")
    assert axes.get_title(loc="left") == "interquartile mean over 8 members, band: 95 % interval"
    drawn = lines(axes)
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == len(drawn) == 3
    assert len(axes.collections) == 3
    for line, (_, part) in zip(drawn, table.groups(), strict=True):
        expected = statistics.interquartile_curve(part.curves)[1:]  # no episode has ended at the first point
        np.testing.assert_allclose(line.get_ydata(), expected)
        np.testing.assert_array_equal(line.get_xdata(), table.curve_env_steps[1:])
    assert len(marks(axes, "D")) == 3
    (cross,) = marks(axes, "X")
    assert list(cross.get_xdata()) == [table.columns["frozen_at"][17]]
    assert legend(figure) == [
        *("learning_rate=0.0001", "learning_rate=0.001", "learning_rate=0.01"),
        *("final evaluation", "frozen (2 of 24 members)"),
    ]
    assert_legible(figure)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_one_member_and_one_group():
    figure = sweep_plots.learning_curves(make_table(seeds=1))
    assert legend(figure) == ["one member", "final evaluation"]
    assert not figure.axes[0].collections  # a single run has no interval
    figure.canvas.draw()
    assert figure.axes[0].get_position().x0 < 0.1  # no mark that is not there takes room
    figure = sweep_plots.learning_curves(make_table(seeds=2, evaluated=False), title="both")
    assert legend(figure) == ["2 members"]
    assert len(figure.axes[0].collections) == 1
    assert figure.axes[0].get_title(loc="left") == "both"
    point = make_table(seeds=2, points=2)
    assert lines(sweep_plots.learning_curves(point).axes[0])[0].get_marker() == "o"


def test_many_groups_of_one_value_are_on_a_colour_scale():
    table = make_table({"learning_rate": LOG64}, seeds=3, points=8, frozen=[3, 190])
    figure = sweep_plots.learning_curves(table)
    axes, bar = figure.axes
    assert bar.get_ylabel() == "learning_rate"
    assert bar.get_yscale() == "log"
    best = [line for line in lines(axes) if line.get_color() == "black"]
    others = [line for line in lines(axes) if line.get_color() != "black"]
    assert (len(best), len(others)) == (3, 61)
    assert len({tuple(line.get_color()) for line in others}) > 50
    assert min(line.get_linewidth() for line in best) > max(line.get_linewidth() for line in others)
    assert len(axes.collections) == 1  # the band of the best one only
    scores = {values["learning_rate"]: sweep_plots._iqm(part) for values, part in table.groups()}
    winner = max(scores, key=lambda value: -math.inf if math.isnan(scores[value]) else scores[value])
    named = legend(figure)
    assert named[0].startswith(f"learning_rate={winner:.3g}  (")
    assert named[3:] == ["frozen (2 of 192 members)"]
    assert_legible(figure)


def test_many_groups_of_several_values_leave_the_best_in_colour():
    names = {
        "a.very.long.name_of_a_value": [1.0, 2.0],
        "env.max_steps_in_episode": [1, 2, 3, 4],
        "c": [0.0, 1.0],
    }
    table = make_table(names, seeds=2, points=6)
    figure = sweep_plots.learning_curves(table)
    (axes,) = figure.axes
    drawn = [line.get_color() for line in lines(axes)]
    assert [drawn.count(colour) for colour in (*COLOURS[:3], "0.72")] == [1, 1, 1, 13]
    assert legend(figure)[3] == "13 others"
    assert_legible(figure)
    by = sweep_plots.learning_curves(table, "c")
    assert "\n" in legend(figure)[0]
    assert_legible(by)
    assert legend(by)[:2] == ["c=0", "c=1"]
    assert len(lines(by.axes[0])) == 2
    six = sweep_plots.learning_curves(table, by=["a.very.long.name_of_a_value", "c"])
    assert len(lines(six.axes[0])) == 4
    assert_legible(six)


def test_members_frozen_before_their_first_episode_are_marked_on_the_axis():
    table = make_table({"a": [1.0, 2.0]}, seeds=2, points=6, frozen=[0, 1])
    curves = table.curves.copy()
    curves[:2] = math.nan
    axes = sweep_plots.learning_curves(dataclasses.replace(table, curves=curves)).axes[0]
    (cross,) = marks(axes, "X")
    assert list(cross.get_ydata()) == [0.0]
    assert cross.get_transform().transform((0, 0))[1] == axes.transAxes.transform((0, 0))[1]


# -------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_shows_every_member_and_the_mean_of_each_value(tmp_path):
    table = make_table({"learning_rate": [1e-4, 1e-3, 1e-2]}, seeds=8, frozen=[16, 17])
    figure = sweep_plots.sensitivity(table, "learning_rate", out=tmp_path / "s.png")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning_rate", "episode return, final evaluation")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    (dots,) = [line for line in axes.get_lines() if line.get_label() == "single members"]
    assert len(dots.get_xdata()) == 22
    (bars,) = axes.containers
    expected = [sweep_plots._iqm(part) for _, part in table.groups()]
    np.testing.assert_allclose(bars.lines[0].get_ydata(), expected)
    (cross,) = marks(axes, "X")
    assert list(cross.get_xdata()) == [1e-2]
    assert [text.get_text() for text in axes.texts] == ["2"]
    low, high = axes.get_ylim()
    assert low < np.nanmin(table.final_returns) < np.nanmax(table.final_returns) < high
    assert legend(figure) == ["IQM over seeds", "single members", "without a return (2)"]
    assert_legible(figure)


def test_sensitivity_averages_over_the_other_values_and_shows_their_best():
    table = make_table({"gamma": [0.9, 0.95, 1.0], "clip": [0.1, 0.2, 0.3]}, seeds=4, points=3)
    figure = sweep_plots.sensitivity(table, "gamma")
    axes = figure.axes[0]
    assert axes.get_xscale() == "linear"
    (best,) = [line for line in axes.get_lines() if line.get_label() == "best other values"]
    groups = [max(sweep_plots._iqm(cell) for _, cell in part.groups()) for _, part in table.groups(["gamma"])]
    np.testing.assert_allclose(best.get_ydata(), groups)
    assert legend(figure)[0] == "IQM over seeds and the other values"
    assert_legible(figure)
    close = make_table({"gamma": [0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0]}, seeds=2, points=3)
    assert_legible(sweep_plots.sensitivity(close, "gamma"))  # not a tick for each value


def test_hundreds_of_members_a_value_stay_faint():
    table = make_table({"a": [1.0, 2.0]}, seeds=256, points=3)
    table.columns["episode_return_mean"][:2] = [-900.0, 900.0]
    figure = sweep_plots.sensitivity(table, "a")
    low, high = figure.axes[0].get_ylim()
    assert low < -900.0 < 900.0 < high  # those far from the mean are on the axes too
    (dots,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "single members"]
    assert dots.get_alpha() < 0.1
    shown = figure.legends[0].legend_handles[1]
    assert shown.get_alpha() == 0.4


def test_sensitivity_of_many_values_of_random_values_and_of_zero():
    many = sweep_plots.sensitivity(make_table({"a": LOG64}, seeds=8, points=3), "a")
    assert (len(many.axes[0].containers), len(many.axes[0].collections)) == (0, 1)  # a band, not 64 bars
    assert_legible(many)
    values = sorted(np.exp(np.random.default_rng(0).uniform(-11, -3, 64)).tolist())
    figure = sweep_plots.sensitivity(make_table({"a": values}, seeds=1, points=3), "a")
    assert figure.axes[0].get_xscale() == "log"
    assert len(figure.axes[0].containers[0].lines[0].get_xdata()) == 9
    assert legend(figure) == ["IQM of 7 or more neighbours", "single members"]
    zero = sweep_plots.sensitivity(make_table({"a": [0.0, 1e-3, 1e-2, 1e-1]}, seeds=3, points=3), "a")
    assert zero.axes[0].get_xscale() == "symlog"
    assert_legible(zero)
    alone = sweep_plots.sensitivity(make_table({"a": [1.0, 2.0, 3.0]}, seeds=1, points=3), "a")
    assert not alone.axes[0].containers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-4, 1e-3, 1e-2], True),
        ([1e-4, 3e-4, 1e-3, 3e-3], True),
        ([0.0, 1e-3, 1e-2, 1e-1], True),
        ([1e-4, 1e-3], True),
        ([1.0, 2.0], False),
        ([0.1, 0.2, 0.3, 0.4], False),
        (list(np.linspace(0.05, 1, 20)), False),
        ([0.9, 0.99, 0.999], False),
        ([-1.0, 1.0, 100.0], False),
        ([5.0], False),
    ],
)
def test_the_axis_follows_the_spacing_of_the_values(values, expected):
    assert sweep_plots.log_spaced(values) == expected


# ---------------------------------------------------------------------------------------------- heat maps


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_heat_map_has_its_numbers_legible_in_their_cells():
    values = {"learning_rate": LOG64[::8], "gamma": [0.9, 0.95, 0.99, 1.0]}
    table = make_table(values, seeds=2, points=3, frozen=[2, 8, 9])
    figure = sweep_plots.heat_map(table, "learning_rate", "gamma")
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning_rate", "gamma")
    assert bar.get_ylabel() == "episode return, final evaluation"
    (image,) = axes.images
    assert image.get_array().shape == (4, 8)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.9", "0.95", "0.99", "1"]
    written = {text.get_position(): text for text in axes.texts}
    assert len(written) == 32
    assert written[0, 1].get_text().endswith("\n1 frozen")
    assert written[1, 0].get_text() == "2 frozen"
    expected = sweep_plots._iqm(table.where(learning_rate=LOG64[16], gamma=0.99))
    assert written[2, 2].get_text() == f"{expected:.0f}"
    for (column, row), text in written.items():
        value = image.get_array()[row, column]
        below = luminance(
            image.cmap(image.norm(value)) if not np.ma.is_masked(value) else axes.get_facecolor()
        )
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        assert (max(below, ink) + 0.05) / (min(below, ink) + 0.05) >= 4.5  # WCAG AA
        box = text.get_window_extent(figure.canvas.get_renderer())
        cell = axes.transData.transform([(column - 0.5, row - 0.5), (column + 0.5, row + 0.5)])
        assert box.width < cell[1, 0] - cell[0, 0]
    assert axes.get_title(loc="left").endswith("; grey: no return")
    assert_legible(figure)


def test_a_large_heat_map_has_colours_only():
    side = [float(i) for i in range(1, 33)]
    figure = sweep_plots.heat_map(make_table({"a": side, "b": side[:4]}, seeds=1, points=2), "a", "b")
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_xticks()) <= 9
    assert_legible(figure)
    wide = sweep_plots.heat_map(make_table({"a": LOG64[:24], "b": [1.0, 2.0]}, seeds=1, points=2), "a", "b")
    assert len(wide.axes[0].texts) == 48
    assert_legible(wide)
    small = sweep_plots.heat_map(make_table({"a": [1.0], "b": [2.0]}, seeds=2, points=2), "a", "b")
    assert_legible(small)


# --------------------------------------------------------------------------------------- several tables

LABELS = ["runs/ppo", "dqn", "a-very-long-folder-name/of-the-third-sweep-2026"]


def three():
    first = make_table({"learning_rate": [1e-4, 1e-3]}, seeds=4, points=5, frozen=[6, 7])
    return [first, make_table(seeds=5, seed=1, points=5), make_table(seeds=1, points=5)]


def test_performance_profiles(tmp_path):
    tables = three()
    figure = sweep_plots.performance_profile(tables, LABELS, out=tmp_path / "p.png")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "threshold τ: episode return, final evaluation"
    assert axes.get_ylabel() == "members with return > τ"
    first, second, third = lines(axes)
    assert (first.get_ydata()[0], second.get_ydata()[0], first.get_ydata()[-1]) == (0.75, 1.0, 0.0)
    at = np.searchsorted(second.get_xdata(), np.median(tables[1].final_returns), "right")
    assert second.get_ydata()[at] == pytest.approx(0.4)
    assert len(third.get_xdata()) == len(first.get_xdata())
    assert len(axes.collections) == 2  # a single run has no band
    assert legend(figure)[:2] == ["runs/ppo (8, 2 frozen)", "dqn (5)"]
    assert legend(figure)[2] == f"…{LABELS[2][-33:]}"
    assert_legible(figure)
    equal = dataclasses.replace(
        tables[1], columns=tables[1].columns | {"episode_return_mean": [500.0] * 5}
    )  # every run reaches the same: the axis still has a width
    low, high = sweep_plots.performance_profile(equal).axes[0].get_xlim()
    assert low < 500 < high


def test_interval_estimates():
    tables = three()
    figure = sweep_plots.interval_estimates(tables, LABELS, target=600.0, title="all")
    assert [axes.get_title() for axes in figure.axes] == [
        "interquartile mean", "median", "mean", "gap to 600\n(lower is better)",
    ]  # fmt: skip
    iqm = figure.axes[0]
    assert [line.get_xdata()[0] for line in iqm.get_lines()] == pytest.approx(
        [sweep_plots._iqm(table) for table in tables]
    )
    assert len(iqm.patches) == 2  # bars of intervals: a single run has none
    gap = statistics.optimality_gap(tables[1].final_returns, 600.0)
    assert figure.axes[3].get_lines()[1].get_xdata()[0] == pytest.approx(gap)
    assert [text.get_text()[:8] for text in iqm.get_yticklabels()] == ["runs/ppo", "dqn (5)", "…lder-na"]
    assert_legible(figure)


def test_curves_of_several_tables():
    tables = three()
    figure = sweep_plots.compared_curves(tables, LABELS)
    assert len(lines(figure.axes[0])) == 3
    assert len(figure.axes[0].collections) == 2
    assert legend(figure)[:2] == ["runs/ppo (8, 2 frozen)", "dqn (5)"]
    assert legend(figure)[3] == "frozen member"
    assert_legible(figure)


# ----------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (make_table(seeds=1, points=4), {"learning_curves"}),
        (make_table(seeds=2, points=4), {"learning_curves", "performance_profile"}),
        (
            make_table({"a": [1.0, 2.0], "env.b": [1.0, 2.0], "one": [3.0]}, seeds=2, points=4),
            {
                *("learning_curves", "performance_profile"),
                *("sensitivity_a", "sensitivity_env.b", "heat_map_a_env.b"),
            },
        ),
    ],
)
def test_what_fits_the_table_is_drawn(tmp_path, table, names):
    files = sweep_plots.figures(table, tmp_path / "figures")
    assert {file.name for file in files} == {f"{name}.png" for name in names}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)


def test_random_values_get_no_heat_map_and_members_without_returns_no_sensitivity(tmp_path):
    table = make_table({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}, seeds=1, points=4)
    diagonal = table.take([0, 4, 8])
    names = {file.stem for file in sweep_plots.figures(diagonal, tmp_path / "random")}
    assert names == {"learning_curves", "sensitivity_a", "sensitivity_b", "performance_profile"}
    frozen = make_table({"a": [1.0, 2.0]}, seeds=1, points=4, frozen=[0, 1])
    assert [file.stem for file in sweep_plots.figures(frozen, tmp_path / "frozen")] == ["learning_curves"]


def test_schedules_show_how_a_population_changed_its_values(tmp_path):
    table = make_table({"a": [0.1, 0.2]}, seeds=1, points=3)
    with pytest.raises(ValueError, match="schedules: the table has no lineage"):
        sweep_plots.schedules(table, "a")
    paths = [[[0, 1, {"a": 0.2}], [50_000, 0, {"a": 0.1}]], [[0, 1, {"a": 0.2}]]]
    table = dataclasses.replace(table, columns=table.columns | {"lineage": list(map(json.dumps, paths))})
    axes = sweep_plots.schedules(table, "a").axes[0]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    end = 75_000
    assert drawn == [[[0, 0.2], [50_000, 0.1], [end, 0.1]], [[0, 0.2], [end, 0.2]]]
    best = int(np.argmax(table.final_returns))
    assert [line.get_color() == "black" for line in axes.lines] == [i == best for i in range(2)]
    assert "schedules_a.png" in {file.name for file in sweep_plots.figures(table, tmp_path)}


def test_texts_are_swept_values_too(tmp_path):
    table = make_table({"torso": ["cnn", "mlp"], "a": [1.0, 2.0]}, seeds=2, points=3)
    axes = sweep_plots.sensitivity(table, "torso").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cnn", "mlp"]
    table.to_csv(tmp_path / "table.csv")
    assert Table.from_csv(tmp_path / "table.csv").columns == table.columns
    assert len(sweep_plots.figures(table, tmp_path)) == 5
    many = make_table({"hidden_sizes": [f"[{width}]" for width in range(9)]}, seeds=1, points=3)
    assert "6 others" in sweep_plots.learning_curves(many).axes[0].get_legend_handles_labels()[1]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda t: sweep_plots.learning_curves(t, "gamma"), r"there is no column 'gamma'\. Swept: a, b"),
        (lambda t: sweep_plots.sensitivity(t, "gamma"), r"sensitivity: 'gamma' was not swept\. Swept: a, b"),
        (lambda t: sweep_plots.heat_map(t, "a", "a"), r"heat_map\(x='a', y='a'\): choose two different"),
        (lambda t: sweep_plots.performance_profile([t], ["a", "b"]), "1 tables and 2 labels; give one label"),
        (
            lambda t: sweep_plots.sensitivity(
                dataclasses.replace(t, columns=t.columns | {"episode_return_mean": [math.nan] * 2}), "a"
            ),
            "sensitivity: no member of 2 has a final return",
        ),
        (
            lambda t: sweep_plots.learning_curves(dataclasses.replace(t, curves=np.full((2, 3), math.nan))),
            "nothing to plot: no member has had an episode end, of 2",
        ),
    ],
)
def test_bad_input_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(make_table({"a": [1.0, 2.0], "b": [1.0]}, seeds=1, points=3))
