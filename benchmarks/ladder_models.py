"""The rows of ``benchmarks/ladder.py`` that begin with a language model: levels 4, 5 and 10.

Level 4: stories260K turned towards happy stories. Level 5: a character model of Shakespeare rewarded for n-grams and
against repetition, by PPO and by token DQN. Level 10: a language model as the policy and as the reward of games that
are told in words.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jrl
from jrl.language import (
    control,
    data,
    generation,
    models,
    preferences,
    pretraining,
    rewards,
    runs,
    tokenizers,
)
from jrl.language.environments import Prompts, at_end, token_mdp
from jrl.networks import transformer

DATA = Path(os.environ.get("JRL_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
SHAKESPEARE = Path("runs/shakespeare")

GOOD = ("happy", "happily", "smiled", "smile", "laughed", "love", "loved", "fun", "friends", "nice", "kind", "proud",
        "excited", "glad", "joy", "good", "best", "safe", "enjoyed", "thanked")  # fmt: skip
BAD = ("sad", "cry", "cried", "angry", "mad", "scared", "afraid", "hurt", "bad", "mean", "lost", "broke", "broken",
       "worried", "upset", "sorry", "scary", "fell", "lonely", "dangerous")  # fmt: skip


def train(algo: jrl.Algorithm, hparams: Any, seed: int, num_steps: int) -> Any:
    """Return the state after ``num_steps``; the step size is annealed over them unless it has a schedule of its own."""
    if hasattr(hparams, "anneal_env_steps"):
        hparams = hparams.replace(anneal_env_steps=float(num_steps * algo.env_steps_per_step))
    hparams = jax.tree.map(np.float32, hparams)
    state = jax.jit(algo.init)(jax.random.key(seed), hparams)
    state, _ = jax.jit(lambda state: jrl.train(algo, state, hparams, num_steps=num_steps), donate_argnums=0)(
        state
    )
    return jax.block_until_ready(state)


# ----------------------------------------------------------------------------------------------------- level 4


def said(key: Any, params: Any, config: transformer.Config, env: Any, count: int) -> rewards.Text:
    """``count`` texts that a decoder says after the environment's prompts, as it draws them."""
    spec, prompts = env.step, env.step.prompts
    settings = generation.Settings(
        max_new_tokens=spec.max_new_tokens,
        end_token=-1 if spec.eos is None else spec.eos,
        num_samples=-(-count // len(prompts.length)),
    )

    @jax.jit
    def generate(key: Any, params: Any) -> generation.Generated:
        return generation.generate(
            key, params, config, jnp.asarray(prompts.tokens), jnp.asarray(prompts.length), settings
        )

    texts = generate(key, params)
    samples = settings.num_samples
    start = jnp.repeat(jnp.asarray(prompts.tokens), samples, axis=0)
    length = jnp.repeat(jnp.asarray(prompts.length), samples)
    assert (prompts.length == start.shape[1]).all()  # prompts of one length, as they are here
    tokens = jnp.concatenate([start, jnp.where(texts.mask, texts.tokens, -1)], axis=1)
    return rewards.Text(tokens, length, length + texts.length, texts.finished)


def perplexity(params: Any, config: transformer.Config, texts: rewards.Text) -> float:
    """Of what was said after the prompts, per token, under a decoder."""

    @jax.jit
    def total(tokens: jax.Array) -> jax.Array:
        logits = transformer.forward(params, config, jnp.maximum(tokens, 0), tokens >= 0).logits[:, :-1]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(tokens[:, 1:], 0)[..., None], -1)[
            ..., 0
        ]
        place = jnp.arange(1, tokens.shape[1])
        inside = (place >= texts.prompt_length[:, None]) & (place < texts.length[:, None])
        return -jnp.where(inside, log_p, 0.0).sum() / inside.sum()

    return float(np.exp(total(texts.tokens)))


