"""Runs of language models, begun, resumed and evaluated, and models read back from their folders.

A run's folder is that of any other (:mod:`jrl.records`), with the tokenizer beside it. Chunks, checkpoints, loggers
and Ctrl-C are those of :mod:`jrl.driver`; what it counts as environment steps are tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import checkpoint, configuration, driver, records
from jrl.bench import calibrate
from jrl.configuration import Setup
from jrl.driver import RunResult, Task
from jrl.interrupt import StopRequest, wait
from jrl.language import data, distillation, pretraining, tokenizers, weights
from jrl.language.environments import token_step
from jrl.language.pretraining import Corpus
from jrl.language.tokenizers import Tokenizer
from jrl.networks import transformer
from jrl.records import RunError
from jrl.types import Discrete, Environment, Params

KINDS: dict[str, Any] = {"pretrain": pretraining, "distill": distillation}
"""``kind`` in ``run.json`` -> module."""


class Model(NamedTuple):
    """A decoder with its tokenizer."""

    params: Params
    config: transformer.Config
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """The run, beside the model's and the algorithm's own settings."""

    corpus: str = data.BUILTIN
    """Text to learn from: builtin (Python's help topics), or a UTF-8 file."""
    out: Path | None = None
    """Run folder, new or empty. Default: runs/lm, numbered if taken."""
    tokenizer: str = "char"
    """char (the characters of the corpus), byte, word, or the file or folder of another model's."""
    model: Path | None = None
    """A model to go on from: a run folder, or a folder in Hugging Face's layout. Brings its tokenizer and
    architecture."""
    tokens: int = 2_000_000
    """Tokens to train for."""
    seed: int = 0
    """Everything random follows from it."""
    validation: float = 0.1
    """Share of the corpus, its end, that is not trained on."""
    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints."""
    keep: int = 3
    """How many of the newest checkpoints stay."""
    overwrite: bool = False
    """Replace a run that is already in the run folder."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto: a bar on a terminal, lines elsewhere."""


def train(
    kind: str,
    *,
    text: str,
    tokenizer: Tokenizer,
    model: transformer.Config,
    config: Any,
    hparams: Any,
    options: Options,
    start: Model | None = None,
) -> RunResult:
    """Pretrain or distil a model into a new run folder.

    Args:
        kind: ``"pretrain"`` or ``"distill"``.
        text: the corpus, what ``options.corpus`` names.
        tokenizer: its tokens.
        model: the architecture to learn.
        config: of :mod:`jrl.language.pretraining` or :mod:`jrl.language.distillation`.
        hparams: likewise.
        options: the run; ``out`` is its folder, ``model`` where ``start`` was read from.
        start: the model to go on from, or the teacher.

    Raises:
        ValueError: as :func:`jrl.run`, and what the corpus, the tokenizer and the model refuse; ``options.out`` is the
            folder of the model or of the teacher.
    """
    driver.check_numbers(tokens=options.tokens, seed=options.seed, keep=options.keep)
    driver.check_numbers(checkpoint_seconds=options.checkpoint_seconds)
    for sizes in (model, config):
        configuration.check_sizes(sizes)
    assert options.out is not None
    records.check_new(options.out, options.overwrite)
    records.check_not_needed(options.out, options.model, "teacher" if kind == "distill" else "--model")
    teacher = None if start is None or kind == "pretrain" else start.config
    from_path = None if options.model is None else str(Path(options.model).resolve())
    corpus = options.corpus if options.corpus == data.BUILTIN else str(Path(options.corpus).resolve())
    record: dict[str, Any] = {
        "kind": kind,
        "algorithm": {"name": kind, "module": KINDS[kind].__name__},
        "environment": {"id": None, "name": Path(options.corpus).name, "kwargs": {}},
        "corpus": {"name": corpus, "sha256": sha256(text), "validation": options.validation},
        "tokenizer": type(tokenizer).__name__,
        "model": dataclasses.asdict(model),
        "start": from_path,
        "start_sha256": None if start is None else params_sha256(start.params),
        "teacher": None if teacher is None else dataclasses.asdict(teacher),
        "config": dataclasses.asdict(config),
        "hparams": {name: float(value) for name, value in vars(hparams).items()},
        "env_steps": options.tokens,
        "seed": options.seed,
        "eval_episodes": 0,
        "checkpoint_every": None,
        "checkpoint_seconds": options.checkpoint_seconds,
        "keep": options.keep,
    }
    setup, task = _build(record, text, tokenizer, None if start is None else start.params)
    shown = None if options.progress == "auto" else options.progress
    overwrite = options.overwrite
    return driver.start_run(setup, record, options.out, progress=shown, task=task, overwrite=overwrite)


def resume(folder: Path, tokens: int | None = None, progress: str | None = None) -> RunResult:
    """Continue a run to its end, or to a larger number of tokens, bit for bit; otherwise as :func:`jrl.resume`.

    Raises:
        RunError: as :func:`jrl.resume`, and where the corpus, or the model to begin from again, has changed.
    """

    def build(record: Mapping[str, Any]) -> tuple[Setup, Task]:
        why, fix = "it cannot go on as it would have", ", or start a new run with --model"
        text = corpus_of(folder, record, why, fix)
        params = None
        # Killed before its first checkpoint, it begins again from where it began.
        if record.get("start") is not None and not checkpoint.steps(folder / records.CHECKPOINTS):
            params = load(record["start"]).params
            if record.get("start_sha256") not in (None, params_sha256(params)):
                raise RunError(
                    f"the model in {record['start']} has changed since the run in {folder}, which has no checkpoint "
                    "yet, was started from it: it cannot go on as it would have. Put the old one back, or start a new "
                    "run."
                )
        return _build(record, text, tokenizers.read(folder), params)

    return driver.resume_run(folder, tokens, build, progress=progress)


def evaluate(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Return ``validation_loss``, ``perplexity`` and ``num_tokens`` of a run's model on its validation text.

    Args:
        folder: the run's.
        step: the checkpoint; the newest by default.

    Raises:
        RunError: not a run folder, or the corpus has changed.
        CheckpointError: (a RunError) no checkpoint is intact, or none is that of ``step``.
        ValueError: the corpus cannot be read.
    """
    record = records.read_run(folder)
    params, config = _restore(folder, record, step), transformer.Config(**record["model"])
    text = corpus_of(folder, record, "its validation text is another")
    _, validation = _corpora(record, text, tokenizers.read(folder))
    evaluation = _evaluate(record, config, params, validation)
    assert evaluation is not None  # None is for a requested stop
    return evaluation


def corpus_of(folder: Path, record: Mapping[str, Any], why: str, fix: str = "") -> str:
    """Return the text that a run was trained on.

    Args:
        folder: the run's.
        record: what its ``run.json`` says.
        why: what is wrong with another text, for the message.
        fix: what can be done beside putting the old one back.

    Raises:
        RunError: it has changed since.
        ValueError: it cannot be read.
    """
    name = record["corpus"]["name"]
    text = data.read(name)
    if sha256(text) != record["corpus"]["sha256"]:
        python = f"Use the Python whose text it was ({record['versions'].get('python')})"
        old = python if name == data.BUILTIN else "Put the old text back"
        raise RunError(f"corpus {name} has changed since the run in {folder} was started: {why}. {old}{fix}.")
    return text


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run of a language model."""
    return (folder / records.RUN).exists() and records.read_run(folder).get("kind") in KINDS


def load(path: str | Path, tokenizer: str | Path | None = None) -> Model:
    """Read a model and its tokenizer: from a run folder, one in Hugging Face's layout, or llama2.c's ``.bin``.

    Args:
        path: the model.
        tokenizer: where it does not lie in the folder, or beside a ``.bin`` as the only other one.

    Raises:
        ValueError: it is none of these, or malformed; the vocabularies of model and tokenizer differ.
    """
    path = Path(path)
    if is_run(path):
        record = records.read_run(path)
        params, config = _restore(path, record), transformer.Config(**record["model"])
    elif (path / records.RUN).exists():
        params, config = _policy(path)
    else:
        params, config = weights.read(path)
    if tokenizer is None:
        tokenizer = path
        if path.suffix == ".bin":
            others = [other for other in path.parent.glob("*.bin") if other.name != path.name]
            if len(others) != 1:
                raise ValueError(
                    f"{len(others)} .bin files lie beside {path}: say which is its tokenizer (--tokenizer)."
                )
            tokenizer = others[0]
    model = Model(params, config, tokenizers.read(tokenizer))
    if model.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {model.tokenizer.vocab_size} tokens, the model {config.vocab_size}: it was made for "
            "another model."
        )
    return model


def _policy(folder: Path) -> tuple[Params, transformer.Config]:
    """Return the decoder of a run of ``grpo`` that started from one; its logits are the policy."""
    record = records.read_run(folder)
    name, config = record["algorithm"]["name"], record["config"] or {}
    if name != "grpo" or config.get("model") != "pretrained":
        raise ValueError(
            f"{folder} is a run of {name} with model={config.get('model')!r}: only what grpo trained from a pretrained "
            "model (--model FOLDER) is a model of texts. Its episodes: jrl eval."
        )
    run = driver.load(folder)
    decoder = token_step(run.env, name).decoder
    assert decoder is not None  # it was trained with one
    return {part: run.state.params[part] for part in decoder.params}, decoder.config


def _restore(folder: Path, record: Mapping[str, Any], step: int | None = None) -> Params:
    nothing = Corpus(np.zeros(record["model"]["max_length"] + 2, np.uint8))
    module, config, model, hparams = _instances(record)
    algo = _algorithm(record, module, nothing, None, model, config, None)
    like = jax.eval_shape(algo.init, jax.random.key(0), hparams)
    return checkpoint.restore(folder / records.CHECKPOINTS, like, step).params


def _instances(record: Mapping[str, Any]) -> tuple[Any, Any, transformer.Config, Any]:
    module = KINDS[record["kind"]]
    hparams = module.HParams(**{name: jnp.float32(value) for name, value in record["hparams"].items()})
    return module, module.Config(**record["config"]), transformer.Config(**record["model"]), hparams


def _algorithm(
    record: Mapping[str, Any],
    module: Any,
    corpus: Corpus,
    validation: Corpus | None,
    model: transformer.Config,
    config: Any,
    params: Params | None,
) -> Any:
    if record["kind"] == "pretrain":
        return module.make(corpus, model, config, validation=validation, start=params)
    teacher = transformer.Config(**record["teacher"])
    return module.make(corpus, model, teacher, params, config, validation=validation)


def text_task(setup: Setup) -> Task:
    """Return what a run of ``grpo`` or ``token_dqn`` logs beside its metrics, and the tokenizer that its folder holds.

    ``tokens_per_second`` counts the tokens of texts, ``env_steps_per_second`` also what slots say behind their ends.
    """
    spec = token_step(setup.env, setup.algorithm)
    flops, peak = (
        configuration.load(setup.algorithm).flops_per_env_step(setup.env, setup.config),
        calibrate.peak(),
    )

    def prepare(folder: Path) -> None:
        if setup.config.model == "pretrained":
            tokenizers.write(load(setup.env_kwargs["model"]).tokenizer, folder)

    def extra(row: dict[str, Any]) -> dict[str, Any]:
        rate, length = row["env_steps_per_second"], row.get("episode_length")
        said = rate if length is None else rate * length / spec.max_new_tokens
        return {"tokens_per_second": round(said, 1), "model_flop_utilization": round(rate * flops / peak, 4)}

    return Task(prepare, None, extra, {"flops_per_env_step": flops, "peak_flops_per_second": peak})


def _build(
    record: Mapping[str, Any], text: str, tokenizer: Tokenizer, params: Params | None
) -> tuple[Setup, Task]:
    module, config, model, hparams = _instances(record)
    train, validation = _corpora(record, text, tokenizer)
    algo = _algorithm(record, module, train, validation, model, config, params)
    nothing: Any = None  # a corpus is no environment, and no one steps it
    env = Environment(
        nothing, nothing, (), nothing, Discrete(model.vocab_size), record["environment"]["name"]
    )
    setup = Setup(algo, env, config, hparams, record["kind"], module.__name__, None, {})
    length = config.sequence_length or model.max_length
    flops = 3 * transformer.flops_per_token(model, length)
    if record["kind"] == "distill":
        flops += transformer.flops_per_token(transformer.Config(**record["teacher"]), length)
    peak = calibrate.peak()

    def extra(row: dict[str, Any]) -> dict[str, Any]:
        rate = row["env_steps_per_second"]
        return {"tokens_per_second": rate, "model_flop_utilization": round(rate * flops / peak, 4)}

    def evaluate_state(state: Any, stop: StopRequest) -> dict[str, Any] | None:
        return _evaluate(record, model, state.params, validation, stop)

    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
    summary = {
        "unit": "tokens",
        "num_params": transformer.num_params(shapes),
        "flops_per_token": flops,
        "peak_flops_per_second": peak,
    }
    return setup, Task(lambda folder: tokenizers.write(tokenizer, folder), evaluate_state, extra, summary)


def _evaluate(
    record: Mapping[str, Any],
    model: transformer.Config,
    params: Params,
    validation: Corpus,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    config = pretraining.Config(batch_size=64, sequence_length=record["config"]["sequence_length"])
    loss = jax.jit(lambda params: pretraining.evaluate(params, model, validation, config))(params)
    wait(loss, stop, leave_early=True)
    if stop is not None and stop.requested:
        return None
    return {
        "validation_loss": float(loss),
        "perplexity": float(np.exp(float(loss))),
        "num_tokens": len(validation.tokens) - 1,
    }


def _corpora(record: Mapping[str, Any], text: str, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    return data.stream(tokenizer.encode(text), tokenizer, record["corpus"]["validation"])


def sha256(text: str) -> str:
    """Return what ``run.json`` tells one text from another by."""
    return hashlib.sha256(text.encode()).hexdigest()


def params_sha256(params: Params) -> str:
    """Return one of all weights, whatever files they lie in; of a large model it takes seconds."""
    digest = hashlib.sha256()
    for name, leaf in sorted(configuration.named_leaves(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
