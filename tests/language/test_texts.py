"""Text-jrl, its rewards by name, and runs that go on from a trained model: from the command line and back."""

from __future__ import annotations

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import cli, configuration, flags, records
from jrl.language import (
    commands,
    models,
    named_rewards,
    ngrams,
    offline,
    policy_gradient,
    runs,
    tokenizers,
    weights,
)
from jrl.language.environments import Prompts, Rating, at_end, token_mdp
from jrl.language.rewards import Text
from jrl.networks import transformer
from jrl.sweep import command, runner

TEXT = "to be or not to be, that is the question\n" * 20
REWARD = ["--reward", "ngram:2", "--reward", "-0.5*repetition:2", "--reward", "lexicon:be,not=-1"]
TINY = ["--env-kwarg", "max_new_tokens=5", "--env-kwarg", "prompt_length=3", "--progress", "lines"]
RUN = [*REWARD, *TINY, "--cache", "--eval-episodes", "4"]
GRPO = ["grpo", "--env", "Text-jrl", *RUN, "--num-prompts", "2", "--group-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, a model of it, and what GRPO made of that model in four steps."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus.txt").write_text(TEXT)
    model = [
        "--num-layers",
        "1",
        "--num-heads",
        "2",
        "--num-kv-heads",
        "1",
        "--width",
        "8",
        "--mlp-width",
        "8",
    ]
    corpus = ["--corpus", str(folder / "corpus.txt"), "--out", str(folder / "lm"), "--tokens", "640"]
    assert cli.main(["pretrain", *corpus, *model, "--max-length", "8", "--batch-size", "4"]) == 0
    assert train(folder, "rl", 4) == 0
    return folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "NPROC"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


def train(folder, out, steps, *more):
    return cli.main(["train", *GRPO, "--model", str(folder / "lm"), "--out", str(folder / out),
                     "--env-steps", str(steps * 2 * 4 * 5), *more])  # fmt: skip


def fails(capsys, *args):
    assert cli.main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# ------------------------------------------------------------------------------------------------------ rewards


def texts(count=64, size=9, vocab_size=4):
    random = np.random.default_rng(1)
    tokens = random.integers(0, vocab_size, (count, size))
    prompt, length = random.integers(1, 3, count), random.integers(4, size + 1, count)
    tokens[np.arange(size) >= length[:, None]] = -1
    return Text(*(jnp.asarray(x) for x in (tokens, prompt, length, random.random(count) < 0.5)))


def test_what_is_paid_token_by_token_adds_up_to_the_score():
    corpus = np.random.default_rng(0).integers(0, 4, 200)
    source = named_rewards.Source(["a", "b", "c", "d"], 8, lambda: corpus, None)
    per_token, rating = named_rewards.build(["2*ngram:3", "-1*repetition:2"], source)
    assert rating.weights == {"ngram": 0.0, "repetition": 0.0}  # reported, not paid again
    given = texts()

    def paid(text):
        """Play the text again."""

        def step(total, length):
            last = length == text.length
            said = text._replace(
                tokens=jnp.where(jnp.arange(9) < length, text.tokens, -1),
                length=length,
                finished=text.finished & last,
            )
            earned = per_token.step((), said, last)[1]
            counted = (length > text.prompt_length) & (length <= text.length)
            return total + jnp.where(counted, earned, 0.0), None

        return jax.lax.scan(step, jnp.float32(0), jnp.arange(1, 10))[0]

    total, scores = jax.vmap(rating.__call__)(given)
    assert not total.any()
    expected = 2 * scores["score/ngram"] - scores["score/repetition"]
    np.testing.assert_allclose(jax.vmap(paid)(given), expected, atol=1e-5)
    model = ngrams.fit([corpus.tolist()], 4, 3)
    for i in range(0, 64, 7):
        row = np.asarray(given.tokens[i])
        first, last = int(given.prompt_length[i]), int(given.length[i]) - int(given.finished[i])
        log_p = np.asarray(ngrams.log_probs(model, jnp.maximum(row, 0)))[first:last]
        np.testing.assert_allclose(scores["score/ngram"][i], (log_p + np.log(4)).sum() / 8, atol=1e-5)
        pairs = [tuple(row[k : k + 2]) for k in range(first, last - 1)]
        np.testing.assert_allclose(scores["score/repetition"][i], (len(pairs) - len(set(pairs))) / 8)


def test_rewards_of_whole_texts():
    source = named_rewards.Source(
        ["a", "b", "c", " "], 8, lambda: np.array([0]), lambda tokens: -1.0 * tokens
    )
    _, rating = named_rewards.build(
        ["lexicon:ab,c=-2", "format:a.*", "length:4", "0.5*likelihood", "finished"], source
    )
    text = Text(jnp.array([0, 0, 1, 3, 2, -1]), jnp.int32(1), jnp.int32(5), jnp.bool_(False))
    total, scores = rating(text)  # the prompt "a", and "ab c"
    assert {name: float(value) for name, value in scores.items()} == {
        "score/lexicon": -1.0, "score/format": 1.0, "score/length": 1.0, "score/likelihood": -1.5, "score/finished": 0.0
    }  # fmt: skip
    assert total == -1.0 + 1.0 + 1.0 - 0.75
    assert named_rewards.parse("-1e-1*length:3") == (-0.1, "length", "3")
    for wrong, message in {
        "joy": r"--reward joy: expected \[WEIGHT\*\]NAME",
        "x*ngram": "expected",
        "1.2.3*finished": r"--reward 1\.2\.3\*finished: expected .* a finite number as weight",
        "1e999*finished": r"--reward 1e999\*finished: expected .* a finite number as weight",
        "ngram:0": "--reward ngram:0: .*whole number of at least 1",
        "lexicon:b=c": "'b=c': expected WORD or WORD=NUMBER",
        "lexicon:ab,c,AB=-1": "the word 'AB' is listed twice, upper and lower case alike",
        "finished:7": "finished has no argument: leave :7 out",
        "likelihood:a": "likelihood has no argument: leave :a out",
        "format:(a": "a parenthesis is not closed at character 2",
    }.items():
        with pytest.raises(ValueError, match=message):
            named_rewards.build([wrong], source)
    with pytest.raises(ValueError, match=r"--reward 2\*finished: given twice"):
        named_rewards.build(["finished", "2*finished"], source)
    with pytest.raises(ValueError, match="there is no frozen model: pass --model"):
        named_rewards.build(["likelihood"], source._replace(log_probs=None))


def test_kernels_rate_whole_texts_once_and_as_the_environment_does():
    """What grpo and token_dqn report is what the texts they said earn when they are played again."""

    def count(text):
        return (text.tokens == 1).sum().astype(jnp.float32)

    rating = Rating({"ones": count, "reported": lambda text: text.length}, {"ones": 2.0, "reported": 0.0})
    env = token_mdp(
        Prompts([[0, 1]], [2]), at_end(count), vocab_size=4, max_new_tokens=4, eos=3, rating=rating
    )
    assert env.step.advance(env.step.start(0)[0], jnp.int32(3), env.params)[2] == 3.0
    config = jrl.token_dqn.Config(num_envs=8, warmup_texts=8, batch_size=8, hidden_sizes=(4,))
    algo = jrl.token_dqn.make(env, config)
    hparams = jax.tree.map(jnp.float32, jrl.token_dqn.HParams())
    state = jax.jit(algo.init)(jax.random.key(0), hparams)
    state, metrics = jax.jit(algo.step)(state, hparams)
    held = jax.tree.map(lambda leaf: leaf[8:16], state.replay)
    again = offline.replayed(env, held.tokens, np.zeros(8, int))
    over = again.terminated | again.truncated
    said = jnp.cumsum(over, 1) - over == 0
    np.testing.assert_allclose(jnp.where(said, again.reward, 0.0), held.reward, atol=1e-6)
    ones = (held.tokens == 1).sum(1)
    np.testing.assert_allclose(metrics["score/ones"], ones.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["score/reported"], (held.tokens >= 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["episode_return"], 3 * ones.mean(), rtol=1e-6)


# --------------------------------------------------------------------------------------------- from a trained model


def test_the_policy_starts_as_the_model(folder):
    env = jrl.make("Text-jrl", model=str(folder / "lm"), max_new_tokens=5, prompt_length=3)
    model = runs.load(folder / "lm")
    for num_q in (0, 1):
        made = models.of_config(env, jrl.grpo.Config(model="pretrained"), num_q=num_q)
        tokens = jnp.asarray(env.step.prompts.tokens[:4])
        output = made.prefix(
            made.init(jax.random.key(0)), jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=-1)
        )
        expected = transformer.forward(model.params, model.config, tokens).logits[:, -1]
        np.testing.assert_allclose(output.logits, expected, atol=1e-5)
        if num_q:
            np.testing.assert_allclose(output.q[:, 0], expected, atol=1e-5)
    assert (env.step.prompts.tokens.shape, env.step.eos) == ((256, 3), None)
    assert all(model.tokenizer.decode(row) in TEXT for row in env.step.prompts.tokens)
    ended = jrl.make("Text-jrl", model=str(folder / "lm"), max_new_tokens=5, prompt_length=3, end="\n")
    assert ended.step.eos == model.tokenizer.encode("\n")[0]


def test_a_text_of_words_ends_with_a_word_as_one_writes_it(tmp_path):
    words = tokenizers.Word.of("the cat sat .")
    config = transformer.Config(
        words.vocab_size, num_layers=1, num_heads=1, num_kv_heads=1, width=8, max_length=8
    )
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), config)
    weights.write_folder(tmp_path, params, config)
    tokenizers.write(words, tmp_path)
    (tmp_path / "corpus.txt").write_text("the cat sat .")
    corpus = str(tmp_path / "corpus.txt")
    kwargs = {"model": str(tmp_path), "corpus": corpus, "max_new_tokens": 4, "prompt_length": 2}
    env = jrl.make("Text-jrl", end=".", reward=["format:( the| cat)+", "ngram:2"], **kwargs)
    assert env.step.eos == words.encode(".")[0]
    with pytest.raises(ValueError, match="end='dog': no token of the model is that"):
        jrl.make("Text-jrl", end="dog", **kwargs)


