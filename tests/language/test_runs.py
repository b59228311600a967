"""The commands: pretrain, resume, eval, generate, distill; bad input in one line each."""

import json
import os
import re
import shutil

import bundle
import jax
import numpy as np
import pytest

import jrl
from jrl import cli, plots, records
from jrl.language import commands, runs, tokenizers, weights
from jrl.networks import transformer

MODEL = ["--num-layers", "1", "--num-heads", "2", "--num-kv-heads", "1", "--width", "8", "--mlp-width", "8"]
TINY = [*MODEL, "--max-length", "8", "--batch-size", "4", "--updates-per-step", "2", "--progress", "lines"]
STEP = 4 * 2 * 8  # tokens
FIXED = ["--anneal-tokens", str(8 * STEP)]
TEXT = "to be or not to be, that is the question\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and a run of four steps on it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus.txt").write_text(TEXT)
    assert pretrain(folder, "lm", 4) == 0
    return folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "NPROC"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


def pretrain(folder, out, steps, *more):
    corpus = [
        "--corpus",
        str(folder / "corpus.txt"),
        "--out",
        str(folder / out),
        "--tokens",
        str(steps * STEP),
    ]
    return cli.main(["pretrain", *corpus, *TINY, *FIXED, *more])


def fails(capsys, *args):
    assert cli.main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_run_leaves_what_a_run_leaves(folder):
    record, summary = records.read_run(folder / "lm"), records.read_summary(folder / "lm")
    rows = records.read_metrics(folder / "lm")
    assert [row["env_steps"] for row in rows] == [STEP, 2 * STEP, 3 * STEP, 4 * STEP]
    for row in rows:
        assert row["tokens_per_second"] == row["env_steps_per_second"] > 0
        used = row["tokens_per_second"] * summary["flops_per_token"] / summary["peak_flops_per_second"]
        assert row["model_flop_utilization"] == pytest.approx(used, abs=1e-4)
        assert {"loss", "validation_loss", "learning_rate", "grad_norm"} <= set(row)
    assert (record["kind"], record["tokenizer"]) == ("pretrain", "Char")
    assert record["model"]["vocab_size"] == len(set(TEXT))
    assert summary["evaluation"]["num_tokens"] == len(TEXT) - int(len(TEXT) * 0.9) - 1
    assert summary["unit"] == "tokens"
    curve = plots.read(folder / "lm")
    assert (curve.measure, curve.env) == ("validation_loss", "corpus.txt")
    assert curve.mean.tolist() == [row["validation_loss"] for row in rows]
    assert curve.evaluation == summary["evaluation"]["validation_loss"]
    assert (folder / "lm" / "learning_curve.png").exists()
    assert not summary["interrupted"]


