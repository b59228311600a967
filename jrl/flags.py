"""The flags of ``jrl train``: every field of a dataclass is one, with its docstring as help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Options:
    """The run, beside the algorithm's own settings."""

    env: str
    """Environment id; `jrl envs` lists them."""
    env_steps: int = 500_000
    """Environment steps to train for, warm-up included."""
    seed: int = 0
    """Everything random follows from it."""
    out: Path | None = None
    """Run folder, new or empty. Default: runs/ENV-ALGORITHM-SEED, numbered if taken."""
    env_param: tuple[str, ...] = ()
    """NAME=NUMBER, a parameter of the environment (traced), such as length=0.7; repeatable."""
    env_kwarg: tuple[str, ...] = ()
    """NAME=JSON, an argument of the environment's constructor (static); repeatable."""
    prng: Literal["threefry", "hashed"] = "threefry"
    """Random number generator: JAX's own, or a cheap one, quicker to compile (jrl.ops.hashed)."""
    eval_episodes: int = 100
    """Episodes of the final evaluation; 0 leaves it out."""
    checkpoint_every: int | None = None
    """Environment steps between two checkpoints, beside those by time."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    keep: int = 3
    """How many of the newest checkpoints stay."""
    overwrite: bool = False
    """Replace a run that is already in the run folder."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto: a bar on a terminal, lines elsewhere."""
    tensorboard: bool = False
    """Log to TensorBoard, in the run folder's tensorboard/ (the extra `tensorboard`)."""
    wandb: bool = False
    """Log to Weights & Biases (the extra `wandb`)."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline writes files only; `wandb sync` sends them later."""
    wandb_project: str = "jrl"
    """Project on Weights & Biases."""


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What texts are made of and rewarded by, for algorithms over texts."""

    reward: tuple[str, ...] = ()
    """[WEIGHT*]NAME[:ARGUMENT] of Text-jrl: ngram:3, repetition:3, lexicon:happy,sad=-1, format:REGEX, likelihood,
    length:N, finished; repeatable, and added up."""
    prompts: str = ""
    """Of Text-jrl: a text file with a prompt a line, or corpus, for pieces of what the model was trained on."""


def parse(
    prog: str, options: type[Any], module: Any, args: Sequence[str]
) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Parse flags: those of ``options``, and every field of the module's ``Config`` and ``HParams``.

    Returns:
        The options, the environment's keyword arguments, the fields of ``Config`` and those of ``HParams`` (without
        ``env``).

    Raises:
        ValueError: flags of texts with an environment that has its own, or given as --env-kwarg too.
    """
    of_texts = hasattr(module, "flops_per_env_step")
    groups = {
        "run": flags(options),
        "config": flags(module.Config),
        "hparams": flags(module.HParams, skip=("env",)),
    }
    if of_texts:
        groups["text"] = flags(TextOptions)
    run, config, hparams, *text = parse_groups(prog, module.__doc__ or "", groups, args)
    env_kwargs = {name: json_value(value) for name, value in pairs(run["env_kwarg"], "--env-kwarg").items()}
    if of_texts:
        from jrl.language.models import KINDS

        given = {name: value for name, value in text[0].items() if value}
        if config["model"] not in KINDS:  # a folder
            given["model"], config["model"] = config["model"], "pretrained"
        if given and run["env"] != "Text-jrl":
            name, value = next(iter(given.items()))
            raise ValueError(
                f"--{name} {value if isinstance(value, str) else value[0]}: {run['env']} has texts and rewards of its "
                "own; use --env Text-jrl."
            )
        for name in given:
            if name in env_kwargs:
                raise ValueError(
                    f"--{name} and --env-kwarg {name}=...: the same is given twice; leave one out."
                )
        for name in {"model", "prompts"} & given.keys():
            if given[name] != "corpus":  # a file or folder: the run goes on, and is evaluated, from anywhere
                given[name] = str(Path(given[name]).resolve())
        env_kwargs |= {name: list(value) if name == "reward" else value for name, value in given.items()}
    return options(**run), env_kwargs, config, hparams


def parse_groups(
    prog: str, description: str, groups: Mapping[str, type], args: Sequence[str]
) -> list[dict[str, Any]]:
    """Parse flags, those of several dataclasses from :func:`flags` at once, under their names in the help.

    The first line of ``description`` is the command's.
    """
    import tyro

    command = dataclasses.make_dataclass("Command", groups.items())
    parsed: Any = tyro.cli(
        command,
        prog=prog,
        description=description.strip().splitlines()[0],
        args=list(args),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    return [dict(vars(getattr(parsed, name))) for name in groups]


def flags(cls: type, skip: Sequence[str] = ()) -> type:
    """Return a dataclass of the fields of ``cls`` but those in ``skip``, their docstrings as help."""
    import tyro

    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    fields = []
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        hint: Any = Annotated[hints[field.name], tyro.conf.arg(help=docs.get(field.name, ""))]
        if hints[field.name] == tuple[str, ...]:
            hint = tyro.conf.UseAppendAction[hint]  # type: ignore[misc]
        fields.append((field.name, hint, dataclasses.field(default=field.default)))
    mirror = dataclasses.make_dataclass(cls.__name__, fields)
    mirror.__doc__ = cls.__doc__
    return mirror


def field_docs(cls: type) -> dict[str, str]:
    """Return the string literal that follows each field in the source of ``cls`` and of the dataclasses it extends."""
    docs = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                target, text = field.target, after.value
                if isinstance(target, ast.Name) and isinstance(text, ast.Constant):
                    docs[target.id] = inspect.cleandoc(str(text.value))
    return docs


def pairs(items: Sequence[str], flag: str) -> dict[str, str]:
    """Split ``NAME=VALUE`` items; raises ValueError, naming ``flag``, for another form or a name given twice."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{flag} {item}: expected NAME=VALUE, for example {flag} length=0.7")
        if name in found:
            raise ValueError(f"{flag} {item}: {name} is given twice, as {found[name]} before; give it once.")
        found[name] = value
    return found


def split_values(text: str) -> list[str]:
    """Split ``1,2`` at its commas, but not at those within brackets: ``[64,64],[128]`` are two values."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def json_value(text: str) -> Any:
    """Read a JSON value; what is none is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text
