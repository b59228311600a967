"""The table of a sweep: its rules, its files read back exactly, what cannot be read is named."""

import csv
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from sweep_tables import make_table
from test_plots import make_run

from jrl import records, tables
from jrl.records import RunError
from jrl.tables import Table

NAN = math.nan


def same(one, other):
    """Whether two tables are equal to the last bit, types and NaN included."""
    assert list(one.columns) == list(other.columns)
    assert one.swept == other.swept
    for name in one.columns:
        # repr tells 1 from 1.0, None from NaN, and every float from every other
        assert [repr(v) for v in one.columns[name]] == [repr(v) for v in other.columns[name]], name
    np.testing.assert_array_equal(one.curves, other.curves)
    np.testing.assert_array_equal(one.curve_env_steps, other.curve_env_steps)
    assert one.curve_env_steps.dtype == other.curve_env_steps.dtype


def awkward():
    """Numbers that a careless writer loses."""
    table = make_table(
        {"learning_rate": [1e-4, 0.1 + 0.2], "env.length": [0.5]}, seeds=2, points=3, frozen=[2]
    )
    columns = {name: list(values) for name, values in table.columns.items()}
    columns["learning_rate"] = [1e-300, 0.1 + 0.2, 1 / 3, 2]
    columns["episode_return_mean"] = [NAN, math.inf, None, -0.0]
    columns["env_steps"][0] = 2**53 + 1
    columns["frozen_why"][2] = 'loss is nan, "policy"\nat γ = 1'
    curves = np.array([[NAN, 1 / 3, -math.inf], [1e22, NAN, 0.1], [NAN] * 3, [np.float32(0.1), -0.0, 7]])
    return dataclasses.replace(table, columns=columns, curves=curves)


# --------------------------------------------------------------------------------------------- the table


