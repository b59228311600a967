"""What the README says was measured is what the records say."""

import json
from pathlib import Path

import against_peers
import ladder
import learning
import meta_learning
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def test_the_readme_table_is_generated_from_the_records():
    readme = (ROOT / "README.md").read_text()
    assert learning.insert_table(readme) == readme, "run: python benchmarks/learning.py --table"


def test_the_table_of_other_libraries_is_generated_from_the_records():
    readme = (ROOT / "README.md").read_text()
    assert against_peers.insert_table(readme) == readme, "run: python benchmarks/against_peers.py --table"


def test_the_table_of_the_ladder_is_generated_from_the_records():
    readme = (ROOT / "README.md").read_text()
    assert ladder.insert_table(readme) == readme, "run: python benchmarks/ladder.py --table"


def test_every_rung_is_judged_by_its_own_bar():
    paths = sorted((ROOT / "benchmarks" / "results").glob("language-*.json"))
    for path in paths:
        record = json.loads(path.read_text())
        row = ladder.ROWS[record["row"]]
        assert record["bar"] == row.bar
        assert [bool(row.reached(seed)) for seed in record["records"]] == [
            s["reached"] for s in record["records"]
        ]
        assert record["reached"] == sum(seed["reached"] for seed in record["records"])
    assert paths


def test_every_record_follows_from_its_seeds():
    paths = sorted((ROOT / "benchmarks" / "results").glob("learning-*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        finals = np.array([seed["return_mean"] for seed in record["records"]])
        assert len(finals) == record["seeds"]
        assert record["iqm"] == round(learning.interquartile_mean(finals), 2)
        assert record["worst"] == finals.min()
        row = learning.ROWS[record["row"]]
        assert record["goal"] == row.goal
        assert record["env_steps"] == row.env_steps or row.env.endswith(
            "-MinAtar"
        )  # where no GPU was at hand
        assert record["config"] == json.loads(json.dumps(row.config))
        assert record["hparams"] == row.lasting(record["env_steps"]).hparams


def test_meta_learning_reached_its_bars():
    folder = ROOT / "benchmarks" / "results"
    record = json.loads((folder / "meta-sinusoid.json").read_text())
    error = meta_learning.scores(record)["maml"]
    assert all((error[:, record["steps"].index(k)] <= bar).all() for k, bar in meta_learning.SINUSOID_BARS)
    record = json.loads((folder / "meta-navigation.json").read_text())
    returns = meta_learning.scores(record)
    ahead = returns["maml"][:, 1:] > returns["pretrained"][:, 1:]  # after one, two and three steps
    assert (returns["maml"].mean(0) > returns["pretrained"].mean(0))[1:].all()
    assert ahead.sum(0).tolist() == [4, 5, 5]  # seeds, as README says


def test_interquartile_mean():
    assert learning.interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])) == 1.5
    # Ten values: two and a half are cut from each end.
    assert learning.interquartile_mean(np.arange(10.0)) == pytest.approx(4.5)
    assert learning.interquartile_mean(np.array([3.0])) == 3.0
    values = np.array([5.0, 1.0, 9.0, 2.0, 7.0])
    # Weights of 5 values: 1.25 off each end, so 0, 0.75, 1, 0.75, 0.
    assert learning.interquartile_mean(values) == pytest.approx((0.75 * 2 + 5 + 0.75 * 7) / 2.5)


@pytest.mark.parametrize(
    ("work", "stage"),
    [
        ("PPO CartPole, 2,048 seeds", "gpu-ppo-cartpole-2048-seeds"),
        ("PPO Breakout-MinAtar, 256 seeds", "gpu-ppo-breakout-256-seeds"),
        ("DQN Breakout-MinAtar, one seed", "gpu-dqn-breakout-alone"),
    ],
)
def test_the_table_of_the_gpu_is_that_of_its_records(work, stage):
    lines = (ROOT / "benchmarks" / "results" / "gpu.jsonl").read_text().splitlines()
    records = {record["benchmark"]: record for record in map(json.loads, lines)}
    speed, returns = records[stage], records[f"{stage}-return"]
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {work}")]
    _, _, seconds, rate, iqm, _ = map(str.strip, row.split("|"))
    assert float(seconds.removesuffix(" s")) == pytest.approx(speed["seconds"]["median"], abs=0.05)
    millions = speed["env_steps_per_second"]["median"] / 1e6
    assert float(rate.removesuffix(" M")) == pytest.approx(millions, rel=0.01)
    assert iqm == f"{returns['iqm']:.1f}"
    assert "H200" in speed["machine"]["device_kind"]
