"""Learning curves: what is on the axes."""

import json
import math
import sys

import numpy as np
import pytest

from jrl import plots, records
from jrl.records import RunError


def make_run(folder, seed=0, algorithm="ppo", num_rows=20, evaluation=480.0, env="CartPole-v1"):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    record = {
        "format": records.FORMAT,
        "algorithm": {"name": algorithm, "module": None},
        "environment": {"id": env, "name": env, "kwargs": {}},
        "seed": seed,
        "config": None, "hparams": {}, "env_steps": 500_000, "eval_episodes": 100, "chunk_length": 1,
        "checkpoint_every": None, "checkpoint_seconds": 300.0, "keep": 3, "loggers": [], "versions": {},
    }  # fmt: skip
    records.write_json(folder / "run.json", record)
    speed = {"ppo": 5.0, "dqn": 11.0}.get(algorithm, 7.0)
    with (folder / "metrics.jsonl").open("w") as stream:
        for i in range(num_rows):
            mean = 500 * (1 - math.exp(-i / speed)) + 20 * rng.normal()
            row = {"env_steps": 25_000 * (i + 1), "episode_return": mean if i else None}
            row |= {"episode_return_min": mean * 0.7, "episode_return_max": mean + 50} if i else {}
            stream.write(json.dumps(row) + "\n")
        stream.write('{"env_steps": 1')  # a killed run's last line
    if evaluation is not None:
        summary = {"env_steps": 500_000, "interrupted": False}
        summary["evaluation"] = {"episode_return_mean": evaluation}
        records.write_json(folder / "summary.json", summary)
    return folder


def texts(figure):
    axes = figure.axes[0]
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_one_run_has_a_line_a_band_and_its_evaluation(tmp_path):
    run = make_run(tmp_path / "run")
    figure = plots.learning_curve(run, out=tmp_path / "new" / "curve.png")
    assert (tmp_path / "new" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "episode return")
    assert axes.get_title(loc="left") == "CartPole-v1"
    line, mark = axes.get_lines()
    assert len(line.get_xdata()) == 19  # where no episode ended there is no point
    assert line.get_xdata()[0] == 50_000
    assert mark.get_ydata()[0] == 480.0
    assert len(axes.collections) == 1
    assert texts(figure) == ["run", "final evaluation"]
    assert [axes.xaxis.get_major_formatter()(value) for value in (0, 500, 5e5, 2.5e6, 1e9)] == [
        "0", "500", "500 k", "2.5 M", "1 G",
    ]  # fmt: skip
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("evaluation", [440.0, 455.0, 470.0])
def test_the_legend_covers_no_evaluation(tmp_path, evaluation):
    run = make_run(tmp_path / "run", evaluation=evaluation)
    rows = [{"env_steps": 1_000 * (i + 1), "episode_return": 500.0 - 15.0 * i} for i in range(30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    axes = plots.learning_curve(run).axes[0]
    axes.figure.canvas.draw()
    (mark,) = [line for line in axes.get_lines() if line.get_marker() == "D"]
    at = axes.transData.transform(mark.get_xydata()[0])
    half = mark.get_markersize() / 2 * axes.figure.dpi / 72
    assert not axes.get_legend().get_window_extent().padded(half).contains(*at)


def test_several_runs_differ_in_colour_and_many_also_in_style(tmp_path):
    runs = [make_run(tmp_path / f"run-{i}", i, f"algorithm-{i}", evaluation=None) for i in range(10)]
    three = plots.learning_curve(runs[:3]).axes[0]
    assert len({line.get_color() for line in three.get_lines()}) == 3
    assert len(three.collections) == 3
    figure = plots.learning_curve(runs)
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10
    assert not figure.axes[0].collections  # ten bands on top of one another show nothing
    assert texts(figure) == [f"run-{i}" for i in range(10)]


def test_many_seeds_become_a_mean_and_its_range(tmp_path):
    runs = [make_run(tmp_path / f"ppo-{i}", i, num_rows=20 + i) for i in range(5)]
    runs += [make_run(tmp_path / f"dqn-{i}", i, "dqn", evaluation=400.0 + i) for i in range(5)]
    figure = plots.learning_curve(runs, title="both")
    assert texts(figure) == ["ppo, CartPole-v1 (5 runs)", "dqn, CartPole-v1 (5 runs)", "final evaluation"]
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "both"
    assert [line.get_ydata()[0] for line in axes.get_lines() if line.get_marker() == "D"] == [480.0, 402.0]
    assert axes.get_lines()[0].get_xdata()[-1] == 500_000  # where every seed still has data


def test_a_run_without_an_episode_is_named(tmp_path):
    run = make_run(tmp_path / "short", num_rows=1)
    with pytest.raises(
        RunError, match=r"nothing to plot: no episode has ended yet in .*short\. A curve needs"
    ):
        plots.learning_curve([run])
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json"):
        plots.learning_curve(tmp_path)
    single = make_run(tmp_path / "single", num_rows=2)
    assert plots.learning_curve(single).axes[0].get_lines()[0].get_marker() == "o"


def test_where_a_figure_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        RunError, match=r"the figure .*file/curve\.png cannot be written: .*elsewhere with --out"
    ):
        plots.save(plots.new_figure(1.0, 1.0), tmp_path / "file" / "curve.png")