def test_a_resumed_run_ends_in_the_same_bits(folder, capsys):
    assert pretrain(folder, "whole", 8) == 0
    assert pretrain(folder, "parts", 4) == 0
    assert cli.main(["resume", str(folder / "parts"), "--env-steps", str(8 * STEP)]) == 0
    whole, parts = runs.load(folder / "whole"), runs.load(folder / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    losses = [[row["loss"] for row in records.read_metrics(folder / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    capsys.readouterr()
    assert cli.main(["resume", str(folder / "parts")]) == 0
    assert f"already finished: {8 * STEP} tokens" in capsys.readouterr().out


def test_eval_says_what_the_summary_says(folder, capsys):
    assert cli.main(["eval", str(folder / "lm")]) == 0
    loss = records.read_summary(folder / "lm")["evaluation"]["validation_loss"]
    assert f"validation loss {loss:.4f} nats a token" in capsys.readouterr().out


def test_eval_takes_the_checkpoint_and_refuses_what_is_of_episodes(folder, capsys):
    assert pretrain(folder, "longer", 4) == 0
    assert cli.main(["resume", str(folder / "longer"), "--env-steps", str(8 * STEP)]) == 0
    said = []
    for args in (["longer", "--step", "4"], ["longer"], ["lm"]):
        capsys.readouterr()
        assert cli.main(["eval", str(folder / args[0]), *args[1:]]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] != said[1]
    assert "000000000005 does not exist" in fails(capsys, "eval", folder / "longer", "--step", 5)
    for args in (["--sample"], ["--seed", 0], ["--member", 0], ["--episodes", 7]):
        assert f"{args[0]}: {folder / 'lm'} is a run of a language model" in fails(
            capsys, "eval", folder / "lm", *args
        )


def test_generate_continues_the_prompt_as_often_as_asked(folder, capsys):
    assert cli.main(["generate", str(folder / "lm"), "--prompt", "to", "--samples", "3", "--top-k", "5"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- sample") == 3
    assert out.count("\nto") == 3
    assert "18 tokens in " in out  # 3 × (8 − 2): the context is full then
    assert "tokens/s" in out
    once = ["generate", str(folder / "lm"), "--temperature", "0", "--tokens", "4"]
    said = []
    for seed in ("1", "2"):
        assert cli.main([*once, "--seed", seed]) == 0
        said.append(capsys.readouterr().out.rpartition("\n4 tokens in")[0])
    assert said[0] == said[1]
    assert len(said[0]) == 4


def test_distill_learns_from_the_run(folder, tmp_path):
    student = json.dumps({"width": 4, "num_heads": 1})
    code = cli.main(["distill", str(folder / "lm"), "--student-config", student, "--out", str(tmp_path / "small"),
                     "--tokens", str(2 * STEP), *TINY[-6:]])  # fmt: skip
    assert code == 0
    small, teacher = runs.load(tmp_path / "small"), runs.load(folder / "lm")
    assert (small.config.width, small.config.num_layers) == (4, 1)
    assert small.params["embedding"].shape == (len(set(TEXT)), 4)
    assert small.tokenizer == teacher.tokenizer
    row = records.read_metrics(tmp_path / "small")[-1]
    assert {"divergence", "validation_loss", "model_flop_utilization"} <= set(row)
    # The teacher is in the checkpoint: nothing else is needed to go on.
    assert cli.main(["resume", str(tmp_path / "small"), "--env-steps", str(3 * STEP)]) == 0


def test_the_step_size_is_annealed_over_the_run_unless_it_is_said_otherwise(folder, tmp_path):
    def rates(annealing, *args):
        out = tmp_path / f"{args[0]}{''.join(annealing)}"
        run = ["--corpus", str(folder / "corpus.txt"), "--out", str(out), "--tokens", str(4 * STEP)]
        assert cli.main([*args, *run, *annealing]) == 0
        return [row["learning_rate"] for row in records.read_metrics(out)]

    for args in (["pretrain", *TINY], ["distill", str(folder / "lm"), *TINY[-6:]]):
        assert 1e-4 <= rates([], *args)[-1] < 2e-4
        np.testing.assert_allclose(rates(["--anneal-tokens", "0"], *args), 1e-3, rtol=1e-6)


def test_generate_puts_a_blank_between_the_prompt_and_the_next_word():
    tokenizer = tokenizers.Word.of("once upon a time")
    config = transformer.Config(
        tokenizer.vocab_size, num_layers=1, num_heads=1, num_kv_heads=1, width=8, max_length=8
    )
    model = runs.Model(transformer.init(jax.random.key(0), config), config, tokenizer)
    (said,), _ = commands.say(model, "once upon", tokens=2, greedy=True)
    assert re.fullmatch(r"( (<unk>|\w+)){2}", said)


def test_a_model_of_others_is_generated_from_and_fine_tuned(folder, tmp_path, capsys):
    model = runs.load(folder / "lm")
    weights.write_folder(tmp_path / "llama", model.params, model.config)
    (tmp_path / "llama" / "jrl_tokenizer.json").write_bytes(
        (folder / "lm" / "jrl_tokenizer.json").read_bytes()
    )
    code = cli.main(["pretrain", "--corpus", str(folder / "corpus.txt"), "--out", str(tmp_path / "tuned"), "--tokens",
                     "64", "--model", str(tmp_path / "llama"), "--learning-rate", "0", "--learning-rate-end", "0",
                     *TINY[-6:]])  # fmt: skip
    assert code == 0
    jax.tree.map(np.testing.assert_array_equal, runs.load(tmp_path / "tuned").params, model.params)
    # A run killed before its first checkpoint begins where it began, not anywhere.
    shutil.rmtree(tmp_path / "tuned" / "checkpoints")
    assert cli.main(["resume", str(tmp_path / "tuned")]) == 0
    jax.tree.map(np.testing.assert_array_equal, runs.load(tmp_path / "tuned").params, model.params)
    shutil.rmtree(tmp_path / "tuned" / "checkpoints")
    weights.write_folder(tmp_path / "llama", jax.tree.map(lambda leaf: leaf + 1, model.params), model.config)
    assert "llama has changed since the run" in fails(capsys, "resume", tmp_path / "tuned")
    stories = bundle.path("stories260K/stories260K.bin")
    capsys.readouterr()
    assert cli.main(["generate", str(stories), "--temperature", "0", "--tokens", "117"]) == 0
    expected = bundle.path("stories260K/expected_greedy.txt").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(expected)


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    lm = folder / "lm"
    assert "the prompt has 9 tokens: the context holds max_length=8" in fails(
        capsys, "generate", lm, "--prompt", "to be or "
    )
    error = fails(capsys, "generate", lm, "--prompt", "to", "--tokens", "7")
    assert "a prompt of 2 tokens and 7 new ones: the context holds max_length=8" in error
    assert "the character 'X' is not in the alphabet" in fails(capsys, "generate", lm, "--prompt", "X")
    assert "--temperature -1.0: must be 0" in fails(capsys, "generate", lm, "--temperature", "-1")
    assert "--top-p 0.0: must be above 0" in fails(capsys, "generate", lm, "--top-p", "0")
    assert "--temperature 1e-40: must be 0" in fails(capsys, "generate", lm, "--temperature", "1e-40")
    assert "--top-k 4294967296: must be" in fails(capsys, "generate", lm, "--top-k", 2**32)
    assert "--samples 4294967296: must be" in fails(capsys, "generate", lm, "--samples", 2**32)
    assert f"seed={2**64}: must be below 2**32" in fails(capsys, "generate", lm, "--seed", 2**64)
    assert "--tokenizer byte: the student says" in fails(capsys, "distill", lm, "--tokenizer", "byte")
    assert "is no model folder: it has no config.json" in fails(capsys, "generate", tmp_path)
    (tmp_path / "empty.txt").write_text("")
    assert "is empty: a model needs text" in fails(capsys, "pretrain", "--corpus", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "is not UTF-8: byte 0xe9 at 3" in fails(capsys, "pretrain", "--corpus", tmp_path / "latin.txt")
    error = fails(capsys, "distill", lm, "--student-config", '{"widht": 4}', "--out", tmp_path / "x")
    assert "no field 'widht'. Nearest: width" in error
    assert "is no JSON object" in fails(
        capsys, "distill", lm, "--student-config", "small", "--out", tmp_path / "x"
    )
    (tmp_path / "latin.json").write_bytes(b"caf\xe9")
    for name in ("latin.json", "missing.json"):
        error = fails(capsys, "distill", lm, "--student-config", tmp_path / name, "--out", tmp_path / "x")
        assert f"--student-config {tmp_path / name} is no JSON object" in error
    corpus = tmp_path / "short.txt"
    corpus.write_text("to be " * 10)
    for name in ("batch_size", "updates_per_step", "width"):
        given = "--" + name.replace("_", "-"), 10**11
        error = fails(capsys, "pretrain", "--corpus", corpus, "--out", tmp_path / "y", *given)
        assert f"{name}={10**11}: must be below 2**31" in error
    error = fails(capsys, "pretrain", "--corpus", corpus, "--out", tmp_path / "y", "--max-length", "64")
    assert "a corpus of 54 tokens is shorter than a window of sequence_length=64" in error
    assert not (tmp_path / "y").exists()
    error = fails(capsys, "pretrain", "--model", lm, "--num-layers", "2", "--out", tmp_path / "y")
    assert "--num-layers 2: the architecture and the tokenizer are those of --model" in error
    with pytest.raises(records.RunError, match="this is a run of a language model"):
        jrl.resume(lm)
    error = fails(capsys, "pretrain", "--corpus", corpus, "--out", lm)
    assert "already holds a run" in error


def test_a_corpus_that_has_changed_is_noticed(folder, capsys):
    (folder / "corpus.txt").write_text(TEXT + "!")
    small = folder / "small"
    for args in (
        ["resume", folder / "lm", "--env-steps", 5 * STEP],
        ["eval", folder / "lm"],
        ["distill", folder / "lm", "--out", small],
    ):
        error = fails(capsys, *args)
        assert (
            f"corpus {folder / 'corpus.txt'} has changed since the run in {folder / 'lm'} was started"
            in error
        )
        assert "Put the old text back" in error
    assert not small.exists()
    args = ["distill", folder / "lm", "--out", small, "--tokens", STEP, *TINY[-6:]]
    assert cli.main([str(arg) for arg in [*args, "--corpus", folder / "corpus.txt"]]) == 2  # it has no "!"
    assert "the character '!' is not in the alphabet" in capsys.readouterr().err
    (folder / "corpus.txt").write_text(TEXT)


def test_a_corpus_is_found_from_another_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    args = ["--corpus", "corpus.txt", "--model", "lm", "--out", str(tmp_path / "lm"), "--tokens", str(STEP)]
    assert cli.main(["pretrain", *args, *TINY[-6:]]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "lm"]) == 0
    record = records.read_run("lm")
    assert record["start"] == str(folder / "lm")
    # Those of before have the path as it was given.
    record["corpus"]["name"] = "corpus.txt"
    records.write_json(tmp_path / "lm" / "run.json", record)
    assert "corpus corpus.txt cannot be read" in fails(capsys, "eval", "lm")
    monkeypatch.chdir(folder)
    assert cli.main(["eval", str(tmp_path / "lm")]) == 0
