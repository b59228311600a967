"""The ladder of language tasks: what each method reaches where the answer is known.

    python benchmarks/ladder.py level0-rloo level1-grpo --seeds 3
    python benchmarks/ladder.py --list
    python benchmarks/ladder.py --table

Level 0: every text of 8^5 enumerated; policies against π* ∝ π_ref exp(return / β), values against Q*.
Level 1: shortest walks on trlx's graph of 21 nodes. Level 2: "the cat sat on the" → "mat" over the bigrams of a real
text. Level 3: addition, sorting, reversing, scored on questions that no training saw. Levels 4, 5 and 10 begin with a
language model (``benchmarks/ladder_models.py``); level 5 needs that of ``benchmarks/language.py`` in
``runs/shakespeare``. Levels 6 and 7 are applications (``benchmarks/ladder_applications.py``), level 8 is a DQN's
student (a language model's is in ``benchmarks/language.py``), level 9 writes poems
(``benchmarks/ladder_poems.py``). ``bleu``: sentences a second.
Each row writes ``benchmarks/results/language-<row>.json``: the bar, one record a seed with what was reached, wall and
processor seconds (compilation included), settings, versions, device, commit. Real text is read from JRL_DATA or
../shared/data; rows that need it say so where it is absent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jrl import xla

xla.configure()

import jax
import jax.numpy as jnp
import numpy as np
from ladder_applications import level7, phonemes
from ladder_models import DATA, level4, level5, level10, train
from ladder_poems import level9

import jrl
from jrl import networks, stages
from jrl.bench.recording import commit
from jrl.language import dpo, exact, imitation, metrics, models, offline, tasks, token_q
from jrl.language import policy_gradient as pg
from jrl.language.preferences import Pairs

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
TABLE_START, TABLE_END = "<!-- language-table:start -->", "<!-- language-table:end -->"
BETA = 0.5


@dataclasses.dataclass(frozen=True)
class Row:
    """What is run (``seed -> what was reached``) and the bar it is held to."""

    run: Callable[[int], dict[str, Any]]
    bar: str
    reached: Callable[[dict[str, Any]], bool]


# ----------------------------------------------------------------------------------------------------- level 0


def log_policy(model: models.Model, params: Any, tree: exact.Tree) -> tuple[jax.Array, ...]:
    return tuple(jax.nn.log_softmax(model.prefix(params, obs).logits, -1) for obs in tree.obs)


def level0_policy(variant: str, num_steps: int, **choices: Any) -> Callable[[int], dict[str, Any]]:
    """``KL(π ‖ π*)`` of a table with a row for each prefix, from the uniform policy."""

    def run(seed: int) -> dict[str, Any]:
        env = tasks.random_rewards()
        tree, model = exact.enumerate_prefixes(env), models.table(env)
        config = pg.Config(variant=variant, penalty="reward", num_prompts=1, group_size=4096, **choices)
        numbers = pg.HParams(
            learning_rate=0.03, kl_coef=BETA, value_coef=1.0, value_clip_eps=1e9, max_grad_norm=1e9
        )
        algo = pg.make(env, config, model=model)
        state = train(algo, numbers, seed, num_steps)
        return judged(model, state.params, tree)

    return run


def level0_dpo(seed: int) -> dict[str, Any]:
    """Exhaustive pairs at 4^3 texts, and at 8^5, whose pairs are 5·10^8, a fresh batch of them at each update."""
    results = {}
    for size, length, num_steps, batch in ((4, 3, 100, 2016), (8, 5, 400, 16384)):
        env = tasks.random_rewards(size, length)
        tree, model = exact.enumerate_prefixes(env), models.table(env)
        count = size**length
        texts = np.stack(np.unravel_index(np.arange(count), (size,) * length), axis=1)
        tokens = np.concatenate([np.zeros((count, 1), int), texts], axis=1).astype(np.int32)
        experience = offline.replayed(env, tokens, np.zeros(count, int))
        returns = np.asarray(experience.reward.sum(1))
        if length == 3:
            first, second = np.triu_indices(count, 1)
        else:
            random = np.random.default_rng(seed)
            first, second = random.integers(count, size=(2, 2**21))
        pairs = Pairs(
            tokens[first], tokens[second], np.ones(len(first), np.int32),
            (1.0 / (1.0 + np.exp(returns[second] - returns[first]))).astype(np.float32),
        )  # fmt: skip
        config = dpo.Config(batch_size=batch, num_updates=10)
        algo = dpo.make(env, config, model=model, pairs=pairs)
        state = train(algo, dpo.HParams(learning_rate=0.05, beta=BETA, max_grad_norm=1e9), seed, num_steps)
        results |= {f"{name}_{size}^{length}": x for name, x in judged(model, state.params, tree).items()}
    return results | {"kl": max(results["kl_4^3"], results["kl_8^5"])}


def judged(model: models.Model, params: Any, tree: exact.Tree) -> dict[str, Any]:
    uniform = [jnp.full(x.shape, -np.log(x.shape[1])) for x in tree.reward]
    best, ours = exact.soft_policy(tree, uniform, BETA), log_policy(model, params, tree)
    return {
        "kl": float(exact.divergence(tree, ours, best)),
        "kl_of_the_first_policy": float(exact.divergence(tree, uniform, best)),
        "return": float(exact.expectation(tree, ours)),
        "return_of_the_best": float(exact.expectation(tree, best)),
    }


def q_error(model: models.Model, params: Any, tree: exact.Tree, best: tuple[jax.Array, ...]) -> float:
    errors = [
        jnp.abs(model.prefix(params, obs).q[..., 0, :] - q)[alive].max()
        for obs, q, alive in zip(tree.obs, best, tree.alive, strict=True)
    ]
    return float(max(errors))


def level0_dqn(seed: int) -> dict[str, Any]:
    """``max |Q − Q*|`` over all prefixes and tokens, the texts said at random."""
    env = tasks.random_rewards()
    tree, model = exact.enumerate_prefixes(env), models.table(env, num_q=1)
    config = token_q.Config(num_envs=1024, batch_size=4096, capacity=16384, warmup_texts=8192)
    numbers = token_q.HParams(learning_rate=0.05, epsilon_end=1.0, lambda_=0.0, tau=0.1, max_grad_norm=1e9)
    state = train(token_q.make(env, config, model=model), numbers, seed, 1000)
    return {"q_error": q_error(model, state.params, tree, exact.optimal_values(tree))}


# ----------------------------------------------------------------------------------------------------- level 1


def optimality(algo: jrl.Algorithm, state: Any) -> dict[str, Any]:
    """Greedy, from every start: the walks do not depend on the key then."""
    env = jrl.make("RandomWalks-jrl")
    starts = jnp.pad(jnp.arange(1, 21)[:, None], ((0, 0), (0, 9)), constant_values=-1)
    policy = algo.policy(state)
    states = jax.vmap(lambda i: env.step.start(i)[0])(jnp.arange(20))
    total, over, obs = np.zeros(20), np.zeros(20, bool), starts
    for _ in range(9):
        action, _, _ = policy(jax.random.key(0), obs)
        states, obs, reward, terminated, truncated = jax.vmap(env.step.advance, (0, 0, None))(
            states, action, env.params
        )
        total += np.where(over, 0.0, reward)
        over |= np.asarray(terminated | truncated)
    return {"optimality": float(total.mean()), "optimality_of_the_worst_start": float(total.min())}


def level1_policy(variant: str, num_steps: int, **choices: Any) -> Callable[[int], dict[str, Any]]:
    """As in trlx: the first policy imitates 1,000 logged walks."""

    def run(seed: int) -> dict[str, Any]:
        began = time.perf_counter()
        env, config = jrl.make("RandomWalks-jrl"), pg.Config(variant=variant, **choices)
        model = models.of_config(env, config)
        walks, _ = tasks.logged_walks(tasks.walk_graph(), seed=seed)
        texts = imitation.Texts(walks, np.ones(len(walks), np.int32))
        params, _ = imitation.fit(jax.random.key(seed), model, texts, num_steps=500)
        algo = pg.make(env, config, model=model._replace(init=lambda key: params))
        first = optimality(algo, pg.State(params, (), (), None, (), None, None, None))
        state = train(algo, pg.HParams(), seed + 1, num_steps)
        seconds = time.perf_counter() - began
        return optimality(algo, state) | {
            "optimality_of_the_first_policy": first["optimality"], "seconds_to_the_policy": round(seconds, 1)
        }  # fmt: skip

    return run


def level1_dqn(seed: int) -> dict[str, Any]:
    """From nothing: its own texts alone."""
    config = token_q.Config(num_envs=1024, batch_size=256, capacity=16384)
    algo = token_q.make(jrl.make("RandomWalks-jrl"), config)
    numbers = token_q.HParams(epsilon_env_steps=3e6, epsilon_end=0.4)
    return optimality(algo, train(algo, numbers, seed, 600))


def level1_ilql(seed: int) -> dict[str, Any]:
    """From 1,000 logged walks alone."""
    env = jrl.make("RandomWalks-jrl")
    walks, _ = tasks.logged_walks(tasks.walk_graph(), seed=seed)
    data = offline.replayed(env, walks, walks[:, 0] - 1)
    over = np.asarray(data.terminated | data.truncated)
    logged = np.where(np.cumsum(over, 1) - over == 0, data.reward, 0.0).sum(1).mean()
    config = token_q.Config(variant="ilql", batch_size=128, num_updates=8)
    algo = token_q.make(env, config, data=data)
    state = train(algo, token_q.HParams(cql_coef=0.1), seed, 240)
    return optimality(algo, state) | {"optimality_of_the_log": float(logged)}


# ----------------------------------------------------------------------------------------------------- level 2


def verse() -> tuple[Any, list[str], exact.Tree]:
    lines = (DATA / "bible" / "en_es.tsv").read_text(encoding="utf-8").splitlines()[1:]
    text = " ".join(line.split("\t")[1] for line in lines)
    env = tasks.next_word(text)
    return env, tasks.next_word_vocabulary(text), exact.enumerate_prefixes(env)


def said(algo: jrl.Algorithm, state: Any, env: Any, words: list[str]) -> str:
    """Return what the greedy policy goes on with."""
    policy, (text, obs) = algo.policy(state), env.step.start(0)
    spoken = []
    for _ in range(env.step.max_new_tokens):
        action, _, _ = policy(jax.random.key(0), obs[None])
        spoken.append(words[int(action[0])])
        text, obs, *_, terminated, _ = env.step.advance(text, action[0], env.params)
        if terminated:
            break
    return " ".join(spoken)


def level2(seed: int) -> dict[str, Any]:
    env, words, tree = verse()
    best = exact.optimal_values(tree)
    size, results = len(words), {"vocabulary": len(words)}
    results["best"] = words[int(best[0][0].argmax())]
    numbers = {"learning_rate": 0.05, "max_grad_norm": 1e9}

    model = models.table(env, num_q=1)
    config = token_q.Config(num_envs=256, batch_size=1024, capacity=8192, warmup_texts=4096)
    algo = token_q.make(env, config, model=model)
    dqn = train(algo, token_q.HParams(epsilon_end=1.0, lambda_=0.0, tau=0.1, **numbers), seed, 400)
    results["dqn"] = said(algo, dqn, env, words)
    results["dqn_q_error"] = q_error(model, dqn.params, tree, best)

    # The log: every text of two words once.
    pairs = np.stack(np.unravel_index(np.arange(size**2), (size, size)), axis=1)
    start = np.asarray(env.step.start(0)[1])
    tokens = np.broadcast_to(start, (size**2, len(start))).copy()
    tokens[:, -2:] = np.where((pairs[:, :1] == 0) & [[False, True]], -1, pairs)
    data = offline.replayed(env, tokens, np.zeros(size**2, int))
    model = models.table(env, num_q=2)
    config = token_q.Config(variant="ilql", batch_size=1024, num_updates=4)
    algo = token_q.make(env, config, model=model, data=data)
    ilql = train(algo, token_q.HParams(expectile=0.99, tau=0.1, **numbers), seed, 400)
    results["ilql"] = said(algo, ilql, env, words)
    results["ilql_q_error"] = q_error(model, ilql.params, tree, best)

    model = models.table(env)
    config = pg.Config(variant="ppo", num_prompts=512, group_size=1, num_epochs=2, num_minibatches=2)
    algo = pg.make(env, config, model=model)
    ppo = train(algo, pg.HParams(entropy_coef=0.01, **numbers), seed, 200)
    results["ppo"] = said(algo, ppo, env, words)

    # The generic algorithms, on the same environment and unmodified.
    algo = jrl.ppo.make(env, jrl.ppo.Config(num_envs=64, unroll_length=16))
    results["generic_ppo"] = said(algo, train(algo, jrl.ppo.HParams(gamma=1.0), seed, 150), env, words)
    generic = jrl.dqn.Config(num_envs=32, num_updates=4, capacity=20_000, warmup_env_steps=4096)
    algo = jrl.dqn.make(env, generic)
    numbers = jrl.dqn.HParams(gamma=1.0, epsilon_end=0.3, epsilon_env_steps=3e4)
    results["generic_dqn"] = said(algo, train(algo, numbers, seed, 2000), env, words)
    return results


# ----------------------------------------------------------------------------------------------------- level 3


def level3(
    name: str, num_steps: int, numbers: dict[str, float] | None = None, **choices: Any
) -> Callable[[int], dict[str, Any]]:
    """PPO from nothing but rewards; exact match of the greedy answer to every question held out.

    Args:
        name: of the environment, whose reward is each token's own.
        num_steps: steps of PPO.
        numbers: more of its HParams.
        choices: more of its Config.
    """
    hparams = {"gae_lambda": 0.0, "entropy_coef": 0.005} | (numbers or {})

    def run(seed: int) -> dict[str, Any]:
        env, held_out = jrl.make(name), jrl.make(name, split="test")
        config = pg.Config(
            variant="ppo", num_prompts=1024, group_size=1, num_epochs=4, num_minibatches=8, **choices
        )
        algo = pg.make(env, config)
        state = train(algo, pg.HParams(**hparams), seed, num_steps)
        policy = algo.policy(state)

        def exact_match(env: Any) -> float:
            count = len(env.step.prompts.length)
            states, obs = jax.vmap(env.step.start)(jnp.arange(count))
            total, over = np.zeros(count), np.zeros(count, bool)
            for _ in range(env.step.max_new_tokens):
                action, _, _ = policy(jax.random.key(0), obs)
                states, obs, reward, terminated, truncated = jax.vmap(env.step.advance, (0, 0, None))(
                    states, action, env.params
                )
                total += np.where(over, 0.0, reward)
                over |= np.asarray(terminated | truncated)
            return float((total > 1.0 - 1e-5).mean())

        return {
            "exact_match": exact_match(held_out),
            "exact_match_in_training": exact_match(env),
            "questions_held_out": len(held_out.step.prompts.length),
            "texts_said": num_steps * 1024,
        }

    return run


# -------------------------------------------------------------------------------------------------------- BLEU


def bleu(seed: int) -> dict[str, Any]:
    """Verses of at most 40 words against 1 and 4 others, in chunks that stay in the cache."""
    lines = (DATA / "bible" / "en_es.tsv").read_text(encoding="utf-8").splitlines()[1:]
    words = [line.split("\t")[2].split() for line in lines]
    words = [sentence for sentence in words if len(sentence) <= 40][:8192]
    known: dict[str, int] = {}
    tokens, length = np.zeros((8192, 40), np.int32), np.array([len(w) for w in words], np.int32)
    for row, sentence in zip(tokens, words, strict=True):
        row[: len(sentence)] = [known.setdefault(word, len(known)) for word in sentence]
    random, results = np.random.default_rng(seed), {"sentences": len(words), "tokens_at_most": 40}

    @jax.jit
    def score(*arrays: jax.Array) -> jax.Array:
        chunks = [x.reshape(-1, 256, *x.shape[1:]) for x in arrays]
        return jax.lax.map(lambda chunk: metrics.bleu(metrics.bleu_statistics(*chunk)), tuple(chunks))

    for references in (1, 4):
        order = np.stack([random.permutation(len(words)) for _ in range(references)], axis=1)
        arrays = [jnp.asarray(x) for x in (tokens, length, tokens[order], length[order])]
        jax.block_until_ready(score(*arrays))
        rates = []
        for _ in range(7):
            began = time.perf_counter()
            jax.block_until_ready(score(*arrays))
            rates.append(len(words) / (time.perf_counter() - began))
        results[f"sentences_per_second_{references}"] = round(float(np.median(rates)))
    return results


def up_to(key: str, most: float) -> dict[str, Any]:
    return {"bar": f"{key} <= {most}", "reached": lambda result: result[key] <= most}


def level8(seed: int) -> dict[str, Any]:
    """A DQN of CartPole and a student of a quarter its size, distilled from what it thinks where it has been."""
    env = jrl.make("CartPole-v1")
    algo, hparams = jrl.dqn.make(env), jrl.dqn.HParams()
    state = jax.jit(algo.init)(jax.random.key(seed), hparams)
    state, _ = jax.block_until_ready(jrl.train(algo, state, hparams, num_steps=49_000))
    # What the teacher sees when it acts, a little at random: 256 environments, 200 steps.
    envs = jrl.envs.vectorize(env, 256)
    start = jrl.rollout.start(jax.random.key(seed + 1), envs, env.params, 256)
    wandering = algo.policy(state, greedy=False, epsilon=0.2)
    _, seen, _ = jax.jit(jrl.rollout.unroll, static_argnums=(1, 5))(
        jax.random.key(seed + 2), envs, env.params, wandering, start, 200
    )
    student = networks.q_network(env, jrl.dqn.Config(hidden_sizes=(56, 38)))
    params = student.init(jax.random.key(seed + 3), jnp.zeros(4), ())
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, state.params)]
    params, _ = stages.fit(
        jax.random.key(seed + 4),
        stages.distillation_loss(student, 0.1),
        params,
        (seen.obs.reshape(-1, 4), seen.extras["q"].reshape(-1, 2)),
        num_steps=3000,
        batch_size=256,
    )

    def act(key: Any, obs: Any, memory: Any) -> tuple[Any, Any, Any]:
        return student.apply(params, obs, ())[0].argmax(-1).astype(jnp.int32), memory, ()

    student_return, teacher_return = (
        float(jrl.evaluate(jax.random.key(seed + 6), env, policy, num_episodes=100).episode_return.mean())
        for policy in (act, algo.policy(state))
    )
    return {
        "student": student_return,
        "teacher": teacher_return,
        "student_to_teacher": student_return / teacher_return,
        "size": sizes[0] / sizes[1],
    }


def at_least(key: str, least: float) -> dict[str, Any]:
    return {"bar": f"{key} >= {least}", "reached": lambda result: result[key] >= least}


def in_words(result: dict[str, Any]) -> bool:
    return result["optimal"] == 1.0 and result["agreement"] >= 0.95


ROWS = {
    "level0-rloo": Row(level0_policy("rloo", 1000), **up_to("kl", 0.01)),
    "level0-reinforce": Row(level0_policy("reinforce", 1000), **up_to("kl", 0.01)),
    "level0-grpo": Row(level0_policy("grpo", 1000), **up_to("kl", 0.01)),
    "level0-dr_grpo": Row(level0_policy("dr_grpo", 1200), **up_to("kl", 0.01)),
    "level0-ppo": Row(level0_policy("ppo", 600, num_epochs=2, num_minibatches=2), **up_to("kl", 0.01)),
    "level0-dpo": Row(level0_dpo, **up_to("kl", 0.01)),
    "level0-dqn": Row(level0_dqn, **up_to("q_error", 0.01)),
    "level1-grpo": Row(level1_policy("grpo", 60, num_prompts=64, group_size=16), **at_least("optimality", 0.9995)),
    "level1-ppo": Row(
        level1_policy("ppo", 40, num_prompts=1024, group_size=1, num_epochs=4, num_minibatches=4),
        **at_least("optimality", 0.9995),
    ),
    "level1-dqn": Row(level1_dqn, **at_least("optimality", 0.9995)),
    "level1-ilql": Row(level1_ilql, **at_least("optimality", 0.95)),
    "level2": Row(
        level2,
        "dqn, ilql and ppo say mat; dqn_q_error <= 0.01",
        lambda r: all(r[k].startswith("mat") for k in ("dqn", "ilql", "ppo")) and r["dqn_q_error"] <= 0.01,
    ),
    # What a digit earns hangs on no other digit, so that γ = 0 loses nothing and its advantage is only its own. The
    # sum is said first digit first: the carry is learned last, when a policy of little entropy explores no more.
    "level3-addition": Row(
        level3(
            "Addition-jrl",
            400,
            {"gamma": 0.0, "entropy_coef": 0.2, "learning_rate": 2e-3},
            hidden_sizes=(256, 256),
        ),
        **at_least("exact_match", 0.99),
    ),
    "level3-sorting": Row(level3("Sorting-jrl", 400, hidden_sizes=(256, 256)), **at_least("exact_match", 0.99)),
    "level3-reversing": Row(level3("Reversing-jrl", 300, hidden_sizes=(256, 256)), **at_least("exact_match", 0.99)),
    "level4": Row(
        level4,
        "rate >= 0.9; perplexity_ratio <= 1.3",
        lambda r: r["rate"] >= 0.9 and r["perplexity_ratio"] <= 1.3,
    ),
    "level5": Row(
        level5,
        "dqn_to_ppo >= 0.95; gain >= 0.3",
        lambda r: r["dqn_to_ppo"] >= 0.95 and r["gain"] >= 0.3,
    ),
    "level6-phonemes": Row(phonemes, "error_removed > 0", lambda r: r["error_removed"] > 0),
    "level7": Row(level7, **at_least("success", 0.9)),
    "level8-dqn": Row(
        level8,
        "student_to_teacher >= 0.95; size <= 0.25; teacher > 400",
        lambda r: r["student_to_teacher"] >= 0.95 and r["size"] <= 0.25 and r["teacher"] > 400,
    ),
    "level9": Row(
        level9,
        "format = 1; reward_gain > 0; perplexity_ratio <= 1.2",
        lambda r: r["format"] == 1 and r["reward_gain"] > 0 and r["perplexity_ratio"] <= 1.2,
    ),
    "level10-light": Row(level10("TrafficLight-jrl", 20), "optimal = 1; agreement >= 0.95", in_words),
    "level10-grid": Row(level10("GridWorld-jrl", 40), "optimal = 1; agreement >= 0.95", in_words),
    "bleu": Row(bleu, **at_least("sentences_per_second_4", 50_000)),
}  # fmt: skip


def measure(name: str, seeds: int) -> dict[str, Any]:
    """Run ``seeds`` seeds of a row and return its record."""
    row, records = ROWS[name], []
    for seed in range(seeds):
        wall, cpu = time.perf_counter(), time.process_time()
        result = row.run(seed)
        seconds = {
            "wall_seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)
        }  # fmt: skip
        records.append({"seed": seed, **result, **seconds, "reached": bool(row.reached(result))})
        print(f"{name}: {records[-1]}", flush=True)
    return {
        "row": name,
        "bar": row.bar,
        "reached": sum(record["reached"] for record in records),
        "seeds": seeds,
        "jax": jax.__version__,
        "jrl": jrl.__version__,
        "device": str(jax.devices()[0]),
        "cores": os.cpu_count(),
        "commit": commit(Path(__file__).parent),
        "records": records,
    }


def table() -> str:
    """Return the README's table, made from the records alone."""
    lines = ["| Row | Held to | Reached | Processor seconds |", "|---|---|---|---:|"]
    for name, row in ROWS.items():
        path = RESULTS / f"language-{name}.json"
        if not path.exists():
            continue
        records = json.loads(path.read_text())["records"]
        shown = (
            [key for key in records[0] if key in row.bar.split()]
            if name != "level2"
            else ["dqn", "dqn_q_error"]
        )
        values = "; ".join(", ".join(f"{record[key]:.4g}" if isinstance(record[key], float) else str(record[key])
                                     for key in shown) for record in records)  # fmt: skip
        missed = "" if all(record["reached"] for record in records) else " (missed)"
        seconds = ", ".join(f"{record['cpu_seconds']:.0f}" for record in records)
        lines.append(f"| {name} | {row.bar} | {values}{missed} | {seconds} |")
    return "\n".join(lines) + "\n"


def insert_table(readme: str) -> str:
    """Return the README's text with the table of the records between its two markers."""
    before, rest = readme.split(TABLE_START)
    _, after = rest.split(TABLE_END)
    return before + TABLE_START + "\n" + table() + TABLE_END + after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true", help="write the table of the records into the README")
    arguments = parser.parse_args()
    if arguments.table:
        README.write_text(insert_table(README.read_text()))
        return
    unknown = sorted(set(arguments.rows) - set(ROWS))
    if unknown:
        parser.error(f"unknown row {', '.join(unknown)}: choose from {', '.join(ROWS)}")
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: must be at least 1.")
    if arguments.list or not arguments.rows:
        for name, row in ROWS.items():
            print(f"{name:20} {row.bar}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.rows:
        record = measure(name, arguments.seeds)
        path = arguments.out / f"language-{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(
            f"{name}: {record['reached']} of {record['seeds']} reached {record['bar']} -> {path}", flush=True
        )


if __name__ == "__main__":
    main()