def level4(seed: int) -> dict[str, Any]:
    """GRPO from stories260K: the balance of good and bad words in 64 tokens, judged by 1,024 fresh texts."""
    path = DATA / "stories260K" / "stories260K.bin"
    words = ",".join([*GOOD, *(f"{word}=-1" for word in BAD)])
    env = jrl.make("Text-jrl", model=str(path), reward=[f"lexicon:{words}"], max_new_tokens=64)
    algo = jrl.grpo.make(env, jrl.grpo.Config(model="pretrained", cache=True, num_prompts=8, group_size=16))
    numbers = jrl.grpo.HParams(learning_rate=3e-4, kl_coef=0.05)
    frozen, config = env.step.decoder

    def judged(params: Any, seed: int) -> tuple[float, float, rewards.Text]:
        texts = said(jax.random.key(seed), {part: params[part] for part in frozen}, config, env, 1024)
        happy = jax.jit(jax.vmap(env.step.rating.scores["lexicon"]))(texts) > 0
        return float(happy.mean()), perplexity(frozen, config, texts), texts

    before = judged(frozen, seed + 10)
    num_steps = 120
    state = train(algo, numbers, seed, num_steps)
    after = judged(state.params, seed + 20)
    tokenizer = runs.load(path).tokenizer
    return {
        "rate": after[0],
        "rate_of_the_first_policy": before[0],
        "perplexity": after[1],
        "perplexity_of_the_first_policy": before[1],
        "perplexity_ratio": after[1] / before[1],
        "texts_said": num_steps * 128,
        "two_texts": [tokenizer.decode(row[row >= 0].tolist()) for row in np.asarray(after[2].tokens[:2])],
    }


# ----------------------------------------------------------------------------------------------------- level 5


def level5(seed: int) -> dict[str, Any]:
    """4-grams and against repetition, 32 characters after 16 of Shakespeare; scored after prompts not trained on.

    What a character does to the reward is over within a few others: γ = 0.8. Without an entropy bonus PPO is certain of
    its texts long before they are good; the bonus goes for the last quarter.
    """
    corpus = DATA / "shakespeare" / "input.txt"

    def environment(seed: int) -> Any:
        return jrl.make(
            "Text-jrl", model=str(SHAKESPEARE), corpus=str(corpus), reward=["ngram:4", "-2*repetition:3"],
            prompts="corpus", prompt_length=16, num_prompts=1024, max_new_tokens=32, seed=seed,
        )  # fmt: skip

    env, others = environment(seed), environment(seed + 1000)

    def score(algo: jrl.Algorithm, state: Any, greedy: bool) -> float:
        stats = jrl.evaluate(
            jax.random.key(seed), others, algo.policy(state, greedy=greedy), num_episodes=128
        )
        return float(stats.episode_return.mean())

    choices = {"model": "pretrained", "cache": True}
    ppo = jrl.grpo.make(
        env,
        jrl.grpo.Config(
            "ppo", penalty="none", num_prompts=64, group_size=1, num_epochs=2, num_minibatches=4, **choices
        ),
    )
    num_steps, last = 320, 80
    numbers = jrl.grpo.HParams(
        learning_rate=5e-4,
        gamma=0.8,
        entropy_coef=0.03,
        anneal_env_steps=float(num_steps * ppo.env_steps_per_step),
    )
    numbers = jax.tree.map(np.float32, numbers)
    state = jax.jit(ppo.init)(jax.random.key(seed), numbers)
    results: dict[str, Any] = {
        "pretrained": score(ppo, state, greedy=False),
        "pretrained_greedy": score(ppo, state, greedy=True),
    }
    go_on = jax.jit(lambda state, numbers: jrl.train(ppo, state, numbers, num_steps=last), donate_argnums=0)
    results["ppo_curve"] = []
    for step in range(0, num_steps, last):
        if step + last == num_steps:
            numbers = numbers.replace(entropy_coef=np.float32(0.0))
        state, metrics = go_on(state, numbers)
        # Of the sampled texts and their tokens, the mean over the quarter.
        results["ppo_curve"].append({name: float(metrics[name].mean()) for name in ("score", "entropy")})
        print(results, flush=True)
    results |= {"ppo": score(ppo, state, greedy=False), "ppo_greedy": score(ppo, state, greedy=True)}
    print(results, flush=True)
    # λ, step sizes, the texts a step and the number of steps were chosen by greedy texts after a third set of prompts
    # (seed 2000). In the one run that went on longer (no record) they were best after a fifth of the texts that PPO
    # says, and worse when ε had fallen below 0.04.
    dqn = jrl.token_dqn.make(
        env, jrl.token_dqn.Config(num_envs=64, batch_size=64, num_updates=3, warmup_texts=64, **choices)
    )
    numbers = jrl.token_dqn.HParams(
        learning_rate=2e-4,
        learning_rate_end=1e-4,
        gamma=0.8,
        lambda_=0.9,
        tau=0.02,
        epsilon_start=0.08,
        epsilon_end=0.01,
        epsilon_env_steps=2e5,
        q_scale=0.05,
    )
    state = train(dqn, numbers, seed, 60)
    results["dqn"] = score(dqn, state, greedy=True)
    best = max(results["ppo"], results["ppo_greedy"])
    results["dqn_to_ppo"] = results["dqn"] / best
    results["gain"] = min(results["ppo"], results["dqn"]) / results["pretrained"] - 1.0
    return results


