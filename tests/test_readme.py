"""The README's code runs as written; what it names exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import conftest
import pytest

from jrl import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
HEAVY = ("flax", "optax", "gymnax", "matplotlib", "orbax")
TRAIN, TEST = "train-command", "test-command"


def environment() -> dict[str, str]:
    """That of a user, but for how it compiles: without the fake devices that tests/conftest.py asks for."""
    return conftest.quickly_compiled(
        {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    )


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(marker: str) -> list[list[str]]:
    """The marked shell block as lists of words, one for each command between ``&&``."""
    (line,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert "\n" not in line, "one line, so that it can be copied whole"
    return [shlex.split(part) for part in line.split("&&")]


def title(block: str) -> str:
    imports = re.findall(r"^(?:from|import) (?:jrl.*)$", block, flags=re.MULTILINE)
    return "; ".join(imports).replace("import ", "")


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=[title(block) for block in BLOCKS])
def test_python_blocks_run_as_written(number, tmp_path):
    (tmp_path / "block.py").write_text(BLOCKS[number], encoding="utf-8")
    assert run(["block.py"], tmp_path), "every block prints what it has found"


def test_a_formula_is_imported_alone(tmp_path):
    (block,) = [block for block in BLOCKS if "from jrl.ops import gae" in block]
    block += f"\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])\n"
    assert run(["-c", block], tmp_path).endswith("[]\n")


def test_the_train_command_does_what_it_says(tmp_path):
    """As written, but for its numbers of environment steps and of episodes: 4,096 and 4."""
    program, *arguments = command(TRAIN)[-1]
    assert program == ".venv/bin/jrl"
    arguments[arguments.index("--env-steps") + 1] = "4096"
    output = run(["-m", "jrl", *arguments, "--eval-episodes", "4"], tmp_path)
    assert "CartPole-v1" in output
    folder = tmp_path / arguments[arguments.index("--out") + 1]
    contents = README.partition("A run folder holds")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([\w.]+)/?` \|", contents, flags=re.MULTILINE)
    assert sorted(listed) == sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")


def test_the_two_commands_name_what_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "jrl" in project["scripts"]
    for marker in (TRAIN, TEST):
        create, install, _ = command(marker)
        assert create == ["python3", "-m", "venv", "--without-pip", ".venv"]
        assert install[:6] == ["python3", "-m", "pip", "--python", ".venv/bin/python", "install"]
    extras = re.findall(r'"\.\[(\w+)\]"', README)
    assert set(extras) <= set(project["optional-dependencies"])
    assert "test" in extras
    assert command(TEST)[-1][:3] == [".venv/bin/python", "-m", "pytest"]


def test_every_command_is_listed():
    listed = re.findall(r"^jrl (\w+)", README, flags=re.MULTILINE)
    assert sorted(set(listed)) == sorted(cli.COMMANDS)


def test_every_wrapper_is_named():
    from jrl import envs

    others = {"from_functions", "ids", "make", "register", "strict", "probes", "DOWNLOADS"}
    others |= {
        "FiniteModel",
        "Outcomes",
        "Start",
        "from_mdp",
        "from_outcomes",
        "register_with_gymnax",
        "to_mdp",
    }
    others |= {"blackjack", "classic_tabular", "counterexamples", "grid_world", "traffic_light"}
    for name in set(envs.__all__) - others:
        assert re.search(rf"\b{name}\b", README), name


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:jrl|tests|notebooks|benchmarks)/[\w./]+)`", text)
    paths = [(ROOT / document).parent / path for path in linked] + [ROOT / path for path in named]
    for path in (path for path in paths if "NAME" not in str(path)):
        assert path.exists(), path