def test_a_table_has_rows_and_columns():
    table = make_table({"learning_rate": [1e-4, 1e-3, 1e-2], "env.length": [0.5, 1.0]}, seeds=4, frozen=[5])
    assert len(table) == 24
    assert table.swept == ("learning_rate", "env.length")
    row = table.row(5)
    assert list(row)[:5] == ["member", "seed", "learning_rate", "env.length", "episode_return_mean"]
    assert list(row)[-4:] == ["env_steps", "status", "frozen_at", "frozen_why"]
    assert (row["member"], row["seed"], row["learning_rate"], row["env.length"]) == (5, 1, 1e-4, 1.0)
    assert (row["status"], row["frozen_why"], table.num_frozen) == ("frozen", "loss is nan", 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.swept = ()


def test_rows_are_chosen_by_value():
    table = make_table({"learning_rate": [1e-4, 1e-3, 1e-2], "env.length": [0.5, 1.0]}, seeds=4)
    part = table.where(
        learning_rate=np.float32(1e-3), **{"env.length": 1}
    )  # float32's rounding is no difference
    assert part.columns["member"] == [12, 13, 14, 15]
    np.testing.assert_array_equal(part.curves, table.curves[12:16])
    assert part.where(seed=2).columns["member"] == [14]
    assert len(table.where(status="ok")) == len(table.where(frozen_at=None)) == 24
    with pytest.raises(
        ValueError, match=r"there is no column 'gamma'\. Columns: member, seed, learning_rate"
    ):
        table.where(gamma=0.9)
    with pytest.raises(
        ValueError, match=r"learning_rate=0\.1\): no row has this value\. There are 0\.0001, "
    ):
        table.where(learning_rate=0.1)


def test_groups_are_sorted_by_their_values():
    table = make_table({"a": [3.0, 1.0, 2.0], "b": [1.0, 0.0]}, seeds=2)
    groups = table.groups()
    assert [tuple(values.values()) for values, _ in groups] == sorted(
        (a, b) for a in (1.0, 2.0, 3.0) for b in (0.0, 1.0)
    )
    assert all(len(part) == 2 and set(part.columns["a"]) == {values["a"]} for values, part in groups)
    assert [values for values, _ in table.groups(["b"])] == [{"b": 0.0}, {"b": 1.0}]
    assert [(values, len(part)) for values, part in make_table(seeds=5).groups()] == [({}, 5)]
    with pytest.raises(ValueError, match=r"groups\(by=\('c',\)\): there is no column 'c'\. Swept: a, b"):
        table.groups(["c"])


def test_columns_that_hold_none_are_grouped_and_named():
    table = make_table(seeds=3, frozen=[1])
    at = table.columns["frozen_at"][1]
    assert [(values, len(part)) for values, part in table.groups(["frozen_at"])] == [
        ({"frozen_at": at}, 1), ({"frozen_at": None}, 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=rf"frozen_at=7\): no row has this value\. There are {at}, None\."):
        table.where(frozen_at=7)
    with pytest.raises(ValueError, match=r"frozen_why='zz'\): no row has .* There are 'loss is nan', None\."):
        table.where(frozen_why="zz")
    assert tables.distinct(["b", 2, None, "a", 1.5, 2]) == [1.5, 2, "a", "b", None]


def test_final_returns_are_those_of_the_evaluation_if_there_is_one():
    table = make_table(seeds=3, frozen=[1])
    expected = [table.columns["episode_return_mean"][0], NAN, table.columns["episode_return_mean"][2]]
    np.testing.assert_array_equal(table.final_returns, expected)
    without = make_table(seeds=3, evaluated=False)
    assert not without.evaluated
    np.testing.assert_array_equal(without.final_returns, without.columns["train_return"])


def test_the_late_return_is_that_of_the_last_tenth():
    curves = np.array([[1.0, 2, 3, 4], [1, 2, NAN, 6], [1, 2, NAN, NAN]])
    np.testing.assert_array_equal(
        tables.late_return(np.array([500, 900, 950, 1000]), curves, 1000), [3.5, 6, NAN]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swept": ("gamma",)}, "a table has the columns member, seed, gamma, episode_return_mean.* these are"),
        ({"seed": [0]}, r"column 'seed' has 1 rows and 'member' 2"),
        ({"seed": [0, 0.5]}, r"column 'seed' holds 0\.5: an integer is expected"),
        ({"seed": [0, None]}, r"column 'seed' holds None: an integer is expected"),
        ({"status": ["ok", "died"]}, r"'status' holds 'died': one of ok, frozen, stopped is expected"),
        ({"frozen_why": ["", None]}, r"'frozen_why' holds '': text or None is expected"),
        ({"train_return": [1.0, "2"]}, r"'train_return' holds '2': a number is expected"),
        ({"curves": np.zeros((2, 3))}, r"curves have shape \(2, 3\); expected \[members, T\] = \[2, T\]"),
        ({"curve_env_steps": np.array([1, 2, 2, 3])}, "curve_env_steps does not increase"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused(change, message):
    table = make_table(seeds=2, points=4)
    fields = {name: change[name] for name in ("curves", "curve_env_steps", "swept") if name in change}
    columns = table.columns | {name: values for name, values in change.items() if name in table.columns}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(table, columns=columns, **fields)


def test_a_table_has_members_and_its_swept_values_names_of_their_own():
    table = make_table({"a": [1.0]}, seeds=1, points=2)
    with pytest.raises(ValueError, match="a table has at least one member"):
        table.take([])
    columns = {
        "member": [0],
        "seed": [0],
        "curve": [1.0],
        **{name: table.columns[name] for name in tables.RESULTS},
    }
    with pytest.raises(ValueError, match=r"swept=\('curve',\): a swept value needs a name of its own"):
        Table(columns, table.curve_env_steps, table.curves, ("curve",))


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_are_read_back_exactly(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"table.{kind}"
    float_steps = dataclasses.replace(make_table(points=2), curve_env_steps=np.array([0.5, 1e12]))
    empty = dataclasses.replace(make_table(seeds=2), curve_env_steps=np.arange(0), curves=np.zeros((2, 0)))
    big = make_table({"x": list(np.linspace(0, 1, 16))}, seeds=32, points=3)
    long = make_table(seeds=1, points=9000)  # longer than the csv module takes by itself
    tables_ = [make_table(seeds=1), float_steps, empty, big, long]
    # Parquet has one type a column: the 2 of the swept values is 2.0 there.
    tables_ += [awkward()] if kind == "csv" else []
    for table in tables_:
        getattr(table, f"to_{kind}")(path)
        same(getattr(Table, f"from_{kind}")(path), table)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert csv.field_size_limit() == 131072


def test_parquet_keeps_nan_and_none_apart(tmp_path):
    pytest.importorskip("pyarrow")
    table = awkward()
    table.to_parquet(tmp_path / "table.parquet")
    columns = table.columns | {"learning_rate": [float(v) for v in table.columns["learning_rate"]]}
    same(Table.from_parquet(tmp_path / "table.parquet"), dataclasses.replace(table, columns=columns))


def test_pandas_reads_the_csv_file_and_takes_the_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = awkward()
    table.to_csv(tmp_path / "table.csv")
    frame = pandas.read_csv(tmp_path / "table.csv", float_precision="round_trip")
    assert list(frame.columns) == [*table.columns, "curve", "curve_env_steps"]
    np.testing.assert_array_equal(frame["learning_rate"], table.columns["learning_rate"])
    assert json.loads(frame["curve"][1]) == [1e22, None, 0.1]
    assert json.loads(frame["curve_env_steps"][3]) == table.curve_env_steps.tolist()
    assert frame["frozen_why"][2] == table.columns["frozen_why"][2]

    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns)
    assert (str(frame["frozen_at"].dtype), str(frame["env_steps"].dtype)) == ("Int64", "int64")
    assert frame["env_steps"][0] == 2**53 + 1
    assert frame["frozen_at"].isna().tolist() == [True, True, False, True]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    table = make_table(seeds=2)
    table.to_csv(path)
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(records, "plain", fail)
    with pytest.raises(OSError, match="disk full"):
        make_table(seeds=3).to_csv(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["pyarrow", "pandas"])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    calls = {
        "pyarrow": [
            lambda: make_table().to_parquet(tmp_path / "t"),
            lambda: Table.from_parquet(tmp_path / "t"),
        ],
        "pandas": [make_table().to_pandas],
    }
    hint = {"pyarrow": r"pip install 'jrl-kernels\[parquet\]'", "pandas": "pip install pandas"}
    for call in calls[package]:
        with pytest.raises(ImportError, match=hint[package]):
            call()


def cut(text):
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: "", "is not a table of a sweep: it has no column member, seed, episode_return_mean"),
        (lambda _: "a,b\n1,2\n", "is not a table of a sweep: it has no column member"),
        (lambda _: "\x00\x01\x02", "is not a table of a sweep|cannot be read as a table"),
        (lambda text: text.split("\n")[0], "has no rows"),
        (cut, r"cannot be read as a table \(unexpected end of data\)"),
        (lambda text: text.replace("member,seed", "seed,member"), "its columns are in another order"),
        (lambda text: text.replace("\n1,1,", "\n1,one,"), "row 2, column seed: 'one' is not an integer"),
        (lambda text: text.replace("9.5", "9,5", 1), "row 1 has 15 cells and the header 14"),
        (lambda text: text.replace("9.5", "x", 1), "row 1, column episode_return_std: 'x' is not a number"),
        (lambda text: text.replace("[null", "null", 1), "row 1, column curve: 'null, .* Extra data"),
        (
            lambda text: text.replace("[null, ", "[", 1),
            "the curves of its rows are not of the same env steps",
        ),
        (lambda text: text.replace(",ok,", ",good,", 1), "'status' holds 'good': one of ok, frozen, stopped"),
        (lambda text: text.replace("\n1,1,", "\n1,,"), "'seed' holds None: an integer is expected"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, damage, message):
    path = tmp_path / "table.csv"
    make_table(seeds=2, points=4).to_csv(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=message) as raised:
        Table.from_csv(path)
    assert str(path) in str(raised.value)
    assert "restore the file, or run the sweep again" in str(raised.value)


def test_what_is_no_text_and_what_is_not_there_is_named(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00PAR1")
    with pytest.raises(RunError, match="cannot be read as a table"):
        Table.from_csv(tmp_path / "table.csv")
    with pytest.raises(RunError, match="cannot be read as a table"):
        Table.from_csv(tmp_path / "nothing.csv")
    pytest.importorskip("pyarrow")
    with pytest.raises(RunError, match="cannot be read as a table"):
        Table.from_parquet(tmp_path / "table.csv")
    with pytest.raises(RunError, match="cannot be read as a table"):
        Table.from_parquet(tmp_path / "nothing.parquet")


# ------------------------------------------------------------------------------------------------ folders


def test_the_folder_of_a_sweep_is_its_table(tmp_path):
    table = make_table({"a": [1.0, 2.0]}, seeds=2)
    table.to_csv(tmp_path / "table.csv")
    same(tables.read(tmp_path), table)


def test_a_run_is_a_table_of_one_member(tmp_path):
    run = make_run(tmp_path / "run", seed=3)
    summary = {"env_steps": 500_000, "interrupted": False}
    summary["evaluation"] = {
        "episode_return_mean": 480.0,
        "episode_return_std": 1.5,
        "episode_return_min": 470.0,
    }
    summary["evaluation"] |= {"episode_return_max": 490.0, "num_episodes": 100, "greedy": True}
    records.write_json(run / "summary.json", summary)
    table = tables.read(run)
    row = table.row(0)
    assert (len(table), table.swept) == (1, ())
    assert (row["seed"], row["episode_return_mean"], row["num_episodes"]) == (3, 480.0, 100)
    assert (row["env_steps"], row["status"], row["frozen_at"]) == (500_000, "ok", None)
    metrics = records.read_metrics(run)
    assert row["train_return"] == pytest.approx(np.mean([r["episode_return"] for r in metrics[-2:]]))
    assert table.curve_env_steps.tolist() == [r["env_steps"] for r in metrics]
    assert np.isnan(table.curves[0, 0])
    table.to_csv(tmp_path / "table.csv")
    same(Table.from_csv(tmp_path / "table.csv"), table)

    records.write_json(run / "summary.json", {"env_steps": 250_000, "interrupted": True, "evaluation": None})
    row = tables.read(run).row(0)
    assert (row["status"], row["episode_return_mean"]) == ("stopped", None)


def test_a_folder_that_is_neither_is_named(tmp_path):
    with pytest.raises(
        RunError, match=r"neither the folder of a sweep nor of a run: it has no table\.csv and no"
    ):
        tables.read(tmp_path)
    with pytest.raises(RunError, match=r"nowhere is neither .* it is not a folder"):
        tables.read(tmp_path / "nowhere")
    run = make_run(tmp_path / "run", evaluation=None)
    with pytest.raises(RunError, match=r"is a run without summary\.json.* Continue it with `jrl resume"):
        tables.read(run)


def test_numbers_are_written_in_three_digits_and_large_ones_in_all():
    written = {482.4: "482", 999.4: "999", 999.7: "1000", -999.7: "-1000", 12_345.0: "12345", 3e-7: "3e-07"}
    written |= {3.59e6: "3.59 M", 999.4e6: "999 M", 999.7e6: "1e+09", "relu": "relu"}
    assert {value: tables.number(value) for value in written} == written
