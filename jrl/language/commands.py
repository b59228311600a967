"""The commands of language models: ``jrl pretrain``, ``jrl distill``, ``jrl generate``."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl import configuration, driver, flags, records
from jrl.bench import calibrate
from jrl.language import data, distillation, generation, pretraining, runs, tokenizers
from jrl.language.tokenizers import Tokenizer
from jrl.networks import transformer
from jrl.types import Params

_HEADS = ("value_head", "num_q_heads", "dueling")


_ANNEALING = "anneal_tokens"


@dataclasses.dataclass(frozen=True)
class _Annealing:
    """In place of the number of :class:`~jrl.language.pretraining.HParams`, which knows no run to be as long as."""

    anneal_tokens: float | None = None
    """Tokens, warm-up included, over which the step size falls along a cosine to its end; 0 keeps it constant. By
    default the whole run, --tokens."""


@dataclasses.dataclass(frozen=True)
class DistillOptions(runs.Options):
    """The run, beside the student's and the algorithm's own settings."""

    corpus: str = ""
    """Text to learn from; the teacher's own by default."""
    tokenizer: str = "teacher"
    """The teacher's: the only one that fits."""
    student_config: str = "{}"
    """The student's architecture: JSON, or a file with it, of what differs from the teacher's, such as
    {"num_layers": 2, "width": 64}."""


def pretrain(args: Sequence[str], free_folder: Any) -> int:
    """``jrl pretrain --corpus FILE ...``."""
    architecture = flags.flags(transformer.Config, skip=("vocab_size", *_HEADS))
    groups = {
        "run": flags.flags(runs.Options),
        "model": architecture,
        "config": flags.flags(pretraining.Config),
        "hparams": flags.flags(pretraining.HParams, skip=(_ANNEALING,)),
        "annealing": flags.flags(_Annealing),
    }
    run, model, config, numbers, annealing = flags.parse_groups(
        "jrl pretrain", pretraining.__doc__ or "", groups, args
    )
    options = runs.Options(**run)
    start = runs.load(options.model) if options.model else None
    defaults = {field.name: field.default for field in dataclasses.fields(transformer.Config)}
    for name, value in {"tokenizer": options.tokenizer, **model}.items():
        if start and value != {"tokenizer": runs.Options.tokenizer, **defaults}[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: the architecture and the tokenizer are those of --model "
                f"{options.model}; leave it out."
            )
    text = data.read(options.corpus)
    tokenizer = start.tokenizer if start else _tokenizer(options.tokenizer, text)
    made = start.config if start else transformer.Config(vocab_size=tokenizer.vocab_size, **model)
    result = runs.train(
        "pretrain",
        text=text,
        tokenizer=tokenizer,
        model=made,
        config=pretraining.Config(**config),
        hparams=pretraining.HParams(**numbers, **_annealed(annealing, options.tokens)),
        options=dataclasses.replace(options, out=options.out or free_folder("lm")),
        start=start,
    )
    return 130 if result.interrupted else 0


def distill(args: Sequence[str], free_folder: Any) -> int:
    """``jrl distill TEACHER --student-config JSON ...``."""
    if not args or args[0].startswith("-"):
        print(
            "usage: jrl distill MODEL [--student-config JSON] [--out FOLDER] [...]\n\nMODEL is the teacher: the "
            "folder of jrl pretrain, or one in Hugging Face's layout. `jrl distill . --help` lists every setting."
        )
        return 0 if args and args[0] in ("-h", "--help") else 2
    groups = {
        "run": flags.flags(DistillOptions, skip=("model",)),
        "config": flags.flags(distillation.Config),
        "hparams": flags.flags(distillation.HParams, skip=(_ANNEALING,)),
        "annealing": flags.flags(_Annealing),
    }
    run, config, numbers, annealing = flags.parse_groups(
        "jrl distill MODEL", distillation.__doc__ or "", groups, args[1:]
    )
    options = DistillOptions(**run)
    if options.tokenizer != DistillOptions.tokenizer:
        raise ValueError(
            f"--tokenizer {options.tokenizer}: the student says the teacher's tokens, the only ones that fit; leave "
            "it out."
        )
    teacher = runs.load(args[0])
    corpus, text = options.corpus, data.read(options.corpus) if options.corpus else ""
    if not corpus:
        corpus, text = _corpus_of(Path(args[0]))
    result = runs.train(
        "distill",
        text=text,
        tokenizer=teacher.tokenizer,
        model=_student(teacher.config, options.student_config),
        config=distillation.Config(**config),
        hparams=distillation.HParams(**numbers, **_annealed(annealing, options.tokens)),
        options=dataclasses.replace(
            options, out=options.out or free_folder("distilled"), corpus=corpus, model=Path(args[0])
        ),
        start=teacher,
    )
    return 130 if result.interrupted else 0


def generate(args: Sequence[str]) -> int:
    """``jrl generate MODEL --prompt TEXT ...``."""
    import tyro

    def command(
        path: Path,
        prompt: str = "",
        samples: int = 1,
        tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        tokenizer: Path | None = None,
    ) -> int:
        """Continue a prompt with a language model.

        Args:
            path: folder of a run, folder in Hugging Face's layout, or llama2.c's .bin.
            prompt: the text to continue; the empty one starts a new text.
            samples: continuations.
            tokens: the most tokens of each; by default what the context holds, at most 256.
            temperature: flattens (above 1) or sharpens the distribution; 0 takes the most probable token.
            top_k: draw among so many most probable tokens.
            top_p: draw among the fewest most probable tokens whose probabilities sum to this.
            seed: of the draws.
            tokenizer: its file or folder, where it does not lie beside the model.
        """
        driver.check_numbers(seed=seed)
        if not 1 <= samples < 2**31:
            raise ValueError(f"--samples {samples}: must be at least 1 and below 2**31.")
        sampling = _sampling(temperature, top_k, top_p)
        model = runs.load(path, tokenizer)
        texts, speed = say(
            model,
            prompt,
            samples=samples,
            tokens=tokens,
            sampling=sampling,
            greedy=temperature == 0,
            seed=seed,
        )
        for i, text in enumerate(texts):
            if samples > 1:
                print(f"--- sample {i + 1}")
            print(prompt + text)
        print(speed)
        return 0

    return tyro.cli(command, prog="jrl generate", args=list(args), config=(tyro.conf.PositionalRequiredArgs,))


