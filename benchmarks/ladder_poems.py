"""Level 9 of ``benchmarks/ladder.py``: Tang quatrains, by their form, their rhyme and their fluency.

    pip install pypinyin
    python benchmarks/ladder.py level9

A decoder learns quatrains of five and of seven characters a line, the form being the prompt, and is then turned towards
poems whose second and fourth lines rhyme. Rhyme is that of modern Mandarin (pypinyin's first reading, the medial left
out), which the poets' own has come apart from: of the poems themselves not all rhyme by it. Poems that share a line are
on one side of the split.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ladder_applications import halves
from ladder_models import DATA, perplexity, said, train

import jrl
from jrl.language import data, models, pretraining, rewards
from jrl.language.environments import Prompts, Rating, at_end, token_mdp
from jrl.networks import transformer

NUM_CHARACTERS = 2500
FORMS = (5, 7)
DECODER = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "width": 128, "mlp_width": 256}
NUM_HELD_OUT = 500
JUDGED = 1024
# The end of a syllable that rhymes: -ian and -uan with -an, but -uo with -o.
MEDIALS = {"ia": "a", "ua": "a", "iao": "ao", "uai": "ai", "uei": "ei", "iou": "ou", "ian": "an", "uan": "an",
           "van": "an", "in": "en", "uen": "en", "vn": "en", "iang": "ang", "uang": "ang", "ing": "eng",
           "ueng": "eng", "iong": "ong", "uo": "o"}  # fmt: skip


def quatrains() -> list[tuple[str, ...]]:
    """Return the four lines of each poem, all of whose characters are among the commonest."""
    text = (DATA / "poetry" / "tang_quatrains.tsv").read_text(encoding="utf-8")
    poems = [tuple(row.split("\t")[3:]) for row in text.splitlines()[1:]]
    counts = Counter(character for poem in poems for line in poem for character in line)
    common = {character for character, _ in counts.most_common(NUM_CHARACTERS)}
    return [poem for poem in poems if common.issuperset("".join(poem))]


def parted(poems: Sequence[tuple[str, ...]], held_out: int) -> tuple[list[int], list[int]]:
    """Return the numbers of poems to learn from, and of at least ``held_out`` that share no line with them."""
    family = list(range(len(poems)))

    def root(i: int) -> int:
        while family[i] != i:
            family[i] = family[family[i]]
            i = family[i]
        return i

    first: dict[str, int] = {}
    for i, poem in enumerate(poems):
        for line in poem:
            family[root(i)] = root(first.setdefault(line, i))
    kept, held = halves(dict(enumerate(poems)), held_out, root)
    return list(kept), list(held)


def rhymes(characters: Sequence[str]) -> np.ndarray:
    """Return a number for each character's rhyme, int32; of its first reading."""
    try:
        from pypinyin import Style, lazy_pinyin
    except ImportError as error:
        raise SystemExit("level9 needs the readings of characters: pip install pypinyin") from error
    finals = [lazy_pinyin(character, style=Style.FINALS)[0] for character in characters]
    return np.unique([MEDIALS.get(final, final) for final in finals], return_inverse=True)[1].astype(np.int32)


def judges(comma: int, prompt: dict[int, int], rhyme_of: jax.Array) -> tuple[rewards.Score, rewards.Score]:
    """Return the scores of a poem's form and of its rhyme; characters are the tokens below ``comma``."""

    def width(text: rewards.Text) -> jax.Array:
        return jnp.where(text.tokens[0] == prompt[FORMS[0]], FORMS[0], FORMS[1])

    def form(text: rewards.Text) -> jax.Array:
        """1 where all four lines have the length asked for and the poem ends there, else 0."""
        n, written = width(text), text.tokens[1:]
        size, place = 4 * n + 3, jnp.arange(written.shape[0])
        between = (place + 1) % (n + 1) == 0
        right = jnp.where(between, written == comma, (written >= 0) & (written < comma))
        whole = text.finished & (text.length == 1 + size + 1)
        return (whole & (right | (place >= size)).all()).astype(jnp.float32)

    def rhyme(text: rewards.Text) -> jax.Array:
        """1 where, in a poem of the right form, the second and the fourth line end in two characters that rhyme."""
        n = width(text)
        second, fourth = text.tokens[1 + 2 * n], text.tokens[1 + 4 * n + 2]
        return form(text) * ((rhyme_of[second] == rhyme_of[fourth]) & (second != fourth))

    return form, rhyme