def test_a_run_says_what_a_run_on_texts_says(folder, capsys):
    summary, rows = records.read_summary(folder / "rl"), records.read_metrics(folder / "rl")
    assert [row["env_steps"] for row in rows] == [40, 80, 120, 160]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(
            row["env_steps_per_second"], rel=1e-3
        )  # no text ends itself
        used = row["env_steps_per_second"] * summary["flops_per_env_step"] / summary["peak_flops_per_second"]
        assert row["model_flop_utilization"] == pytest.approx(used, abs=1e-4)
        paid = row["score/ngram"] - 0.5 * row["score/repetition"] + row["score/lexicon"]
        assert row["episode_return"] == pytest.approx(paid, abs=1e-5)
    run = records.read_run(folder / "rl")
    assert run["environment"]["kwargs"]["reward"] == REWARD[1::2]
    assert run["config"]["model"] == "pretrained"
    # One character: saying it, 3 readings of 8 characters for the gradient and one by the reference, for 5 said.
    config = runs.load(folder / "lm").config
    token = transformer.flops_per_token(config, 8)
    assert summary["flops_per_env_step"] == pytest.approx(token * (1 + 4 * 8 / 5))
    assert summary["evaluation"]["num_episodes"] == 4
    assert cli.main(["generate", str(folder / "rl"), "--prompt", "to", "--samples", "2"]) == 0
    assert capsys.readouterr().out.count("\nto") == 2
    tuned, model = runs.load(folder / "rl"), runs.load(folder / "lm")
    assert tuned.tokenizer == model.tokenizer
    assert commands._corpus_of(folder / "rl") == commands._corpus_of(folder / "lm")
    assert not np.array_equal(tuned.params["embedding"], model.params["embedding"])


