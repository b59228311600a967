"""The ``jrl`` command: flags, help, errors and exit codes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings

import fake_algorithm as fake
import jax
import pytest
from sweep_tables import make_table
from test_plots import make_run

from jrl import checkpoint, cli, configuration, driver, flags, records, tables
from jrl.algos import dqn, ppo

ENV = ["--env", "CartPole-v1"]
TRAIN = ["train", "ppo", *ENV]
TINY = ["--num-envs", "2", "--unroll-length", "8", "--num-minibatches", "1", "--num-epochs", "1"]
TINY += ["--hidden-sizes", "4", "--eval-episodes", "2", "--progress", "lines"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    """Keep what the command sets in the environment, and the folder it works in, to the test."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "NPROC"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.chdir(tmp_path)


def fails(capsys, *args, code=2):
    assert cli.main([str(arg) for arg in args]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# -------------------------------------------------------------------------------------------------- help


def test_help_imports_no_jax():
    code = (
        "import sys; from jrl import cli; assert cli.main(['--help']) == 0; cli.main(['train', '--help']);"
        "assert not {'jax', 'flax', 'gymnax', 'matplotlib', 'orbax'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=fake.environ()
    )
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout


def test_no_command_and_the_version(capsys):
    assert cli.main([]) == 0
    assert "usage: jrl COMMAND" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jrl 0.")
    assert cli.main(["train"]) == 2
    assert "ALGORITHM is a2c or dqn or" in capsys.readouterr().out


@pytest.mark.parametrize("module", [ppo, dqn])
def test_every_field_is_a_flag_with_its_docstring_as_help(module, capsys):
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", name, "--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert [
        title for title in ("run options", "config options", "hparams options") if title not in text
    ] == []
    for cls in (flags.Options, module.Config, module.HParams):
        docs = flags.field_docs(cls)
        for field in dataclasses.fields(cls):
            if cls is module.HParams and field.name == "env":
                continue  # the environment's parameters are set by --env-param
            assert f"--{field.name.replace('_', '-')}" in text
            assert " ".join(docs[field.name].split())[:40] in text


def test_flags_reach_the_config_and_the_hparams():
    args = ["--env", "X", "--num-envs", "3", "--hidden-sizes", "8", "9", "--no-clip-value", "--gamma", "0.5"]
    args += ["--env-param", "a=1", "--env-param", "b=2", "--env-kwarg", 'c={"d": 1}']
    options, _, config, hparams = flags.parse("jrl train ppo", flags.Options, ppo, args)
    assert options.env_param == ("a=1", "b=2")
    assert options == flags.Options(env="X", env_param=("a=1", "b=2"), env_kwarg=('c={"d": 1}',))
    assert ppo.Config(**config) == ppo.Config(num_envs=3, hidden_sizes=(8, 9), clip_value=False)
    assert ppo.HParams(**hparams) == ppo.HParams(gamma=0.5)
    assert flags.json_value("raw") == "raw"
    assert flags.json_value("true") is True


# ---------------------------------------------------------------------------------------------- commands


def test_train_eval_plot_resume(tmp_path, capsys):
    args = [*TINY, "--env-steps", "64", "--env-param", "length=0.75", "--learning-rate", "0.002"]
    assert cli.main([*TRAIN, "--seed", "3", *args]) == 0
    printed = capsys.readouterr().out
    for words in (
        "ppo on CartPole-v1, seed 3",
        "64 env steps  100%",
        "evaluation   return",
        "jrl resume runs/",
    ):
        assert words in printed
    out = tmp_path / "runs" / "CartPole-v1-ppo-3"
    record = json.loads((out / "run.json").read_text())
    assert (record["hparams"]["env/length"], record["hparams"]["learning_rate"]) == (0.75, 0.002)
    assert record["config"]["hidden_sizes"] == [4]

    assert cli.main(["eval", str(out), "--episodes", "2"]) == 0
    evaluation = records.read_summary(out)["evaluation"]
    printed = capsys.readouterr().out
    # the run's own seed repeats the final evaluation
    assert f"return {evaluation['episode_return_mean']:.4g} ±" in printed
    assert "over 2 episodes, greedy" in printed
    assert cli.main(["eval", str(out), "--episodes", "3", "--sample", "--seed", "8", "--step", "4"]) == 0
    assert "over 3 episodes, sampled actions" in capsys.readouterr().out

    (out / "learning_curve.png").unlink()
    assert cli.main(["plot", str(out)]) == 0
    assert (out / "learning_curve.png").exists()
    assert cli.main(["plot", str(out), str(out), "--out", "both.svg"]) == 0
    assert (tmp_path / "both.svg").exists()
    capsys.readouterr()
    assert cli.main(["plot", str(out), "--out", str(tmp_path)]) == 0
    assert cli.main(["plot", str(out), "--out", "plain"]) == 0
    for name in capsys.readouterr().out.split():  # a folder gets the file, a name its suffix
        assert (tmp_path / name).is_file()
    assert (tmp_path / "learning_curve.png").exists()

    assert cli.main(["resume", str(out)]) == 0
    assert "is already finished: 64 env steps. Extend it: jrl resume" in capsys.readouterr().out
    assert cli.main(["resume", str(out), "--env-steps", "96"]) == 0
    assert records.read_summary(out)["env_steps"] == 96
    assert checkpoint.latest_step(out / "checkpoints") == 6

    # the default folder does not collide
    assert cli._free_folder("CartPole-v1-ppo-3").name == "CartPole-v1-ppo-3-2"
    assert cli._free_folder("my env/1").name == "my-env-1"

    # what is wrong with a used folder is said before anything is computed
    error = fails(capsys, "train", "ppo", "--env", "CartPole-v1", "--out", out)
    assert f"run folder {out} already holds a run" in error
    assert f"`jrl resume {out}`" in error
    error = fails(capsys, "resume", out, "--env-steps", "32")
    assert "has already trained for 96. A run can only be extended" in error
    error = fails(capsys, "eval", out, "--step", "5")
    assert "000000000005 does not exist. The checkpoints there are: [4, 6]" in error
    (out / "checkpoints" / "000000000006" / "metadata.json").write_text("no")
    assert cli.main(["eval", str(out), "--episodes", "2"]) == 0
    assert "warning: checkpoint" in capsys.readouterr().err


def start_without_a_reader(*args, **environ):
    """Start the command with its standard output a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "jrl", *args]
    try:
        return subprocess.run(
            command,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env=fake.environ() | environ,
        )
    finally:
        os.close(write)


@pytest.mark.parametrize("shown", ["lines", "bar"])
def test_a_run_whose_output_nobody_reads_trains_to_its_end(shown, tmp_path):
    args = ["--env-steps", "64", "--out", "run", *TINY, "--progress", shown]
    done = start_without_a_reader(*TRAIN, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert records.read_summary(tmp_path / "run")["evaluation"]["num_episodes"] == 2
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoints") == 4
    assert (tmp_path / "run" / "learning_curve.png").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "algos", "train ppo --help"])
def test_a_command_that_only_lists_ends_with_its_reader(command, unbuffered):
    done = start_without_a_reader(*command.split(), PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capsys):
    def failing(args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli.COMMANDS, "train", failing)
    assert "Broken pipe" in fails(capsys, "train")


def test_what_draws_a_run_says_of_a_sweep_what_it_is(tmp_path, capsys):
    for name in ("sweep.json", "groups.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        for command in ("plot", "inspect"):
            error = fails(capsys, command, str(tmp_path / name))
            assert "is not a run folder but holds a sweep: it has no run.json" in error
            assert "jrl eval FOLDER --member N plays one of its members" in error


def make_sweep(folder, *args, **kwargs):
    folder.mkdir(parents=True)
    make_table(*args, **kwargs).to_csv(folder / tables.TABLE)
    return folder


def finish(run, mean):
    """Give a run folder the summary of a finished run."""
    evaluation = {"episode_return_mean": mean, "episode_return_std": 0.0, "episode_return_min": mean}
    evaluation |= {"episode_return_max": mean, "num_episodes": 100}
    summary = {"env_steps": 500_000, "interrupted": False, "evaluation": evaluation}
    records.write_json(run / "summary.json", summary)
    return run


def test_compare_sweeps_and_runs(tmp_path, capsys):
    ppo_sweep = make_sweep(tmp_path / "ppo", {"learning_rate": [1e-4, 1e-3, 1e-2]}, seeds=4, frozen=[9])
    dqn_sweep = make_sweep(tmp_path / "dqn", seeds=6, best=400.0)
    run = finish(make_run(tmp_path / "run"), 1234.0)
    assert cli.main(["compare", str(ppo_sweep), str(dqn_sweep), str(run), "--out", "figures"]) == 0
    printed, error = capsys.readouterr()
    assert not error
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    for words in ("12 members", "1 no return", "6 members", "1 member ", "gap to 1234", "better than"):
        assert words in printed
    assert next(line for line in lines if line.startswith("run")).split()[1:4] == ["1234"] * 3
    names = ["performance_profile.png", "interval_estimates.png", "learning_curves.png"]
    assert lines[-3:] == [os.path.join("figures", name) for name in names]
    assert sorted(entry.name for entry in (tmp_path / "figures").iterdir()) == sorted(names)

    # the best setting of each, and folders of the same name told apart by their paths
    same = make_sweep(tmp_path / "other" / "dqn", seeds=2, best=300.0)
    args = ["compare", str(ppo_sweep), "dqn", "other/dqn", "--best", "--target", "600"]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    joined = "".join(line.split()[0] for line in printed.splitlines() if line[:1].strip())
    for words in ("learning_rate=0.001", "other/dqn"):
        assert words in joined, printed
    assert "gap to 600" in printed
    assert "4 members" in printed
    assert not (tmp_path / "figures" / "same").exists()
    assert same.exists()


def test_compare_warns_of_returns_that_are_not_of_one_kind(tmp_path, capsys):
    runs = [finish(make_run(tmp_path / env, env=env), 10.0) for env in ("CartPole-v1", "Acrobot-v1")]
    sweep = make_sweep(tmp_path / "sweep", seeds=2, evaluated=False)
    assert cli.main(["compare", *map(str, runs), str(sweep)]) == 0
    error = capsys.readouterr().err
    assert f"warning: {sweep} has no final evaluation: its training return is compared" in error
    assert "warning: the folders are of different environments (CartPole-v1, Acrobot-v1)" in error
    record = {**records.read_run(runs[0]), "format": records.SWEEP_FORMAT}
    record["environment"] = {"id": "Pendulum-v1", "name": "Pendulum-v1", "kwargs": {}}
    record |= {"seeds": [0, 1], "settings": [0, 0], "swept": {}, "halving": None, "width": "auto"}
    records.write_json(sweep / records.SWEEP, record)
    outer = make_sweep(tmp_path / "outer")
    records.write_json(outer / records.GROUPS, {"format": records.GROUPS_FORMAT, "groups": [], "command": []})
    (outer / "num_envs=1").mkdir()
    records.write_json(outer / "num_envs=1" / records.SWEEP, record)
    assert cli.main(["compare", str(outer), str(sweep)]) == 0
    assert "different environments" not in capsys.readouterr().err
    assert cli.main(["compare", str(outer), str(runs[0])]) == 0
    assert "of different environments (Pendulum-v1, CartPole-v1)" in capsys.readouterr().err


def test_no_setting_of_an_algorithm_hides_a_flag_of_the_commands():
    """Their flags are side by side: `jrl sweep grpo` would have two of one name."""
    import dataclasses

    from jrl import configuration, flags
    from jrl.sweep import command

    for name in configuration.ALGORITHMS:
        module = configuration.load(name)
        own = {field.name for cls in (module.Config, module.HParams) for field in dataclasses.fields(cls)}
        for options in (flags.Options, command.Options):
            assert not {field.name for field in dataclasses.fields(options)} & own - {"env"}, name


def test_compare_names_folders_that_it_cannot_use(tmp_path, capsys):
    sweep = make_sweep(tmp_path / "sweep", seeds=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "table.csv").write_text("a,b\n1,2\n")
    unfinished = make_run(tmp_path / "unfinished", evaluation=None)
    frozen = make_sweep(tmp_path / "frozen", seeds=1, frozen=[0], points=20)
    for folder, message in (
        ("nowhere", "nowhere is neither the folder of a sweep nor of a run: it is not a folder"),
        ("empty", "empty is neither the folder of a sweep nor of a run: it has no table.csv and no run.json"),
        ("foreign", "table.csv is not a table of a sweep: it has no column member"),
        (unfinished, "is a run without summary.json: it has not come to its end"),
        (frozen, "frozen: no member of 1 has a final return, neither"),
    ):
        assert message in fails(capsys, "compare", sweep, folder)
    assert "jrl compare needs at least two folders" in fails(capsys, "compare", sweep)
    assert "there is no best setting" in fails(capsys, "compare", sweep, frozen, "--best")


def test_nan_has_its_own_exit_code(capsys):
    args = [*TINY, "--env-steps", "64", "--out", "run", "--learning-rate", "1e30"]
    assert cli.main([*TRAIN, *args]) == 3
    error = capsys.readouterr().err
    assert re.match(r"error: \w*loss is (nan|infinite) at env step \d+ ", error)
    assert "(seed 0, learning_rate=1e+30)" in error


def test_environments_algorithms_and_doctor(capsys, monkeypatch):
    from jrl import envs

    monkeypatch.setattr(envs, "ids", lambda: ["CartPole-v1"])
    for command, words in (("envs", "CartPole-v1"), ("algos", "dqn"), ("doctor", "jaxlib")):
        assert cli.main([command]) == 0
        assert words in capsys.readouterr().out


def test_loggers_are_chosen_by_flags(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    given = {}

    def run(algorithm, env, **arguments):
        given.update(arguments)
        return driver.RunResult(None, {}, None, True, False, None, None, None)

    monkeypatch.setattr(driver, "run", run)
    assert cli.main([*TRAIN, "--tensorboard", "--keep", "7"]) == 130
    assert [logger.spec() for logger in given["loggers"]] == [{"kind": "tensorboard"}]
    assert given["keep"] == 7
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main([*TRAIN, "--wandb"]) == 2


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "there is no command 'trian'. Commands: train, sweep, plan, resume, eval"),
        (["train", "pp", "--env", "CartPole-v1"], "unknown algorithm 'pp'. Nearest: ppo."),
        (["train", "ppo", "--env", "CartPol-v1"], "environment id 'CartPol-v1'. Nearest: CartPole-v1"),
        (["train", "dqn", "--env", "Pendulum-v1"], "Q-learning maximises over Discrete actions"),
        (["train", "rainbow", "--env", "Pendulum-v1"], "error: rainbow on Pendulum-v1 with actions"),
        ([*TRAIN, "--num-minibatches", "7"], "num_minibatches=7 does not divide"),
        (["train", "dqn", *ENV, "--capacity", "9"], "capacity=9 is smaller than batch_size"),
        ([*TRAIN, "--env-steps", "0"], "env_steps=0: must be at least 1"),
        (
            [*TRAIN, "--env-param", "lenght=1"],
            "the environment has no parameter 'lenght'. Nearest: length",
        ),
        ([*TRAIN, "--env-param", "length"], "--env-param length: expected NAME="),
        ([*TRAIN, *["--env-param", "length=1"] * 2], "--env-param length=1: length is given twice, as 1 before"),
        (
            [*TRAIN, "--env-param", "gravity=low"],
            "parameter gravity='low' is not a number",
        ),
        (
            [*TRAIN, "--env-param", "max_steps_in_episode=1.5"],
            "parameter max_steps_in_episode='1.5' is not an integer",
        ),
        ([*TRAIN, "--out", "/dev/null/run"], "/dev/null is not a folder"),
        (["resume", "nowhere"], "nowhere is not a run folder: it has no run.json"),
        (["resume", 300 * "a"], "File name too long"),
        (["eval", "nowhere"], "nowhere is not a run folder"),
        (["eval", "nowhere", "--episodes", "0"], "--episodes 0: must be at least 1"),
        (["eval", "nowhere", "--episodes", "99999999999999"], "must be at least 1 and below 2**31."),
        (["eval", "nowhere", "--seed", "-1"], "seed=-1: must be at least 0"),
        (["eval", "nowhere", "--seed", "99999999999"], "seed=99999999999: must be below 2**32"),
        (["inspect", "nowhere", "--seed", "-1"], "seed=-1: must be at least 0"),
        (["inspect", "nowhere", "--steps", "99999999999999"], "--steps 99999999999999: must be at least 1 and below"),
        ([*TRAIN, "--num-envs", "99999999999999"], "num_envs=99999999999999: must be below 2**31"),
        ([*TRAIN, "--eval-episodes", "99999999999999"], "eval_episodes=99999999999999: must be below 2**31"),
        (["plot"], "jrl plot needs at least one run folder"),
        (["plot", "nowhere"], "nowhere is not a run folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(capsys, args, message):
    assert message in fails(capsys, *args)


def test_an_unknown_flag_and_a_bad_value_are_named(capsys):
    for args, words in (
        (["--num-env", "3"], ("Unrecognized options", "--num-envs")),
        (["--num-envs", "three"], ("--num-envs", "three")),
    ):
        with pytest.raises(SystemExit) as raised:
            cli.main([*TRAIN, *args])
        assert raised.value.code == 2
        error = capsys.readouterr().err
        for word in words:
            assert word in error


def test_a_traceback_only_on_demand(capsys, monkeypatch):
    fails(capsys, "resume", "nowhere")
    assert cli.main(["resume", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("JRL_DEBUG", "1")
    assert cli.main(["resume", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_abort_and_warnings_are_lines(capsys, monkeypatch):
    def aborted(args):
        warnings.warn("mind the gap", stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "resume", aborted)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["resume"]) == 130
    assert capsys.readouterr().err == (
        "warning: mind the gap\nerror: aborted; checkpoints that were saved are intact.\n"
    )


def test_the_compilation_cache_follows_the_environment(tmp_path):
    default = {"XDG_CACHE_HOME": str(tmp_path)}
    cli.enable_compilation_cache(default)
    assert default["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jrl" / "xla")
    assert (tmp_path / "jrl" / "xla").is_dir()
    for environ in (
        {"JRL_COMPILATION_CACHE": "off"},
        {"XDG_CACHE_HOME": "/dev/null"},
    ):
        cli.enable_compilation_cache(environ)
        assert "JAX_COMPILATION_CACHE_DIR" not in environ
    mine = {"JAX_COMPILATION_CACHE_DIR": "/mine"}
    cli.enable_compilation_cache(mine)
    assert mine == {"JAX_COMPILATION_CACHE_DIR": "/mine"}
    moved = {"JRL_COMPILATION_CACHE": str(tmp_path / "moved")}
    cli.enable_compilation_cache(moved)
    assert moved["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "moved")


def test_environment_parameters_keep_their_types():
    params = {"length": 0.5, "limit": 7, "flag": True, "table": jax.numpy.zeros(3)}
    changed = configuration.override_params(params, {"length": "1", "limit": "9", "flag": "false"})
    assert {name: changed[name] for name in ("length", "limit", "flag")} == {
        "length": 1.0, "limit": 9, "flag": False,
    }  # fmt: skip
    assert type(changed["length"]) is float
    with pytest.raises(ValueError, match=r"parameter table has shape \(3,\); only single numbers"):
        configuration.override_params(params, {"table": "1"})
    with pytest.raises(
        ValueError, match=r"parameter flag='maybe' is not true or false, as the default True is"
    ):
        configuration.override_params(params, {"flag": "maybe"})
    for name, value in (("limit", "1000000000000"), ("length", "1e50")):
        with pytest.raises(
            ValueError, match=rf"parameter {name}='{value}' is no (int|float)32, which holds -"
        ):
            configuration.override_params(params, {name: value})
    assert flags.field_docs(fake.Config)["num_envs"] == "Environments."