def level9(seed: int, updates: int = 100, rl_steps: int = 140) -> dict[str, Any]:
    """RLOO for form, rhyme and fluency from a decoder of quatrains; judged by 1,024 fresh samples before and after."""
    poems = quatrains()
    kept, held = parted(poems, NUM_HELD_OUT)
    characters = sorted({character for poem in poems for line in poem for character in line})
    number = {character: i for i, character in enumerate(characters)}
    comma, eos = len(characters), len(characters) + 1
    prompt = {form: len(characters) + 2 + i for i, form in enumerate(FORMS)}
    vocab_size, longest = len(characters) + 2 + len(FORMS), 4 * max(FORMS) + 4
    rhyme_of = jnp.asarray(np.append(rhymes(characters), [-1] * (vocab_size - len(characters))))

    def tokens(poem: tuple[str, ...]) -> list[int]:
        return [token for line in poem for token in [comma, *(number[c] for c in line)]][1:]

    def rows(which: Sequence[int]) -> Any:
        return data.prompted(
            [([prompt[len(poems[i][0])]], tokens(poems[i])) for i in which], 1 + longest, eos
        )

    decoder = transformer.Config(vocab_size, max_length=1 + longest, value_head=True, **DECODER)
    learner = pretraining.make(rows(kept), decoder, pretraining.Config(batch_size=64))
    count = float(updates * learner.env_steps_per_step)
    numbers = pretraining.HParams(
        learning_rate=3e-3, learning_rate_end=3e-4, anneal_tokens=count, warmup_tokens=0.05 * count,
        weight_decay=0.1,
    )  # fmt: skip
    frozen = train(learner, numbers, seed, updates).params
    results: dict[str, Any] = {
        "poems": len(kept),
        "poems_held_out": len(held),
        "characters": len(characters),
        "parameters": transformer.num_params(frozen),
        "perplexity_held_out": float(np.exp(pretraining.evaluate(frozen, decoder, rows(held)))),
        "perplexity_learned_from": float(np.exp(pretraining.evaluate(frozen, decoder, rows(kept[:500])))),
    }
    print(results, flush=True)

    form, rhyme = judges(comma, prompt, rhyme_of)
    log_probs = functools.partial(transformer.log_probs, frozen, decoder)
    scores = {"form": form, "rhyme": rhyme, "fluency": rewards.likelihood(log_probs)}
    weights = {"form": 3.0, "rhyme": 1.0, "fluency": 0.2}
    env = token_mdp(
        Prompts([[prompt[n]] for n in FORMS], [1] * len(FORMS)),
        at_end(lambda text: jnp.float32(0)),
        vocab_size=vocab_size,
        max_new_tokens=longest,
        eos=eos,
        at_limit="terminate",
        rating=Rating(scores, weights),
        name="quatrains",
    )
    known = {line for poem in poems for line in poem}

    def judged(params: Any, seed: int) -> dict[str, Any]:
        texts = said(jax.random.key(seed), params, decoder, env, JUDGED)
        each = jax.jit(jax.vmap(lambda text: {name: score(text) for name, score in scores.items()}))(texts)
        reward = sum(weights[name] * value for name, value in each.items())
        written = ["".join([*characters, "，", "。"][token] for token in row if 0 <= token <= eos)
                   for row in np.asarray(texts.tokens)[:, 1:]]  # fmt: skip
        every = [line for poem in written for line in poem.rstrip("。").split("，")]
        return {
            **{name: float(value.mean()) for name, value in each.items()},
            "reward": float(reward.mean()),
            "perplexity": perplexity(frozen, decoder, texts),
            "distinct": len(set(written)) / len(written),
            "distinct_lines": len(set(every)) / len(every),
            "lines_of_the_corpus": sum(line in known for line in every) / len(every),
            "poems": written[:2] + written[-2:],
        }

    results["before"] = judged(frozen, seed + 10)
    print(results["before"], flush=True)
    config = jrl.grpo.Config("rloo", num_prompts=8, group_size=32, cache=True, penalty="reward")
    algo = jrl.grpo.make(env, config, model=models.from_transformer(env, decoder, frozen))
    state = train(algo, jrl.grpo.HParams(learning_rate=1e-3, kl_coef=0.02), seed, rl_steps)
    results["after"] = judged(state.params, seed + 20)
    print(results["after"], flush=True)
    return results | {
        "format": results["after"]["form"],
        "reward_gain": results["after"]["reward"] - results["before"]["reward"],
        "perplexity_ratio": results["after"]["perplexity"] / results["before"]["perplexity"],
        "rhyme_of_the_corpus": _rhyming(
            [poems[i] for i in kept], dict(zip(characters, rhyme_of.tolist(), strict=False))
        ),
    }


def _rhyming(poems: Sequence[tuple[str, ...]], rhyme_of: dict[str, int]) -> float:
    ends = [(poem[1][-1], poem[3][-1]) for poem in poems]
    return sum(a != b and rhyme_of[a] == rhyme_of[b] for a, b in ends) / len(ends)