def test_it_is_resumed_in_the_same_bits(folder):
    assert train(folder, "parts", 2) == 0
    assert cli.main(["resume", str(folder / "parts"), "--env-steps", "160"]) == 0
    whole, parts = runs.load(folder / "rl"), runs.load(folder / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)


@pytest.mark.parametrize("out", ["lm", "link"])
def test_the_model_that_a_run_needs_is_not_overwritten(folder, out, capsys):
    if out == "link":
        (folder / out).symlink_to(folder / "lm")
    before = {path: path.read_bytes() for path in (folder / "lm").rglob("*") if path.is_file()}
    here, corpus = ["--out", folder / out, "--overwrite"], ["--corpus", folder / "corpus.txt"]
    text = ["grpo", "--env", "Text-jrl", *TINY, *here, "--model"]
    for args in (
        ["train", *text, folder / "lm"],
        ["train", *text, folder / "rl"],  # what it has learned is read with that model
        ["sweep", *text, folder / "lm"],
        ["sweep", *text, folder / "lm", "--static-grid", "group_size=2,4"],
        ["pretrain", *corpus, *here, "--model", folder / "lm"],
        ["distill", folder / "lm", *corpus, *here],
    ):
        error = fails(capsys, *args)
        assert f"run folder {folder / out} holds the model" in error
        assert "A run needs a folder of its own; choose another path with --out" in error
        assert {path: path.read_bytes() for path in before} == before


