"""The rings: imports only point inwards, and each door loads only what it needs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import jrl

PACKAGE = Path(jrl.__file__).parent

# The longest prefix that fits decides. A new module that fits none fails below: give it its ring here.
RINGS = {
    "jrl.types": 0,
    "jrl.ops": 0,
    "jrl.envs": 1,
    "jrl.native": 1,
    "jrl.networks": 1,
    "jrl.replay": 1,
    "jrl.rollout": 1,
    "jrl.normalize": 1,
    "jrl.optim": 1,
    "jrl.algos": 2,
    "jrl.language": 2,
    "jrl.language.booking": 3,
    "jrl.language.bpe": 3,
    "jrl.language.commands": 3,
    "jrl.language.data": 3,
    "jrl.language.dialogue": 1,
    "jrl.language.environments": 1,
    "jrl.language.grammar": 1,
    "jrl.language.metrics": 1,
    "jrl.language.named_rewards": 1,
    "jrl.language.ngrams": 1,
    "jrl.language.rewards": 1,
    "jrl.language.runs": 3,
    "jrl.language.safetensors": 3,
    "jrl.language.spelling": 1,
    "jrl.language.tasks": 1,
    "jrl.language.texts": 3,
    "jrl.language.tokenizer_files": 3,
    "jrl.language.tokenizers": 3,
    "jrl.language.weights": 3,
    "jrl.meta": 2,
    "jrl.parallel": 2,
    "jrl.inspection": 2,
    "jrl.stages": 2,
    "jrl.training": 2,
    "jrl.statistics": 2,
    "jrl.sweep": 3,
    "jrl.sweep.batching": 2,
    "jrl.sweep.members": 2,
    "jrl.sweep.program": 2,
    "jrl.sweep.search": 2,
    "jrl.sweep.spaces": 2,
    "jrl.testing": 3,
    "jrl.bench": 3,
    "jrl.checkpoint": 3,
    "jrl.cli": 3,
    "jrl.configuration": 3,
    "jrl.doctor": 3,
    "jrl.trial": 3,
    "jrl.driver": 3,
    "jrl.export": 3,
    "jrl.flags": 3,
    "jrl.inspection_plots": 3,
    "jrl.interrupt": 3,
    "jrl.loggers": 3,
    "jrl.loop": 3,
    "jrl.memory": 3,
    "jrl.plots": 3,
    "jrl.progress": 3,
    "jrl.records": 3,
    "jrl.saving": 3,
    "jrl.sweep_plots": 3,
    "jrl.sweep_report": 3,
    "jrl.tables": 3,
    "jrl.xla": 3,  # changes the environment of the process
    "jrl.__main__": 3,
}
# Package -> the only modules that may import it; a name with a dot is matched as a prefix.
ONLY_IN = {
    "gymnax": ("jrl.envs.gymnax",),
    "flax.linen": ("jrl.networks",),
    "flax.nnx": ("jrl.networks",),
    "flax": ("jrl.networks", "jrl.algos", "jrl.language"),
    "optax": ("jrl.optim", "jrl.algos", "jrl.language"),
}
NOWHERE = ("pickle", "cloudpickle", "dill", "distrax", "tensorflow_probability", "tensorflow", "torch")
OUTER_ONLY = (
    *("time", "datetime", "os", "sys", "io", "pathlib", "logging", "subprocess", "threading", "signal"),
    *("orbax", "matplotlib", "rich", "tyro", "tensorboardX", "wandb"),
)
EXCEPTIONS = {("jrl.envs.gymnax", "sys")}  # keeps gymnax from loading what it draws with
COMPILES = "jrl.native.build"  # files and a compiler are its work
OUTER_CALLS = ("open", "print", "input")
OUTER_METHODS = ("open", "read_text", "write_text", "read_bytes", "write_bytes")


class Module(NamedTuple):
    name: str
    tree: ast.Module
    is_package: bool


def module(path: Path) -> Module:
    parts = ["jrl", *path.relative_to(PACKAGE).with_suffix("").parts]
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    return Module(name, ast.parse(path.read_text(encoding="utf-8")), is_package)


MODULES = [module(path) for path in sorted(PACKAGE.rglob("*.py"))]
NAMES = {m.name for m in MODULES}
INSIDE = [m for m in MODULES if m.name != "jrl"]


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def ring(name: str) -> int:
    fitting = [prefix for prefix in RINGS if within(name, prefix)]
    assert fitting, f"{name} is in no ring: add it to RINGS in {Path(__file__).name} (see the architecture)"
    return RINGS[max(fitting, key=len)]


def imported(m: Module) -> set[str]:
    """Full names of all modules that a module imports, at its top or within functions."""
    found = set()
    for node in ast.walk(m.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = m.name.split(".")
                package = package[: len(package) - node.level + m.is_package]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                found.add(resolve(base, alias.name))
    return found


def resolve(base: str, name: str) -> str:
    """The module that ``from base import name`` reaches."""
    if base == "jrl" and name in jrl._EXPORTS:
        return jrl._EXPORTS[name][0]
    full = f"{base}.{name}"
    return full if full in NAMES or not within(base, "jrl") else base


def calls(m: Module) -> set[str]:
    functions = [node.func for node in ast.walk(m.tree) if isinstance(node, ast.Call)]
    names = {f.id for f in functions if isinstance(f, ast.Name)} & set(OUTER_CALLS)
    return names | {
        f".{f.attr}" for f in functions if isinstance(f, ast.Attribute) and f.attr in OUTER_METHODS
    }


def test_the_package_was_found_and_parsed():
    assert {"jrl", "jrl.types", "jrl.ops", "jrl.ops.losses", "jrl.algos.ppo", "jrl.training"} <= NAMES
    assert "jrl.ops.distributions" in imported(next(m for m in MODULES if m.name == "jrl.networks.heads"))
    assert "jrl.algos.ppo" in imported(Module("jrl.x", ast.parse("from jrl import ppo"), False))
    assert "jrl.ops.losses" in imported(Module("jrl.ops.x", ast.parse("from . import losses"), False))
    assert "jrl.ops.losses" in imported(Module("jrl.ops", ast.parse("from .losses import huber"), True))
    assert calls(Module("jrl.x", ast.parse("print(1); Path('a').open()"), False)) == {"print", ".open"}


@pytest.mark.parametrize("m", INSIDE, ids=lambda m: m.name)
def test_imports_point_inwards(m):
    own = ring(m.name)
    outward = {name for name in imported(m) if within(name, "jrl") and name != "jrl" and ring(name) > own}
    assert not outward, f"{m.name} (ring {own}) imports from outer rings: {sorted(outward)}"


@pytest.mark.parametrize("m", MODULES, ids=lambda m: m.name)
def test_foreign_packages_stay_where_they_belong(m):
    for name in imported(m):
        assert not any(within(name, banned) for banned in NOWHERE), f"{m.name} imports {name}"
        for package, allowed in ONLY_IN.items():
            if within(name, package):
                assert any(within(m.name, place) for place in allowed), f"{m.name} imports {name}"


@pytest.mark.parametrize("m", [m for m in INSIDE if ring(m.name) < 3], ids=lambda m: m.name)
def test_clocks_files_and_printing_are_in_the_outer_ring(m):
    outer = {name for name in imported(m) if any(within(name, package) for package in OUTER_ONLY)}
    outer -= {name for name in outer if (m.name, name) in EXCEPTIONS}
    if m.name == COMPILES:
        return
    assert not outer, f"{m.name} imports {sorted(outer)}"
    assert not calls(m), f"{m.name} calls {sorted(calls(m))}"


def test_algorithms_take_only_struct_from_flax():
    for m in MODULES:
        if within(m.name, "jrl.algos"):
            assert {n for n in imported(m) if within(n, "flax")} <= {"flax.struct"}, m.name


def test_the_top_level_imports_only_the_standard_library_when_run():
    top = next(m for m in MODULES if m.name == "jrl").tree
    for node in top.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), ast.unparse(node)


def loaded_after(*statements: str) -> list[set[str]]:
    """Top-level packages loaded after each of the statements, run one after the other in a new process."""
    code = "import sys, json\nloaded = []\n"
    for statement in statements:
        code += f"{statement}\nloaded.append(sorted(sys.modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(loaded))"],
        capture_output=True, text=True, timeout=200, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [set(modules) for modules in json.loads(done.stdout.splitlines()[-1])]


def test_each_door_loads_only_what_it_needs():
    top, command, ops, everything, env, drawn = loaded_after(
        "import jrl; jrl.__version__; dir(jrl)",
        "import jrl.cli, jrl.xla",
        "import jrl.ops",
        "for name in jrl.__all__: assert getattr(jrl, name) is not None, name",
        "jrl.make('CartPole-v1')",
        "import gymnax, jax, matplotlib; matplotlib.use('Agg'); env, params = gymnax.make('Pong-misc'); "
        "env.render(env.reset(jax.random.key(0), params)[1], params)",
    )
    heavy = {"jax", "jaxlib", "numpy", "gymnax", "flax", "optax", "chex", "matplotlib", "orbax"}
    assert not top & heavy
    # The command must set XLA's environment before jax is loaded.
    assert not command & {"jax", "jaxlib"}
    assert {"jax", "chex"} <= ops
    assert not ops & {"gymnax", "flax", "optax", "matplotlib", "orbax", "pandas", "tyro", "rich"}
    assert {"jrl.algos.ppo", "jrl.algos.dqn", "jrl.driver", "jrl.training"} <= everything
    assert "gymnax" not in everything  # only an environment of it loads it
    drawing = {"seaborn", "matplotlib.pyplot", "scipy.stats", "pandas"}
    assert "gymnax" in env
    assert not env & drawing
    assert {"seaborn", "matplotlib.pyplot"} <= drawn


def test_all_lists_what_dir_lists_and_each_name_is_what_it_says():
    assert len(set(jrl.__all__)) == len(jrl.__all__)
    assert dir(jrl) == sorted(jrl.__all__)
    for name, (where, attribute) in jrl._EXPORTS.items():
        value = getattr(jrl, name)
        expected = sys.modules[where] if attribute is None else getattr(sys.modules[where], attribute)
        assert value is expected, name


def test_type_checkers_see_every_lazy_name():
    top = next(m for m in MODULES if m.name == "jrl").tree
    guarded = [n for n in top.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name for block in guarded for node in block.body for alias in node.names}
    assert seen == set(jrl._EXPORTS), (
        "the names under TYPE_CHECKING in jrl/__init__.py are not those it exports"
    )


def test_every_file_of_an_algorithm_is_one():
    """What jrl/algos holds is found by its file: a helper there is named among what the algorithms share."""
    for name, module in jrl._ALGORITHMS.items():
        loaded = importlib.import_module(module)
        assert getattr(jrl, name) is loaded
        assert all(hasattr(loaded, part) for part in ("Config", "HParams", "State", "make")), (
            f"{module} is no algorithm: name it in _SHARED of jrl/__init__.py"
        )
    for name in jrl._SHARED:
        assert not hasattr(importlib.import_module(f"jrl.algos.{name}"), "HParams")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jrl' has no attribute 'sarsa'"):
        _ = jrl.sarsa
