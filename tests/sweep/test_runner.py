"""A sweep from Python and from the command: its table, its files, its errors, and going on after a kill."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import fake_algorithm as fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_algorithm import Ranked
from flax import struct

import jrl
from jrl import checkpoint, cli, configuration, driver, records, rollout, statistics, sweep, tables, types
from jrl.envs import from_functions, vectorize
from jrl.ops import counter
from jrl.records import RunError, RunWarning
from jrl.sweep import groups, members, outcome, planning, rounds, runner
from jrl.sweep.results import Results

pytestmark = pytest.mark.optimized  # bits of different programs, and memory

ENV = fake.environment()
STEPS = 8 * 60  # 60 algorithm steps, chunks of 1


def run(out=None, **changes):
    """Six members: three seeds of two settings."""
    arguments = {"grid": {"learning_rate": [0.1, 0.2]}, "seeds": 3, "env_steps": STEPS, "eval_episodes": 4}
    arguments |= {"env": ENV, "progress": "none", "figures": False, "devices": jax.devices()[:1], "out": out}
    return sweep.execute(fake, **arguments | changes)


def interrupt(monkeypatch, chunk):
    """Press Ctrl-C after so many chunks; returns the list of env steps that fills up with what is trained."""
    seen = []

    def update(self, env_steps, row):
        seen.append(env_steps)
        if len(seen) == chunk:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("jrl.progress.Silent.update", update)
    return seen


def arrays(state):
    return {path: array.tobytes() for path, array in checkpoint.snapshot(state).arrays.items()}


def bits(finished):
    table = finished.table
    return json.dumps(table.columns), table.curves.tobytes(), table.curve_env_steps.tolist()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("sweeps") / "reference")


def test_progress_keeps_the_best_return_while_no_episode_ends(monkeypatch):
    seen = []
    monkeypatch.setattr("jrl.progress.Silent.update", lambda self, env_steps, row: seen.append(row))
    run()
    assert None in (row["episode_return"] for row in seen[1:])
    last = "-"
    for row in seen:
        last = last if row["episode_return"] is None else f"{row['episode_return']:.4g}"
        assert row["text"] == f"{row['members_done']}/6 done, best {last}"
    assert last != "-"


def test_a_table_has_a_row_a_member(reference):
    table = reference.table
    assert len(table) == 6
    assert table.swept == ("learning_rate",)
    assert table.columns["seed"] == [0, 1, 2] * 2
    assert table.columns["learning_rate"] == [0.1] * 3 + [0.2] * 3  # not 0.10000000149
    assert table.columns["episode_return_mean"] == [5.0] * 6
    assert table.columns["num_episodes"] == [4] * 6
    assert table.columns["env_steps"] == [STEPS] * 6
    assert table.columns["status"] == ["ok"] * 6
    assert table.curve_env_steps.tolist() == list(range(8, STEPS + 1, 8))
    returns = table.curves[0]
    assert np.isnan(returns[:2]).all()
    assert returns[2] == 2.0
    assert table.columns["train_return"] == [pytest.approx(np.nanmean(returns[-6:]))] * 6


def test_a_folder_has_everything(reference):
    out = reference.out
    names = {".lock", "sweep.json", "metrics.jsonl", "checkpoints", "table.csv", "summary.json"}
    assert {path.name for path in out.iterdir()} == names
    read = tables.read(out)
    assert read.columns == reference.table.columns
    np.testing.assert_array_equal(read.curves, reference.table.curves)
    record = records.read_sweep(out)
    assert record["swept"] == {"learning_rate": [0.1] * 3 + [0.2] * 3}
    rows = records.read_metrics(out)
    assert rows[-1]["env_steps"] == 6 * STEPS
    assert rows[-1]["members_frozen"] == 0
    assert rows[-1]["episode_return"] == 59.0
    summary = records.read_summary(out)
    assert (summary["members"], summary["frozen"], summary["interrupted"]) == (6, 0, False)
    assert summary["best"] == {"hparams": {"learning_rate": 0.1}, "return_iqm": 5.0}
    assert summary["plan"]["bytes_total"] == reference.plan.bytes_total > 0


def test_a_member_is_what_a_run_alone_is(reference):
    alone = driver.run(
        fake, ENV, env_steps=STEPS, seed=2, hparams={"learning_rate": 0.2}, eval_episodes=4, progress="none"
    )
    assert arrays(jax.tree.map(lambda leaf: leaf[5], reference.states)) == arrays(alone.state)
    loaded = sweep.load(reference.out, 5, algorithm=fake, env=ENV)
    assert arrays(loaded.state) == arrays(alone.state)
    assert loaded.hparams == alone.hparams
    with pytest.raises(RunError, match="has members 0 to 5"):
        sweep.load(reference.out, 6, algorithm=fake, env=ENV)
    assert reference.table.row(5)["episode_return_mean"] == alone.summary["evaluation"]["episode_return_mean"]


def test_a_member_with_the_cheap_generator_is_what_a_run_alone_is(reference, tmp_path):
    hashed = run(tmp_path / "sweep", prng="hashed")
    alone = driver.run(
        fake, ENV, env_steps=STEPS, seed=2, hparams={"learning_rate": 0.2}, prng="hashed", eval_episodes=0
    )
    assert arrays(jax.tree.map(lambda leaf: leaf[5], hashed.states)) == arrays(alone.state)
    assert arrays(sweep.load(hashed.out, 5, algorithm=fake, env=ENV).state) == arrays(alone.state)
    assert arrays(hashed.states) != arrays(reference.states)
    with pytest.raises(RunError, match="its prng is 'hashed', this command's 'threefry'"):
        run(hashed.out, resume=True)
    assert bits(run(hashed.out, resume=True, prng="hashed")) == bits(hashed)


@pytest.mark.parametrize(
    "changes",
    [{"chunk": 4}, {"devices": jax.devices()[:4]}, {"devices": jax.devices()[:4], "chunk": 5}, {"chunk": 1}],
    ids=["chunks", "devices", "both", "one by one"],
)
def test_chunks_and_devices_change_nothing(reference, changes):
    finished = run(**changes)
    assert bits(finished) == bits(reference)
    assert finished.plan.num_chunks == -(-6 // changes.get("chunk", 6))


def test_batched_hparams_of_an_algorithm_are_the_same_sweep(reference):
    algo = fake.make(ENV, fake.Config())._replace(env=ENV)
    hparams = sweep.grid(fake.HParams(), learning_rate=[0.1, 0.2])
    table = sweep.run(
        algo, hparams, seeds=3, env_steps=STEPS, eval_episodes=4, progress="none", devices=jax.devices()[:1]
    )
    assert json.dumps(table.columns) == json.dumps(reference.table.columns)


def test_random_settings_with_a_grid_and_environment_parameters():
    finished = run(
        grid={"env.reward": [1.0, 2.0]}, random={"learning_rate": sweep.loguniform(1e-3, 1e-1)}, num_random=3,
        seeds=[4, 9],
    )  # fmt: skip
    table = finished.table
    assert table.swept == ("learning_rate", "env.reward")
    assert len(table) == 12
    assert len(set(table.columns["learning_rate"])) == 3
    assert table.columns["env.reward"] == [1.0, 1.0, 2.0, 2.0] * 3
    assert (
        table.columns["episode_return_mean"] == [5.0, 5.0, 10.0, 10.0] * 3
    )  # in the member's own environment
    assert table.columns["seed"] == [4, 9] * 6


def test_draws_that_are_equal_are_one_setting():
    """Repeated, they would be the same runs under another number, and count as further seeds."""
    spaces = {"learning_rate": sweep.choice(0.2, 0.1), "nan_at": sweep.choice(-1.0, -2.0)}
    arguments = {"random": spaces, "num_random": 40, "seeds": 2, "env": ENV, "env_steps": STEPS}
    _, who, _ = runner.prepare(fake, **arguments, grid={"env.reward": [1.0, 2.0]})
    names = ("learning_rate", "nan_at", "env.reward")
    values = members.names(who.hparams)
    settings = list(zip(*(values[name].tolist() for name in names), strict=True))
    assert len(settings) == 2 * len(set(settings)) == 16
    drawn = members.names(members.random(jax.random.key(0), fake.HParams(), 40, **spaces))
    draws = zip(drawn["learning_rate"].tolist(), drawn["nan_at"].tolist(), strict=True)
    assert [setting[:2] for setting in settings[::4]] == list(dict.fromkeys(draws))


def test_a_switch_is_swept_and_is_one_or_zero_in_the_table(tmp_path):
    def transition(key, time, action, params):
        return time + 1, jnp.zeros(1), jnp.where(params["on"], 2.0, 1.0), False, time >= 3

    env = from_functions(lambda key, params: (0, jnp.zeros(1)), transition, {"on": True}, types.Discrete(2))
    table = run(tmp_path, env=env, grid={"env.on": [True, False]}, seeds=1).table
    assert table.columns["env.on"] == [1, 0]
    assert table.columns["episode_return_mean"] == [8.0, 4.0]
    assert tables.read(tmp_path).columns["env.on"] == [1, 0]


# ---------------------------------------------------------------------------------------------- bad members


def test_a_member_that_fails_is_frozen_and_flagged_and_no_other_changes(reference, tmp_path):
    bad = run(tmp_path / "bad", grid={"learning_rate": [0.1, 0.2], "nan_at": [-1.0, 30.0]})
    table = bad.table
    failing = [value == 30.0 for value in table.columns["nan_at"]]
    assert table.columns["status"] == ["frozen" if f else "ok" for f in failing]
    assert {at for at, f in zip(table.columns["frozen_at"], failing, strict=True) if f} == {31 * 8}
    assert all((why is not None) == f for why, f in zip(table.columns["frozen_why"], failing, strict=True))
    assert "loss nan after" in table.row(failing.index(True))["frozen_why"]
    healthy = table.where(nan_at=-1.0)
    np.testing.assert_array_equal(healthy.curves, reference.table.curves)
    assert healthy.columns["episode_return_mean"] == reference.table.columns["episode_return_mean"]
    states = {i: np.asarray(bad.states.params["w"][i]) for i in range(12) if table.row(i)["nan_at"] == -1.0}
    np.testing.assert_array_equal(np.stack(list(states.values())), reference.states.params["w"])
    assert np.isfinite(np.asarray(bad.states.params["w"])).all()
    assert bad.summary["frozen"] == 6
    # evaluated as they were before, they would count as healthy ones
    returns = [table.columns[name] for name in ("episode_return_mean", "num_episodes")]
    assert all([value is None for value in column] == failing for column in returns)
    assert np.isnan(table.final_returns).tolist() == failing
    assert np.isnan(table.columns["train_return"])[failing].all()
    assert bad.summary["best"]["hparams"]["nan_at"] == -1.0
    assert tables.read(bad.out).columns["episode_return_mean"] == table.columns["episode_return_mean"]


def test_where_all_members_are_frozen_there_is_no_best(capsys):
    bad = run(grid={"nan_at": [0.0, 5.0]}, seeds=1, progress="lines")
    assert bad.table.columns["status"] == ["frozen"] * 2
    assert bad.summary["best"] is None
    assert "all 2 members were frozen: there is no best setting" in capsys.readouterr().out
    assert bad.table.num_scored == 0


def test_the_best_setting_is_the_one_of_the_table():
    # of five scores the middle three count: 6.67; of exactly the middle half, which 4 does not divide, it were 7
    returns = [0.0, 0.0, 10.0, 10.0, 100.0, *[6.7] * 5]
    columns = dict.fromkeys((*tables.FIRST, "learning_rate", *tables.RESULTS), [None] * 10)
    columns |= {"member": list(range(10)), "seed": [*range(5)] * 2, "learning_rate": [0.1] * 5 + [0.2] * 5}
    columns |= {"train_return": returns, "env_steps": [1] * 10, "status": ["ok"] * 10}
    table = tables.Table(columns, np.array([1]), np.array([returns]).T, ("learning_rate",))
    found = outcome.best_setting(table)
    assert found["hparams"] == tables.best(table)[0] == {"learning_rate": 0.2}
    assert found["return_iqm"] == statistics.interquartile_mean(tables.best(table)[1].final_returns)


def test_halving_does_not_go_on_with_a_frozen_setting():
    hparams = sweep.grid(fake.HParams(), learning_rate=[0.1, 0.2, 0.3, 0.4])
    hparams = dataclasses.replace(hparams, nan_at=jnp.array([-1.0, -1.0, -1.0, 25.0]))  # the best, until then
    changes = {"hparams": hparams, "grid": None, "seeds": 1, "halving": sweep.Halving(2.0, 2)}
    arguments = {"env": ENV, "env_steps": STEPS, "eval_episodes": 2, "progress": "none", "figures": False}
    table = sweep.execute(Ranked, devices=jax.devices()[:1], **arguments | changes).table
    assert table.columns["status"] == ["stopped", "ok", "ok", "frozen"]


def test_parameters_that_are_not_finite_are_seen_too():
    table = run(grid={"nan_params_at": [-1.0, 59.0]}, seeds=1).table
    assert table.columns["status"] == ["ok", "frozen"]
    # the loss of the step after it would be NaN; here the run has ended
    assert table.row(1)["frozen_why"] == "a parameter is not finite"
    assert table.row(1)["frozen_at"] == STEPS


# ------------------------------------------------------------------------------------------------ halving


@pytest.mark.parametrize("devices", [1, 4])
def test_halving_keeps_the_best_at_a_fraction_of_the_steps(devices):
    values = [0.05, 0.4, 0.1, 0.45, 0.3, 0.2, 0.15, 0.35, 0.25]
    arguments = {"grid": {"learning_rate": values}, "seeds": 2, "devices": jax.devices()[:devices]}
    arguments |= {"env": ENV, "env_steps": STEPS, "eval_episodes": 2, "progress": "none", "figures": False}
    full = sweep.execute(Ranked, **arguments)
    halved = sweep.execute(Ranked, **arguments, halving=sweep.Halving(eta=3))
    steps = {}
    for i in range(18):
        row = halved.table.row(i)
        steps[row["learning_rate"]] = row["env_steps"]
        assert row["status"] == ("ok" if row["learning_rate"] == 0.45 else "stopped")
    # rungs at 1/9 and 1/3 of 60 algorithm steps
    assert steps == {
        0.45: STEPS, 0.4: 20 * 8, 0.35: 20 * 8, **dict.fromkeys([0.05, 0.1, 0.15, 0.2, 0.25, 0.3], 7 * 8)
    }  # fmt: skip
    assert halved.summary["env_steps"] == 2 * sum(steps.values()) < 0.27 * full.summary["env_steps"]
    assert halved.summary["best"]["hparams"] == full.summary["best"]["hparams"]
    # the winner is not disturbed by who was stopped, nor by being moved
    for i in (6, 7):
        np.testing.assert_array_equal(halved.table.curves[i], full.table.curves[i])


def test_of_equal_settings_the_place_in_the_grid_does_not_decide():
    equal = run(
        grid={"learning_rate": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, seeds=1, halving=sweep.Halving(2.0, 2)
    )
    kept = [i for i, status in enumerate(equal.table.columns["status"]) if status == "ok"]
    assert len(kept) == 3
    assert kept not in ([0, 1, 2], [3, 4, 5])


HELD = [0.2, 0.9, 0.5, 1.0, 0.7, 0.99]
"""What :class:`Surviving` is swept over: the best ends no episode for long."""


@struct.dataclass
class Skill:
    skill: float = 0.5
    env: object = None


@struct.dataclass
class Survivor:
    params: dict
    rollout: rollout.RolloutState
    env_steps: jax.Array
    key: jax.Array


class Surviving:
    """Four environments that end each step unless the skill holds, after 90 steps at the latest; a reward a step."""

    Config, HParams = fake.Config, Skill
    reward = 1.0

    @classmethod
    def make(cls, env=None, config=None):
        def transition(key, time, action, params):
            dead = jax.random.uniform(key) > action[0]
            return time + 1, jnp.zeros(1), cls.reward, dead, time + 1 >= 90

        box = types.Box((1,), 0, 1)
        env = from_functions(lambda key, params: (0, jnp.zeros(1)), transition, {}, box, "Survive-v0")
        many = vectorize(env, 4)

        def act(params, key, obs, memory):
            return jnp.broadcast_to(params, (*obs.shape[:-1], 1)), memory, ()

        def init(key, hparams):
            start, key = jax.random.split(key)
            begun = rollout.start(start, many, env.params, 4)
            return Survivor({"w": jnp.zeros(1)}, begun, counter.zero(), key)

        def step(state, hparams):
            key, acting = jax.random.split(state.key)
            policy = types.Policy(act, hparams.skill)
            on, _, metrics = rollout.unroll(acting, many, env.params, policy, state.rollout, 4)
            return Survivor(state.params, on, counter.add(state.env_steps, 16), key), metrics

        return types.Algorithm(init, step, lambda state, greedy=True: types.Policy(act, 0.5), 16, env)


class Costly(Surviving):
    """The same where a step costs 1, so that it is best not to survive."""

    reward = -1.0


SURVIVING = {"seeds": 1, "env_steps": 800, "eval_episodes": 0, "progress": "none", "figures": False}


@pytest.mark.parametrize(
    ("algo", "best"), [(Surviving, {0.9, 0.99, 1.0}), (Costly, {0.2, 0.5, 0.7})], ids=["reward", "cost"]
)
def test_halving_compares_a_seed_whose_episodes_go_on_by_what_they_have_gathered(algo, best):
    arguments = SURVIVING | {"devices": jax.devices()[:2], "halving": sweep.Halving(2.0, 2)}
    arguments |= {"env_steps": 640}
    table = sweep.execute(algo.make(), sweep.grid(Skill(), skill=HELD), **arguments).table
    assert np.isnan(table.curves[HELD.index(1.0), :20]).all()  # the rung is there
    assert {HELD[i] for i, status in enumerate(table.columns["status"]) if status == "ok"} == best


def test_a_population_goes_on_with_those_whose_episodes_go_on_to_the_same_bits(tmp_path, monkeypatch):
    pbt = sweep.PBT({"skill": (0.0, 1.0)}, interval=160, share=0.2, factor=1.0001)
    arguments = SURVIVING | {"devices": jax.devices()[:1], "pbt": pbt}
    whole = sweep.execute(Surviving.make(), sweep.grid(Skill(), skill=HELD), **arguments)
    first = json.loads(whole.table.columns["lineage"][0])[:2]
    assert [member for _, member, _ in first] == [3, 0]  # a copy of the best, which has ended no episode
    assert sorted(whole.table.columns["skill"])[0] > 0.6
    interrupt(monkeypatch, chunk=17)
    out = tmp_path / "sweep"
    assert sweep.execute(Surviving.make(), sweep.grid(Skill(), skill=HELD), out=out, **arguments).interrupted
    arguments |= {"devices": jax.devices()[:3], "resume": True}
    resumed = sweep.execute(Surviving.make(), sweep.grid(Skill(), skill=HELD), out=out, **arguments)
    assert bits(resumed) == bits(whole)


def test_the_newest_return_is_that_of_the_member_it_was_copied_from():
    results = Results.empty(5, 3, {"skill": np.zeros(3)})
    results.history[:4] = [[1, 2, np.nan], [np.nan, 3, np.nan], [np.nan, np.nan, np.nan], [4, np.nan, np.nan]]
    results.population["source"][2] = [0, 1, 1]
    np.testing.assert_array_equal(results.newest_returns(3), [1, 3, 3])
    np.testing.assert_array_equal(results.newest_returns(2), [1, 3, np.nan])
    np.testing.assert_array_equal(results.newest_returns(5), [4, 3, 3])


@pytest.mark.parametrize(
    ("returns", "under_way", "score"),
    [
        ([7.0, 3.0], 50.0, 3.0),  # one that ended is its score, whatever goes on
        ([7.0, np.nan], 5.0, 7.0),
        ([7.0, np.nan], 50.0, 50.0),
        ([-7.0, np.nan], -5.0, -7.0),  # or to have begun would be the best of all, where each step costs
        ([-7.0, np.nan], -50.0, -50.0),
        ([np.nan, np.nan], -5.0, -5.0),
        ([7.0, np.nan], np.nan, 7.0),
        ([np.nan, np.nan], None, np.nan),
        ([7.0, np.nan], None, 7.0),
    ],
)
def test_what_a_member_scores_that_ended_no_episode(returns, under_way, score):
    results = Results.empty(2, 3, {})
    results.history[:] = np.array([returns, [1.0, np.nan], [np.nan, np.nan]]).T
    results.failed_at[1] = 1  # frozen: the worst
    stub = SimpleNamespace(num=3, results=results, layout=planning.layout(3, 1, jax.devices()[:1]))
    going_on = None if under_way is None else SimpleNamespace(episode_return=np.full((3, 2), under_way))
    before = results.history[1].astype(float)
    found = rounds.fill_unended(stub, before, 2, np.arange(3), SimpleNamespace(rollout=going_on))
    other = np.nan if under_way is None else under_way
    np.testing.assert_array_equal(found, [score, np.nan, other])


def test_a_population_moves_towards_the_best_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    traced = []

    class Counted(Ranked):
        @staticmethod
        def make(env, config):
            algo = Ranked.make(env, config)
            return algo._replace(step=lambda state, hparams: traced.append(1) or algo.step(state, hparams))

    pbt = sweep.PBT({"learning_rate": (0.01, 0.4)}, interval=12 * 8)  # rounds at 12, 24, 36 and 48 of 60
    arguments = {"grid": {"learning_rate": [0.05, 0.1, 0.2, 0.3], "nan_at": [-1.0, 20.0]}, "pbt": pbt}
    arguments |= {"env": ENV, "env_steps": STEPS, "eval_episodes": 2, "progress": "none", "figures": False}
    whole = sweep.execute(Counted, out=tmp_path / "whole", devices=jax.devices()[:1], **arguments)
    assert len(traced) == 2  # for the names of its metrics, and for the one program
    table = whole.table
    assert table.swept == ("learning_rate", "nan_at")
    began = records.read_sweep(whole.out)["swept"]["learning_rate"]
    for row in (table.row(i) for i in range(8)):
        path = json.loads(row["lineage"])
        assert path[0] == [
            0,
            path[0][1],
            {"learning_rate": began[path[0][1]], "nan_at": path[0][2]["nan_at"]},
        ]
        assert path[-1][1:] == [row["member"], {name: row[name] for name in table.swept}]
        for (_, _, before), (at, _, after) in itertools.pairwise(path):
            assert at % (12 * 8) == 0
            old, new = before["learning_rate"], after["learning_rate"]
            assert new in (pytest.approx(min(old * 1.25, 0.4)), pytest.approx(old / 1.25))
    assert max(table.columns["learning_rate"]) == pytest.approx(0.4)
    assert min(table.columns["learning_rate"]) > 0.15  # nothing descends from the two worst
    assert table.columns["status"].count("ok") > 4  # a copy takes the place of one that was frozen
    for i, status in enumerate(table.columns["status"]):
        assert (status == "frozen") == (table.row(i)["frozen_why"] is not None)

    interrupt(monkeypatch, chunk=30)
    out = tmp_path / "sweep"
    assert sweep.execute(Ranked, out=out, devices=jax.devices()[:1], **arguments).interrupted
    resumed = sweep.resume(
        out, algorithm=Ranked, env=ENV, devices=jax.devices()[:3], progress="none", figures=False
    )
    assert bits(resumed) == bits(whole)
    assert tables.read(out).columns == tables.read(whole.out).columns == table.columns
    one, other = (sweep.load(folder, 5, algorithm=Ranked, env=ENV) for folder in (out, whole.out))
    assert arrays(one.state) == arrays(other.state)
    assert float(one.hparams.learning_rate) == pytest.approx(table.row(5)["learning_rate"])


# ----------------------------------------------------------------------------------------- going on


def test_a_sweep_whose_members_are_all_frozen_goes_on_without_saying_anything_twice(tmp_path, monkeypatch):
    """No member takes environment steps from then on, so that those do not tell where the sweep stands."""
    frozen = {"grid": {"nan_at": [0.0, 5.0]}, "seeds": 1}
    interrupt(monkeypatch, chunk=9)
    assert run(tmp_path / "sweep", **frozen).interrupted
    with open(tmp_path / "sweep" / "metrics.jsonl") as file:
        newest = file.readlines()[-1]
    # as a kill leaves it: with lines that are newer than the checkpoint
    with open(tmp_path / "sweep" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**json.loads(newest), "step": json.loads(newest)["step"] + 1}) + "\n")
    run(tmp_path / "sweep", resume=True, **frozen)
    assert [row["step"] for row in records.read_metrics(tmp_path / "sweep")] == list(range(1, 61))


def test_an_interrupted_sweep_goes_on_to_the_same_bits_with_other_devices(reference, tmp_path, monkeypatch):
    out = tmp_path / "sweep"
    seen = interrupt(monkeypatch, chunk=7)
    with pytest.raises(KeyboardInterrupt, match=f"jrl resume {out}"):
        sweep.run(
            fake, env=ENV, grid={"learning_rate": [0.1, 0.2]}, seeds=3, env_steps=STEPS, eval_episodes=4, out=out,
            progress="none", devices=jax.devices()[:1],
        )  # fmt: skip
    assert len(seen) < 20
    assert records.read_summary(out)["interrupted"]
    resumed = sweep.resume(
        out, algorithm=fake, env=ENV, devices=jax.devices()[:3], progress="none", figures=False
    )
    assert bits(resumed) == bits(reference)
    assert [row["env_steps"] for row in records.read_metrics(out)] == [
        row["env_steps"] for row in records.read_metrics(reference.out)
    ]
    record = json.loads((out / "sweep.json").read_text())
    record["versions"]["compiler"] = "quick"
    records.write_json(out / "sweep.json", record)
    with pytest.warns(RunWarning, match=r"other versions \(compiler quick -> full\)"):
        again = sweep.resume(
            out, algorithm=fake, env=ENV, progress="none", figures=False, devices=jax.devices()[:1]
        )
    assert bits(again) == bits(reference)


PPO = ["--num-envs", "2", "--unroll-length", "8", "--num-minibatches", "2", "--num-epochs", "1"]
PPO += ["--hidden-sizes", "4", "--env", "CartPole-v1", "--grid", "learning_rate=1e-3,1e-2", "--seeds", "2"]
PPO += ["--env-steps", str(16 * 600), "--eval-episodes", "2"]


def start(*args, devices):
    command = [sys.executable, "-m", "jrl", *map(str, args), "--progress", "none"]
    environ = fake.environ(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)


@pytest.mark.optimized(False)  # as its processes are
def test_a_sweep_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "sweep"
    args = ["sweep", "ppo", *PPO, "--devices", 2]
    process = start(*args, "--out", whole, devices=2)
    assert process.wait(300) == 0
    args += ["--out", out, "--checkpoint-seconds", 0.01, "--resume"]
    for _ in range(2):  # the very same command again, as a scheduler would give it
        before = checkpoint.latest_step(out / "checkpoints") or 0
        process = start(*args, devices=2)
        deadline = time.monotonic() + 240
        while (checkpoint.latest_step(out / "checkpoints") or 0) <= before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(np.random.default_rng().uniform(0, 0.1))
        process.kill()
        process.wait()
    assert checkpoint.latest_step(out / "checkpoints") > 0
    process = start("resume", out, devices=2)
    assert process.wait(300) == 0
    assert (out / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    for member in range(4):
        one, other = (sweep.load(folder, member) for folder in (whole, out))
        assert one.hparams == other.hparams
        assert arrays(one.state) == arrays(other.state)
    returns = tables.read(out).columns["episode_return_mean"]
    assert driver.evaluate(out, member=3, num_episodes=2)["episode_return_mean"] == returns[3]
    assert {path.name for path in whole.glob("*.png")} == {path.name for path in out.glob("*.png")} != set()


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grid": {"learnig_rate": [1.0]}}, "no hyperparameter 'learnig_rate'. Nearest: learning_rate"),
        ({"grid": {"num_envs": [1, 2]}}, "num_envs is a static choice"),
        ({"grid": {"learning_rate": []}}, "a grid needs one or more values"),
        ({"random": {"learning_rate": sweep.uniform(0, 1)}}, "num_random=0 and random="),
        (
            {"random": {"learning_rate": sweep.uniform(0, 1)}, "num_random": 2},
            "learning_rate is in the grid and in the random search",
        ),
        ({"seeds": 0}, "a sweep needs at least one seed"),
        ({"seeds": [1, 1]}, "must be different whole numbers"),
        ({"seeds": [0.5, 1.7]}, r"seeds=\[0.5, 1.7\]: must be different whole numbers"),
        ({"seeds": True}, "seeds=True: expected how many, or which ones"),
        ({"seeds": "3"}, "seeds='3': expected how many, or which ones"),
        ({"seeds": 2**33}, "seeds=8589934592: a sweep has at most 16,777,216 members"),
        ({"seeds": 2**24}, "33,554,432 members: a sweep has at most"),
        ({"env_steps": 0}, "env_steps=0: must be a whole number of at least 1"),
        ({"width": 0}, "width=0"),
        ({"width": True}, "width=True"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 2.5}, "chunk=2.5: must be a whole number of at least 1"),
        ({"devices": []}, r"devices=\[\]: a sweep needs at least one device"),
        ({"checkpoint_seconds": -5}, "checkpoint_seconds=-5: must be finite and at least 0"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds=nan: must be finite"),
        ({"env": None}, "env=None: a sweep needs the environment"),
        ({"config": {"warmup": 1000}}, "the warm-up alone takes 1000"),
        (
            {"hparams": fake.HParams(learning_rate=jnp.ones(2)), "grid": None},
            "learning_rate has a leading axis and the others have none",
        ),
        ({"pbt": sweep.PBT({"gama": (0, 1)}, 80)}, "there is no hyperparameter 'gama'"),
        (
            {"pbt": sweep.PBT({"learning_rate": (0, 1)}, 80), "halving": sweep.Halving()},
            "a sweep has one search",
        ),
        ({"pbt": sweep.PBT({"learning_rate": (0, 1)}, 80), "grid": None, "seeds": 1}, "at least two members"),
        (
            {"halving": sweep.Halving(), "chunk": 2},
            "halving: 6 members do not fit into memory at once, only 2",
        ),
    ],
)
def test_what_a_sweep_refuses(changes, text, tmp_path):
    out = tmp_path / "sweep"
    with pytest.raises(ValueError, match=text):
        run(out, **changes)
    assert not (out / "sweep.json").exists()  # free for the corrected command


@struct.dataclass
class WithStatus(fake.HParams):
    status: float = 1.0


@struct.dataclass
class WithoutKey:
    inner: fake.State


def without_key():
    """The fake algorithm, whose state has its key under another name."""
    algo = fake.make(ENV, fake.Config())

    def step(state, hparams):
        inner, metrics = algo.step(state.inner, hparams)
        return WithoutKey(inner), metrics

    return algo._replace(init=lambda key, hparams: WithoutKey(algo.init(key, hparams)), step=step)


def test_what_an_algorithm_lacks_is_told_before_it_is_trained():
    arguments = {"env": ENV, "env_steps": STEPS, "seeds": 2, "progress": "none"}
    for algo, hparams, changes, text in (
        (
            fake.make(ENV, fake.Config()),
            WithStatus(),
            {"grid": {"status": [1.0, 2.0]}},
            "status is swept, and is a",
        ),
        (
            without_key(),
            fake.HParams(),
            {"pbt": sweep.PBT({"learning_rate": (0, 1)}, 80)},
            "State has no field key",
        ),
    ):
        with pytest.raises(RunError, match=text):
            sweep.plan(algo, hparams, **arguments, **changes)


def test_a_search_is_an_object():
    with pytest.raises(TypeError, match=r"halving=True: expected a jrl.sweep.Halving"):
        run(halving=True)


def test_a_sweep_is_not_continued_as_another_one(reference, tmp_path):
    with pytest.raises(RunError, match="already holds a sweep"):
        run(reference.out)
    with pytest.raises(
        RunError, match=r"its learning_rate is \[0.1, 0.1, .* this command's \[0.1, 0.1, 0.1, 0.3"
    ):
        run(reference.out, resume=True, grid={"learning_rate": [0.1, 0.3]})
    with pytest.raises(RunError, match="its seeds is"):
        run(reference.out, resume=True, seeds=[0, 1, 5])
    # its table would say that the evaluations there are were of so many episodes
    for episodes in (5, 0):
        with pytest.raises(RunError, match=f"its eval_episodes is 4, this command's {episodes}"):
            run(reference.out, resume=True, eval_episodes=episodes)
    with pytest.raises(RunError, match="its width is 'auto', this command's 3"):
        run(reference.out, resume=True, width=3)
    run(reference.out, resume=True, width=1)  # what "auto" is on a CPU
    again = run(reference.out, resume=True)
    assert bits(again) == bits(reference)
    assert again.summary["training_bytes"] == 0  # nothing was left to train


def test_a_sweep_that_goes_on_with_other_versions_says_so(reference, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(reference.out, out)
    record = records.read_sweep(out)
    record["versions"]["jax"] = "0.0.1"
    records.write_json(out / records.SWEEP, record)
    with pytest.warns(RunWarning, match=r"other versions \(jax 0.0.1 -> ") as caught:
        run(out, resume=True)
    assert caught[0].filename == __file__


def test_a_full_disk_loses_nothing_saved(tmp_path, monkeypatch):
    out, save, calls = tmp_path / "sweep", checkpoint.save, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", failing)
    with pytest.raises(
        RunError, match=f"No space left on device.*before is intact; make room, then.*resume {out}"
    ):
        run(out, chunk=2)
    monkeypatch.undo()
    resumed = sweep.resume(
        out, algorithm=fake, env=ENV, devices=jax.devices()[:1], progress="none", figures=False
    )
    assert bits(resumed) == bits(run())


def test_a_sweep_in_chunks_goes_on_in_them_however_much_memory_is_free(tmp_path, monkeypatch):
    out, save, limit = tmp_path / "sweep", checkpoint.save, [10**9]
    monkeypatch.setattr("jrl.sweep.planning.available_bytes", lambda devices: limit[0])
    whole = run()
    limit[0] = whole.plan.bytes_total - 100

    def failing(*args, **kwargs):
        save(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save", failing)
    with pytest.raises(RunError, match="No space left on device"):
        run(out)
    monkeypatch.setattr(checkpoint, "save", save)
    limit[0] = 10**9
    with pytest.raises(RunError, match=r"has held 3 members at once, not 2, .*leave out --chunk"):
        run(out, resume=True, chunk=2)
    resumed = sweep.resume(
        out, algorithm=fake, env=ENV, devices=jax.devices()[:1], progress="none", figures=False
    )
    assert (whole.plan.num_chunks, resumed.plan.num_chunks, resumed.plan.chunk) == (1, 2, 3)
    assert bits(resumed) == bits(whole)


def test_memory_is_planned_and_bounds_the_members_held(monkeypatch):
    single = sweep.plan(
        fake, env=ENV, env_steps=STEPS, measure=False, devices=jax.devices()[:1], config={"sizes": (4096,)}
    )
    assert 4 * 4096 < single.bytes_per_member < 5 * 4096
    many = run(config={"sizes": (4096,)}).plan
    of_members = many.bytes_total - planning.PROCESS_BYTES
    assert 6 * many.bytes_per_member < of_members < 20 * many.bytes_per_member
    limit = planning.PROCESS_BYTES + int(0.6 * of_members)
    monkeypatch.setattr("jrl.sweep.planning.available_bytes", lambda devices: limit)
    chunked = run(config={"sizes": (4096,)})
    assert chunked.plan.num_chunks > 1
    assert planning.PROCESS_BYTES < chunked.plan.bytes_total <= limit
    monkeypatch.setattr("jrl.sweep.planning.available_bytes", lambda devices: 1000)
    with pytest.raises(RunError, match=r"one member takes 8.* MiB and 1000 B may be used"):
        run(config={"sizes": (4096,)})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system says how much memory it takes")
@pytest.mark.parametrize(
    "changes",
    [{"chunk": 192, "seeds": 192}, {"halving": sweep.Halving(2.0, 2), "seeds": 48}],
    ids=["two chunks, saved", "halving"],
)
def test_training_takes_as_much_memory_as_planned(reference, tmp_path, changes):
    """A process takes more than is planned for it where programs are small: 200 MiB of members show the rest."""
    settings = {"config": {"sizes": (1 << 18,)}, "env_steps": 16, "eval_episodes": 1}
    finished = run(tmp_path / "sweep" if "chunk" in changes else None, **settings | changes)
    plan, summary = finished.plan, finished.summary
    held = plan.chunk * plan.bytes_per_member
    assert 96 << 20 < held < plan.bytes_total
    assert summary["training_bytes"] == pytest.approx(plan.bytes_total, rel=0.15)
    # a checkpoint is written from where the states are, in pieces of 16 MiB, some at a time: less than a copy of them
    assert summary["saving_bytes"] < plan.bytes_total + (128 << 20)


def test_a_plan_predicts_without_running():
    plan = sweep.plan(fake, env=ENV, env_steps=STEPS, seeds=5, devices=jax.devices()[:2])
    assert (plan.members, plan.devices, plan.num_chunks, plan.env_steps) == (5, 2, 1, 5 * STEPS)
    assert plan.seconds > 0
    with pytest.raises(RunError, match="env_steps=0: must be a whole number of at least 1"):
        sweep.plan(fake, env=ENV, env_steps=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_seeds'"):
        sweep.plan(fake, env=ENV, env_steps=STEPS, num_seeds=5)
    for words in ("5 on 2 devices", "1 of 5 members", "may be used", "predicted"):
        assert words in str(plan)


# ------------------------------------------------------------------------------------------------ command


@pytest.fixture
def _environment(monkeypatch, tmp_path):
    """Keep what the command sets in the environment, and the folder it works in, to the test."""
    for name in (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "NPROC",
        "XLA_FLAGS",
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(configuration.ALGORITHMS, "fake", "fake_algorithm")
    monkeypatch.setattr("jrl.sweep.command.Options.env", "Fake-v0", raising=False)
    monkeypatch.setattr(
        "jrl.envs.make", lambda env, **kwargs: ENV if env in ("Fake-v0", ENV) else jrl.make(env)
    )


@pytest.mark.usefixtures("_environment")
@pytest.mark.optimized(False)
def test_the_command(capsys, tmp_path):
    args = ["fake", "--env", "Fake-v0", "--env-steps", str(STEPS), "--seeds", "3", "--eval-episodes", "4"]
    args += ["--grid", "learning_rate=0.1,0.2", "--devices", "2", "--prng", "hashed"]
    assert cli.main(["plan", *args]) == 0
    assert "6 on 2 devices" in capsys.readouterr().out
    assert cli.main(["sweep", *args, "--out", "sweep", "--progress", "lines"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "members        6 on 2",
        "0/6 done, best",
        "2 settings, 6 members",
        "planned",
        "sweep folder sweep",
    ):
        assert words in shown
    assert (tmp_path / "sweep" / "learning_curves.png").exists()
    assert records.read_sweep(tmp_path / "sweep")["prng"] == "hashed"
    assert cli.main(["resume", "sweep"]) == 0
    assert cli.main(["compare", "sweep", "sweep"]) == 0
    assert cli.main(["resume", "sweep", "--env-steps", "5"]) == 2
    assert "a sweep cannot be extended" in capsys.readouterr().err


@pytest.mark.usefixtures("_environment")
@pytest.mark.optimized(False)
def test_static_fields_are_swept_in_groups(capsys, tmp_path):
    args = [
        "sweep",
        "fake",
        "--env",
        "Fake-v0",
        "--env-steps",
        str(STEPS),
        "--eval-episodes",
        "2",
        "--out",
        "groups",
    ]
    args += ["--static-grid", "num_envs=1,2", "--static-grid", "sizes=[3],[2,2]", "--seeds", "2"]
    assert cli.main([*args, "--progress", "none"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("s of compiling") == 4
    assert "4 settings, 8 members" in shown
    out = tmp_path / "groups"
    inner = out / "num_envs=2,sizes=2x2"
    assert records.read_sweep(inner)["config"] == {"num_envs": 2, "sizes": [2, 2], "warmup": 0}
    table, part = tables.read(out), tables.read(inner)
    assert table.swept == ("num_envs", "sizes")
    assert table.columns["member"] == list(range(8))
    assert table.columns["sizes"] == ["[3]", "[3]", "[2,2]", "[2,2]"] * 2
    last = table.where(num_envs=2, sizes="[2,2]")
    for name in ("seed", "episode_return_mean", "train_return", "env_steps"):
        assert last.columns[name] == part.columns[name]
    np.testing.assert_array_equal(last.curves, part.curves)  # the coarsest of them
    assert table.curve_env_steps.tolist() == part.curve_env_steps.tolist()
    # one environment: two chunks of 4 steps in the place of one of 8
    finer = tables.read(out / "num_envs=1,sizes=3").curves[0]
    pairs = finer.reshape(-1, 2)
    expected = [np.nan if np.isnan(pair).all() else np.nanmean(pair) for pair in pairs]
    np.testing.assert_array_equal(table.curves[0], expected)
    names = {"learning_curves", "sensitivity_num_envs", "sensitivity_sizes", "heat_map_num_envs_sizes"}
    assert names < {path.stem for path in out.glob("*.png")}

    # as if it had been killed in the third sweep
    (out / "table.csv").unlink()
    shutil.rmtree(inner)
    assert cli.main(["resume", str(out), "--progress", "none"]) == 0
    assert tables.read(out).columns == table.columns
    assert tables.read(inner).columns == part.columns
    assert cli.main(["compare", str(out), str(inner)]) == 0
    assert cli.main([*args, "--resume", "--static-grid", "warmup=0"]) == 2
    assert "this command's of" in capsys.readouterr().err
    assert cli.main(args) == 2
    assert "already holds a sweep" in capsys.readouterr().err
    assert cli.main(["eval", str(out), "--member", "8"]) == 2
    assert "members 0 to 7" in capsys.readouterr().err
    assert groups.locate(out, 7) == (inner, 1)


def grouped(out, static_grid, **changes):
    arguments = {"seeds": 1, "env_steps": 80, "eval_episodes": 2, "env": ENV, "progress": "none", "out": out}
    arguments |= {"devices": jax.devices()[:1], "figures": False}
    return groups.execute(fake, static_grid=static_grid, **arguments | changes)[1]


def test_groups_are_checked_before_one_is_trained_and_leave_the_folder_free(tmp_path):
    out = tmp_path / "groups"
    for values, text in (
        ([2, -1], "num_envs=-1: must be at least 1"),
        ([2, 2], "'num_envs': 2} would share the folder num_envs=2"),
        ([2, 2.0], "makes the same Config as {'num_envs': 2}"),
    ):
        with pytest.raises(ValueError, match=text):
            grouped(out, {"num_envs": values})
        assert not out.exists()
    with pytest.raises(RunError, match="the warm-up alone takes 1000"):  # known only once it is compiled
        grouped(out, {"num_envs": [2]}, config={"warmup": 1000})
    assert {path.name for path in out.iterdir()} <= {".lock"}
    assert grouped(out, {"num_envs": [2]}).columns["num_envs"] == [2]


def test_groups_replace_what_the_folder_holds(tmp_path):
    out = tmp_path / "groups"
    jrl.run(fake, ENV, env_steps=80, eval_episodes=2, out=out, progress="none")
    grouped(out, {"num_envs": [1]}, overwrite=True)
    assert {path.name for path in out.iterdir()} <= {
        *(".lock", "groups.json", "table.csv", "num_envs=1"),
    }
    with records.locked(out), pytest.raises(RunError, match="in use by another process"):
        grouped(out, {"num_envs": [2]}, overwrite=True)
    with pytest.raises(RunError, match="the warm-up alone"):
        grouped(out, {"num_envs": [2]}, overwrite=True, config={"warmup": 1000})
    assert not (out / "table.csv").exists()  # of the sweeps that were replaced
    assert not (out / "num_envs=1").exists()
    assert grouped(out, {"num_envs": [2]}).columns["num_envs"] == [2]


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--grid", "learnig_rate=1"], "no hyperparameter 'learnig_rate'. Nearest: learning_rate"),
        (["--grid", "learning_rate=a"], "--grid learning_rate=a: 'a' is not a number"),
        (["--grid", "learning_rate="], "--grid learning_rate=: expected NAME=VALUE"),
        (["--random", "2", "--space", "learning_rate=uniform:2:1"], "uniform(low=2, high=1): low must be below high"),
        (["--static-grid", "num_env=1"], "--static-grid num_env: Config has no such field. Nearest: num_envs"),
        (["--rungs", "3"], "add --halving"),
        (["--min-env-steps", "3"], "add --halving"),
        (["--halving", "--rungs", "1"], "num_rungs=1): needs at least 2"),
        (["--explore", "learning_rate=0:1"], "add --pbt"),
        (["--pbt"], "--pbt: no hyperparameter to change"),
        (["--pbt", "--explore", "learning_rate=1:0"], "low must be below high"),
        (["--devices", "99"], "--devices 99: there are"),
        (["--devices", "-1"], "--devices -1: there are"),
        (["--process-id", "1"], "--coordinator, --num-processes and --process-id are of several processes; add --dist"),
        (["--side-by-side", "x"], "--side-by-side x: expected a number, all or auto"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(capsys, flags, text):
    assert cli.main(["sweep", "fake", "--env", "Fake-v0", *flags]) == 2
    assert text in capsys.readouterr().err