def test_a_model_that_was_trained_further_is_noticed(folder, tmp_path, capsys, monkeypatch):
    shutil.copytree(folder / "lm", tmp_path / "lm")
    (tmp_path / "prompts.txt").write_text("to\nbe\n")
    monkeypatch.chdir(tmp_path)
    given = ["--model", "lm", "--prompts", "prompts.txt", "--out", "rl"]
    assert cli.main(["train", *GRPO, "--env-steps", "40", *given]) == 0
    monkeypatch.chdir(folder)  # what the run was made of is found from anywhere
    record = records.read_run(tmp_path / "rl")
    assert set(record["sources"]) == {"model", "prompts", "corpus"}
    assert record["sources"]["model"]["step"] == 640 // (4 * 8 * 10)
    assert set(records.read_run(folder / "rl")["sources"]) == {"model", "corpus"}

    start = f"changed since the training in {tmp_path / 'rl'} was started: "
    assert cli.main(["resume", str(tmp_path / "lm"), "--env-steps", "960"]) == 0
    error = fails(capsys, "resume", tmp_path / "rl", "--env-steps", 80)
    assert error.startswith(f"error: {start}model {tmp_path / 'lm'} (step 2, now 3). ")
    assert "Put the old content back, or start anew with another --out" in error
    assert cli.main(["eval", str(tmp_path / "rl"), "--episodes", "2"]) == 0
    assert capsys.readouterr().err.startswith(f"warning: {start}model {tmp_path / 'lm'} (step 2, now 3). ")
    assert cli.main(["inspect", str(tmp_path / "rl"), "--steps", "2"]) == 2  # its policy tells no value
    assert capsys.readouterr().err.startswith(f"warning: {start}model {tmp_path / 'lm'} (step 2, now 3). ")
    shutil.rmtree(tmp_path / "lm")
    shutil.copytree(folder / "lm", tmp_path / "lm")
    (tmp_path / "prompts.txt").write_text("to\nor\n")
    error = fails(capsys, "resume", tmp_path / "rl", "--env-steps", 80)
    assert error.startswith(f"error: {start}prompts {tmp_path / 'prompts.txt'}. ")
    # A run of before does not say what it was made of, and goes on.
    env = jrl.make("Text-jrl", **record["environment"]["kwargs"])
    assert configuration.changed_sources(record, env)
    del record["sources"]
    assert not configuration.changed_sources(record, env)


def test_a_sweep_does_not_go_on_with_another_model(folder, tmp_path):
    kwargs = {"model": str(folder / "lm"), "max_new_tokens": 5, "prompt_length": 3}
    sweep = {"env": "Text-jrl", "env_kwargs": kwargs, "config": {"model": "pretrained"}, "env_steps": 160}
    _, _, record = runner.prepare("grpo", **sweep)
    record["sources"]["model"]["sha256"] = "another"
    records.write_json(tmp_path / records.SWEEP, record)
    for go_on in (
        lambda: runner.resume(tmp_path),
        lambda: runner.execute("grpo", **sweep, out=tmp_path, resume=True),
    ):
        with pytest.raises(records.RunError, match=f"was started: model {folder / 'lm'}"):
            go_on()