def _tokenizer(name: str, text: str) -> Tokenizer:
    known: dict[str, Callable[[], Tokenizer]] = {
        "char": lambda: tokenizers.Char.of(text),
        "byte": lambda: tokenizers.Byte(()),
        "word": lambda: tokenizers.Word.of(text),
    }
    return known[name]() if name in known else tokenizers.read(name)


def _annealed(given: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Anneal over the whole run where nothing else is said; 0 says that the step size stays as it is."""
    return {_ANNEALING: float(tokens)} if given[_ANNEALING] is None else given


def _student(teacher: transformer.Config, given: str) -> transformer.Config:
    try:
        changes = json.loads(Path(given).read_text(encoding="utf-8") if given.endswith(".json") else given)
        if not isinstance(changes, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f'--student-config {given} is no JSON object ({error}); write for instance {{"width": 64}}.'
        ) from error
    fields = [field.name for field in dataclasses.fields(teacher)]
    for name in changes:
        if name not in fields:
            raise ValueError(
                f"--student-config has no field {name!r}. {configuration.nearest(name, fields)}They are {fields}."
            )
    return dataclasses.replace(teacher, **changes)


def _corpus_of(folder: Path) -> tuple[str, str]:
    """Return the name and the text of what a teacher was trained on, or the model that it was trained from."""
    origin = folder
    while not runs.is_run(origin):
        known = (origin / records.RUN).exists()
        model = records.read_run(origin)["environment"]["kwargs"].get("model") if known else None
        if model is None:
            raise ValueError(f"{folder} does not say what it was trained on: pass --corpus.")
        origin = Path(model)
    record = records.read_run(origin)
    why = "the student would learn from another text than its teacher"
    fix = ", or say which to learn from (--corpus)"
    return record["corpus"]["name"], runs.corpus_of(origin, record, why, fix)


# -------------------------------------------------------------------------------------------- generating


def say(
    model: runs.Model,
    prompt: str,
    *,
    samples: int = 1,
    tokens: int | None = None,
    sampling: generation.Sampling = generation.Sampling(),  # noqa: B008 - a constant
    greedy: bool = False,
    seed: int = 0,
) -> tuple[list[str], str]:
    """Return continuations of a prompt, and a line on how fast they came.

    Raises:
        ValueError: a character that the tokenizer has not, a prompt that fills the context, ``tokens`` that do not
        fit.
    """
    read = model.tokenizer.encode(prompt)
    if model.tokenizer.start_token >= 0:
        read = [model.tokenizer.start_token, *read]
    read = read or _beginning(model)
    room = model.config.max_length - len(read)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(read)} tokens: the context holds max_length={model.config.max_length}, and a "
            "continuation needs one at least; shorten the prompt."
        )
    new = min(room, 256) if tokens is None else tokens
    generation.check_lengths(model.config, len(read), new)
    settings = generation.Settings(
        max_new_tokens=new, end_token=model.tokenizer.end_token, num_samples=samples, greedy=greedy
    )
    array = jnp.asarray([read], jnp.int32)

    def run(key: Any, params: Params, sampling: generation.Sampling) -> generation.Generated:
        return generation.generate(
            key, params, model.config, array, jnp.array([len(read)]), settings, sampling
        )

    key = jax.random.key(seed)
    compiled = jax.jit(run).lower(key, model.params, sampling).compile()
    began = time.perf_counter()
    texts = jax.block_until_ready(compiled(key, model.params, sampling))
    seconds = time.perf_counter() - began
    count = int(texts.length.sum())
    used = count * transformer.flops_per_token(model.config, len(read) + new) / seconds / calibrate.peak()
    said = [
        # A model may have more tokens than its tokenizer names: padding, of which a trained one says none.
        tokenizers.continuation(
            model.tokenizer,
            read,
            [token for token in row[:length].tolist() if token < model.tokenizer.vocab_size],
        )
        for row, length in zip(np.asarray(texts.tokens), texts.length.tolist(), strict=True)
    ]
    return said, f"{count:,} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens/s, {used:.1%} of peak"


def _beginning(model: runs.Model) -> list[int]:
    """Return what an empty prompt is read as by a model without a start token: the end of a text, or of a line."""
    if model.tokenizer.end_token >= 0:
        return [model.tokenizer.end_token]
    try:
        return model.tokenizer.encode("\n") or [0]
    except ValueError:
        return [0]


def _sampling(temperature: float, top_k: int | None, top_p: float | None) -> generation.Sampling:
    # Divided by less, logits would no longer be numbers of 32 bits.
    if temperature != 0 and not 1e-30 <= temperature < float("inf"):
        raise ValueError(
            f"--temperature {temperature}: must be 0 (the most probable token), or 1e-30 or above."
        )
    if top_k is not None and not 1 <= top_k < 2**31:
        raise ValueError(f"--top-k {top_k}: must be at least 1 and below 2**31.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"--top-p {top_p}: must be above 0 and at most 1.")
    return generation.Sampling(temperature or 1.0, top_k, top_p)