# ---------------------------------------------------------------------------------------------------- level 10

GAMES: dict[str, dict[str, Any]] = {
    "TrafficLight-jrl": {
        "templates": ["the light is {0} .", "you see a {0} light .", "{0} light ahead .", "it is {0} now ."],
        "states": [("red",), ("green",)],
        "actions": ["stop", "forward"],
        "kwargs": {},
    },
    "GridWorld-jrl": {
        "templates": ["you are at row {0} column {1} .", "at row {0} and column {1} .",
                      "your place is row {0} , column {1} .", "row {0} , column {1} is where you are ."],
        "states": [(str(i // 4), str(i % 4)) for i in range(16)],
        "actions": ["up", "right", "down", "left"],
        "kwargs": {"start": -1},
    },
}  # fmt: skip
NOTHING = "nothing happens . good ?"
SURE = 4.0
"""A transition of reward r is approved with probability σ(4 r): verdicts and preferences are drawn so."""
VERDICTS = 3200
"""On transitions of each reward, which the judge learns from."""


def level10(name: str, num_steps: int) -> Callable[[int], dict[str, Any]]:
    """A decoder learns transcripts of random play with verdicts, and then it plays. A copy learns to judge it.

    Held out are a fifth of what can be said of what can happen. Rewards agree where they round to the rule's.
    """

    def run(seed: int) -> dict[str, Any]:
        game, random = GAMES[name], np.random.default_rng(seed)
        env = jrl.make(name, raw=True, **game["kwargs"])
        S, A, K = len(game["states"]), len(game["actions"]), len(game["templates"])
        mdp = jrl.envs.to_mdp(env, 0.9).mdp
        best = np.asarray(jrl.ops.mdp.value_iteration(mdp).q)
        over = {"TrafficLight-jrl": [], "GridWorld-jrl": [14, 15]}[
            name
        ]  # no one acts in the goal and the trap
        possible = jax.vmap(jax.vmap(env.step.outcomes, (None, 0, None)), (0, None, None))(
            jnp.arange(S), jnp.arange(A), jax.tree.map(jnp.asarray, env.params)
        )

        def text(s: int, k: int) -> str:
            return game["templates"][k].format(*game["states"][s])

        def story(s: int, a: int, to: int, k: int) -> str:
            return f"{text(s, k)} you go {game['actions'][a]} . {text(to, k)} good ?"

        happens = [
            (s, a, int(possible.next_state[s, a, i]), k)
            for s in range(S) if s not in over for a in range(A) for i in np.flatnonzero(possible.probability[s, a])
            for k in range(K)
        ]  # fmt: skip
        rule = np.array([mdp.R[s, a] for s, a, _, _ in happens])
        held_out = random.random(len(happens)) < 0.2
        logged = np.flatnonzero(~held_out)

        stories = [story(*what) for what in happens] + [NOTHING]
        tokenizer = tokenizers.Word.of(" ".join(["yes no", *game["actions"], *stories]))
        yes, no = (tokenizer.encode(word)[0] for word in ("yes", "no"))
        encoded = [tokenizer.encode(each) for each in stories]

        # A language model of the log. Verdicts are drawn anew for each copy.
        worth = np.append(rule, 0.0)
        copies = np.repeat(np.append(logged, len(happens)), 40)
        approved = random.random(len(copies)) < 1.0 / (1.0 + np.exp(-SURE * worth[copies]))
        longest = max(map(len, encoded)) + 1
        rows = [
            ([encoded[i][0]], [*encoded[i][1:], yes if good else no])
            for i, good in zip(copies, approved, strict=True)
        ]
        corpus = data.prompted(rows, longest, -1)
        config = transformer.Config(
            tokenizer.vocab_size,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            width=64,
            mlp_width=128,
            max_length=longest,
        )

        def learn(corpus: pretraining.Corpus, num_steps: int, start: Any = None) -> Any:
            learner = pretraining.make(corpus, config, pretraining.Config(batch_size=64), start=start)
            numbers = pretraining.HParams(
                learning_rate=3e-3,
                learning_rate_end=1e-4,
                anneal_tokens=num_steps * learner.env_steps_per_step,
                weight_decay=0.0,
            )
            return train(learner, numbers, seed, num_steps).params

        language = learn(corpus, 100)

        # A verdict is one token in 25, and 95 of 100 transitions of the grid pay nothing: a coin's verdict. So the
        # judge goes on from the language model with verdicts alone, as many of each reward. How often a transition
        # comes up is balanced, not how it is judged: what log-odds it is to have stays.
        known = np.append(logged, len(happens))
        alike = [known[worth[known] == value] for value in np.unique(worth[known])]
        asked = np.concatenate([np.repeat(kind, VERDICTS // len(kind)) for kind in alike])
        good = random.random(len(asked)) < 1.0 / (1.0 + np.exp(-SURE * worth[asked]))
        verdicts = [(encoded[i], [yes if each else no]) for i, each in zip(asked, good, strict=True)]
        judging = learn(data.prompted(verdicts, longest, -1), 60, language)

        # The two rewards: its verdict, and a reward model that goes on from it.
        table = np.full((len(stories), longest), -1, np.int32)
        for row, tokens in zip(table, encoded, strict=True):
            row[: len(tokens)] = tokens
        judge = jax.jit(lambda tokens: control.log_odds(judging, config, tokens, yes, no) / SURE)

        nothing = at_end(lambda text: jnp.float32(0))
        texts = token_mdp(
            Prompts(table[:1, :1], np.ones(1, int)),
            nothing,
            vocab_size=config.vocab_size,
            max_new_tokens=longest - 1,
        )
        valued = models.from_transformer(
            texts, transformer.Config(**{**vars(config), "value_head": True}),
            transformer.init_heads(transformer.Config(**{**vars(config), "value_head": True})) | language,
        )  # fmt: skip
        first, second = random.choice(np.append(logged, len(happens)), (2, 20_000))
        chance = 1.0 / (1.0 + np.exp(-SURE * (worth[first] - worth[second])))
        pairs = preferences.Pairs(
            table[first],
            table[second],
            np.ones(len(first), np.int32),
            (random.random(len(first)) < chance).astype(np.float32),
        )
        fitted, _ = preferences.fit(jax.random.key(seed), valued, pairs, num_steps=600, learning_rate=1e-3)
        anchor = preferences.values(valued, fitted, jnp.asarray(table[-1:]))[0]
        model = jax.jit(lambda tokens: (preferences.values(valued, fitted, tokens) - anchor) / SURE)

        def verdict(value: Any) -> Any:
            return jnp.clip(jnp.round(value), -1.0, 1.0)

        results: dict[str, Any] = {"transitions": len(happens), "held_out": int(held_out.sum())}
        by_place = np.zeros((S, A, S), np.int32)
        for i, (s, a, to, k) in enumerate(happens):
            if k == 0:
                by_place[s, a, to] = i
        where, shown = jnp.asarray(by_place), jnp.asarray(table)
        render = control.table([tokenizer.encode(f"{text(s, 0)} you go") for s in range(S)])
        words = [tokenizer.encode(word)[0] for word in game["actions"]]
        network = control.policy_network(config, render, words, language)
        for kind, rate in (("judge", judge), ("model", model)):
            agrees = np.asarray(verdict(rate(jnp.asarray(table[:-1])))) == rule
            results[f"{kind}_agreement"] = float(agrees[held_out].mean())
            kinds = [agrees[held_out & (rule == value)].mean() for value in np.unique(rule[held_out])]
            results[f"{kind}_agreement_of_the_worst_kind"] = float(min(kinds))
            # One that says the same to all has 1 / kinds.
            results[f"{kind}_balanced_agreement"] = float(np.mean(kinds))

            def reward(obs: Any, action: Any, next_obs: Any, rate: Any = rate) -> Any:
                return verdict(rate(shown[where[obs, action, next_obs]][None]))[0]

            judged = control.rewarded_by(env, reward)
            algo = jrl.ppo.make(judged, jrl.ppo.Config(num_envs=64, unroll_length=32), network=network)
            state = train(algo, jrl.ppo.HParams(learning_rate=1e-3, gamma=0.9), seed, num_steps)
            action = np.asarray(algo.policy(state)(jax.random.key(0), jnp.arange(S), ())[0])
            right = [best[s, action[s]] >= best[s].max() - 1e-5 for s in range(S) if s not in over]
            results[f"{kind}_optimal"] = float(np.mean(right))
        results["agreement"] = min(results["judge_agreement"], results["model_agreement"])
        results["optimal"] = min(results["judge_optimal"], results["model_optimal"])
        return results

    return run