def test_token_dqn_starts_from_a_model_too(folder, capsys):
    args = [
        "--num-envs",
        "4",
        "--warmup-texts",
        "4",
        "--batch-size",
        "4",
        "--num-updates",
        "1",
        "--env-steps",
        "60",
    ]
    out = [
        "--model",
        str(folder / "rl"),
        "--prompts",
        str(folder / "prompts.txt"),
        "--out",
        str(folder / "dqn"),
    ]
    (folder / "prompts.txt").write_text("to\n\nbe \n")
    assert cli.main(["train", "token_dqn", "--env", "Text-jrl", *RUN, *args, *out]) == 0
    row = records.read_metrics(folder / "dqn")[-1]
    assert {"tokens_per_second", "model_flop_utilization", "score/lexicon", "td_error"} <= set(row)
    assert "is a run of token_dqn with model='pretrained'" in fails(capsys, "generate", folder / "dqn")


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    def bad(*args):
        return fails(capsys, "train", "grpo", "--out", tmp_path / "x", *args)

    text, lm = ["--env", "Text-jrl"], ["--model", folder / "lm"]
    error = bad(*text, *lm, "--env-kwarg", "prompt_length=6", "--env-kwarg", "max_new_tokens=5")
    assert "a prompt of 6 tokens and 5 new ones: the context holds max_length=8" in error
    (tmp_path / "prompts.txt").write_text("to\nbe?\n")
    error = bad(*text, *lm, *TINY, "--prompts", tmp_path / "prompts.txt")
    assert "the character '?' is not in the alphabet" in error
    assert "--reward joy: expected [WEIGHT*]NAME" in bad(*text, *lm, *TINY, "--reward", "joy")
    assert "which no token of the model spells" in bad(*text, *lm, *TINY, "--reward", "lexicon:xyz")
    error = bad("--env", "RandomWalks-jrl", *lm)
    assert "RandomWalks-jrl has texts and rewards of its own; use --env Text-jrl" in error
    error = bad("--env", "RandomWalks-jrl", "--model", "pretrained")
    assert "model='pretrained' on RandomWalks-jrl, which brings no decoder" in error
    assert "nothing/here" in bad(*text, "--model", "nothing/here")
    error = bad(*text, *lm, *TINY, "--reward", "ngram", "--env-kwarg", 'reward="finished"')
    assert "--reward and --env-kwarg reward=...: the same is given twice" in error
    assert "end='be': no token of the model is that" in bad(*text, *lm, *TINY, "--env-kwarg", 'end="be"')
    assert not (tmp_path / "x").exists()


def test_a_score_of_nan_is_named(tmp_path):
    rating = Rating({"odd": lambda text: jnp.where(text.tokens[1] == 1, jnp.nan, 1.0)}, {"odd": 1.0})
    nothing = at_end(lambda text: jnp.float32(0))
    env = token_mdp(Prompts([[0]], [1]), nothing, vocab_size=2, max_new_tokens=2, rating=rating)
    config = {"variant": "rloo", "num_prompts": 2, "group_size": 2, "hidden_sizes": (4,)}
    with pytest.raises(
        FloatingPointError, match=r"score/odd is nan at env step \d+.* reward of texts: make it finite"
    ):
        jrl.run("grpo", env, config=config, env_steps=800, eval_episodes=0)


def test_penalty_step_size_and_seeds_are_swept_in_one_compilation(folder, monkeypatch):
    """Eight members from the trained model; the one with the run's own settings is that run, bit for bit."""
    args = [
        "--model",
        str(folder / "lm"),
        *RUN,
        "--num-prompts",
        "2",
        "--group-size",
        "4",
        "--env",
        "Text-jrl",
    ]
    _, env_kwargs, config, numbers = flags.parse("jrl sweep grpo", command.Options, jrl.grpo, args)
    traced, make = [], policy_gradient.make

    def counting(env, config):
        algo = make(env, config)
        return algo._replace(step=lambda *args: (traced.append(1), algo.step(*args))[1])

    monkeypatch.setattr(jrl.grpo, "make", counting)
    swept = runner.execute(
        "grpo", env="Text-jrl", config=config, hparams=numbers, env_kwargs=env_kwargs, env_steps=160, eval_episodes=0,
        grid={"kl_coef": [0.0, 0.5], "learning_rate": [1e-3, 1e-2]}, seeds=2, devices=jax.devices()[:1],
        out=folder / "sweep", progress="none", figures=False,
    )  # fmt: skip
    assert len(traced) <= 2  # shapes, and the program
    assert len(swept.table) == 8
    alone, same = runs.load(folder / "rl").params["embedding"], []
    for i in range(8):
        member = jrl.sweep.load(folder / "sweep", i)
        numbers = (float(member.hparams.kl_coef), float(member.hparams.learning_rate))
        is_the_run = numbers == (0.0, np.float32(1e-3)) and swept.table.columns["seed"][i] == 0
        same.append(np.array_equal(member.state.params["embedding"], alone))
        assert same[-1] == is_the_run
    assert sum(same) == 1
