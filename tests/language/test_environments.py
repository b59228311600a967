"""Token environments: what a text earns, how it ends, what is masked; every generic algorithm's view of it."""

from __future__ import annotations

import bundle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl import networks
from jrl.language import exact, grammar, rewards, tasks
from jrl.language.environments import Prompts, TokenReward, at_end, gain, shaped, token_mdp
from jrl.types import TokenObservation

EOS = 3


def length_of(text):
    return (text.length - text.prompt_length).astype(jnp.float32)


def make(reward=None, **choices):
    reward = at_end(length_of) if reward is None else reward
    prompts = Prompts([[0, 1, 2], [2, 9, 9]], [3, 1])
    return token_mdp(prompts, reward, **{"vocab_size": 4, "max_new_tokens": 3, "eos": EOS} | choices)


def play(env, actions, prompt=0, params=None):
    """The time steps of one text."""
    state, obs = env.step.start(prompt)
    steps = []
    for action in actions:
        state, obs, *rest = env.step.advance(state, jnp.int32(action), params or env.params)
        steps.append((np.asarray(obs), *[np.asarray(x).item() for x in rest]))
    return state, steps


def test_a_text_grows_and_ends_by_its_own_choice_or_at_the_limit():
    env = make(missing_eos_reward=-1.0)
    assert env.observation == TokenObservation(6, 4)
    _, steps = play(env, [1, EOS])
    assert [s[1:] for s in steps] == [(0.0, False, False), (2.0, True, False)]
    assert steps[1][0].tolist() == [0, 1, 2, 1, 3, -1]
    state, steps = play(env, [1, 1, 1], prompt=1)
    assert [s[1:] for s in steps] == [(0.0, False, False), (0.0, False, False), (2.0, False, True)]
    assert state.text.tokens.tolist() == [2, 1, 1, 1, -1, -1]
    assert not state.text.finished
    # The last moment is soon enough; the limit as part of the task; another penalty without recompiling.
    assert play(env, [1, 1, EOS])[1][-1][1:] == (3.0, True, False)
    assert play(make(at_limit="terminate"), [1, 1, 1])[1][-1][1:] == (3.0, True, False)
    changed = env.params._replace(missing_eos_reward=-5.0)
    assert play(env, [1, 1, 1], params=changed)[1][-1][1] == -2.0
    # Without a token that ends texts only the limit does.
    assert play(make(eos=None), [EOS, EOS, EOS])[1][-1][2:] == (False, True)


def test_stepping_resets_to_a_prompt_and_keeps_the_true_successor():
    env = jrl.envs.vectorize(make(), 64)
    state, obs = env.reset(jax.random.key(0), env.params)
    assert {tuple(row) for row in obs.tolist()} == {(0, 1, 2, -1, -1, -1), (2, -1, -1, -1, -1, -1)}
    _, step = env.step(jax.random.key(1), state, jnp.full(64, EOS), env.params)
    assert step.terminated.all()
    assert (step.next_obs == EOS).any(1).all()
    assert {tuple(row) for row in step.obs.tolist()} == {tuple(row) for row in obs.tolist()}


def test_gains_add_up_to_the_score_and_shaping_keeps_ranks():
    _, steps = play(make(gain(length_of)), [1, 1, EOS])
    assert [s[1] for s in steps] == [1.0, 1.0, 1.0]

    def potential(text):
        return (text.tokens == 1).sum().astype(jnp.float32)

    plain, gamma = tasks.random_rewards(3, 3), 0.8
    worth = plain.step.advance

    def step(carry, text, over):
        state = plain.step.start(0)[0]._replace(
            text=text._replace(
                tokens=jnp.where(jnp.arange(4) < text.length - 1, text.tokens, -1), length=text.length - 1
            )
        )
        return carry, worth(state, text.tokens[text.length - 1], plain.params)[2], jnp.bool_(False)

    inner = TokenReward(lambda text: (), step)
    arguments = {"vocab_size": 3, "max_new_tokens": 3, "at_limit": "terminate"}
    changed = token_mdp(Prompts([[0]], [1]), shaped(inner, potential, gamma), **arguments)
    trees = [exact.enumerate_prefixes(env) for env in (plain, changed)]
    q, shaped_q = (exact.optimal_values(tree, gamma) for tree in trees)
    for a, b, obs in zip(q, shaped_q, trees[1].obs, strict=True):
        np.testing.assert_allclose(a - (obs == 1).sum(-1, keepdims=True), b, atol=1e-5)


def test_a_grammar_is_an_action_mask():
    env = make(grammar=grammar.compile("1(2|1)", ["0", "1", "2", "<eos>"]))
    state, obs = env.step.start(0)
    allowed = [obs.action_mask.tolist()]
    for action in (1, 2):
        state, obs, *_ = env.step.advance(state, jnp.int32(action), env.params)
        allowed.append(obs.action_mask.tolist())
    assert allowed == [
        [False, True, False, False], [False, True, True, False], [False, False, False, True]
    ]  # fmt: skip
    scored = token_mdp(
        Prompts([[0]], [1]), at_end(rewards.in_grammar(grammar.compile("12", ["0", "1", "2", "<eos>"]))),
        vocab_size=4, max_new_tokens=3, eos=EOS,
    )  # fmt: skip
    assert play(scored, [1, 2, EOS])[1][-1][1] == 1.0
    assert play(scored, [1, EOS])[1][-1][1] == 0.0


def test_default_networks_see_tokens_one_hot():
    env = make()
    flatten = networks.observation_flattener(env.observation)
    features = flatten(jnp.array([[0, 2, -1, -1, -1, -1]]))
    assert features.shape == (1, 24)
    assert np.flatnonzero(features[0]).tolist() == [0, 6]


def test_walks_are_trlxs():
    edges = tasks.walk_graph()
    shortest = tasks.shortest_walks(edges)
    # Its graph of seed 1002, and what its random walks score there.
    assert edges[1:, 0].sum() == 3
    assert shortest[1:].astype(int).tolist() == [2, 3, 3, 5, 5, 3, 4, 4, 4, 2, 3, 5, 3, 4, 4, 3, 5, 4, 3, 2]
    walks, length = tasks.logged_walks(edges, 4000)
    arrived = walks[np.arange(4000), length - 1] == 0
    score = np.where(arrived, (10 - length) / (10 - shortest[walks[:, 0]]), 0.0)
    assert 0.75 < score.mean() < 0.81
    env = jrl.make("RandomWalks-jrl")
    for walk, n, expected in zip(walks[:8], length, score, strict=False):
        _, steps = play(env, walk[1:n], prompt=int(walk[0]) - 1)
        np.testing.assert_allclose(sum(s[1] for s in steps), expected, rtol=1e-6)
        assert steps[-1][2]
    stay = int(np.flatnonzero(~edges[4])[1])
    assert play(env, [stay], prompt=3)[1][0][1:] == (0.0, True, False)


def test_questions_are_answered_and_held_out():
    env = jrl.make("Addition-jrl")
    spoken = "0123456789+="
    held_out = jrl.make("Addition-jrl", split="test")
    asked = {tuple(row) for row in env.step.prompts.tokens.tolist()}
    others = {tuple(row) for row in held_out.step.prompts.tokens.tolist()}
    assert len(asked) == 9000
    assert len(others) == 1000
    assert not asked & others
    for i in (0, 17, 8999):
        question = "".join(spoken[t] for t in env.step.prompts.tokens[i])
        a, b = question.rstrip("=").split("+")
        answer = [int(digit) for digit in str(int(a) + int(b))] + [12]
        _, steps = play(env, answer, prompt=i)
        np.testing.assert_allclose(sum(s[1] for s in steps), 1.0, rtol=1e-6)
        assert steps[-1][2]
        _, steps = play(env, [(answer[0] + 1) % 10, *answer[1:]], prompt=i)
        assert sum(s[1] for s in steps) < 0.99
    for name, answer in (("Sorting-jrl", sorted), ("Reversing-jrl", lambda row: row[::-1])):
        env = jrl.make(name)
        row = env.step.prompts.tokens[5].tolist()
        _, steps = play(env, [*answer(row[:-1]), 9], prompt=5)
        np.testing.assert_allclose(sum(s[1] for s in steps), 1.0, rtol=1e-6)


@pytest.mark.parametrize("corpus", [None, "bible/en_es.tsv"])
def test_mat_is_the_best_word(corpus):
    text = None if corpus is None else " ".join(en for en, _ in bundle.pairs(corpus))
    env, words = tasks.next_word(text), tasks.next_word_vocabulary(text)
    assert [words[i] for i in env.step.prompts.tokens[0]] == ["the", "cat", "sat", "on", "the"]
    q = exact.optimal_values(exact.enumerate_prefixes(env))[0][0]
    best, second = np.argsort(np.asarray(q))[:-3:-1]
    assert words[best] == "mat"
    assert q[best] - q[second] > 0.1


def test_what_it_refuses():
    prompts = Prompts([[0, 1]], [2])
    reward = at_end(length_of)
    for arguments, message in {
        (("vocab_size", 4), ("max_new_tokens", 0)): "max_new_tokens=0: must be at least 1",
        (
            ("vocab_size", 1),
            ("max_new_tokens", 2),
        ): "token 1 at place 1 of prompt 0 is outside the vocabulary of 1",
        (
            ("vocab_size", 4),
            ("max_new_tokens", 2),
            ("eos", 4),
        ): "eos=4 is outside the vocabulary of 4 tokens, 0 to 3",
        (("vocab_size", 4), ("max_new_tokens", 2), ("at_limit", "cut")): "at_limit='cut': must be one of",
    }.items():
        with pytest.raises(ValueError, match=message):
            token_mdp(prompts, reward, **dict(arguments))
    with pytest.raises(ValueError, match="prompt 1 has length 0: must be 1 to 2"):
        token_mdp(Prompts([[0, 1], [1, 1]], [2, 0]), reward, vocab_size=4, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"reference is \(3,\) for 1 prompts"):
        token_mdp(Prompts([[0, 1]], [2], np.zeros(3)), reward, vocab_size=4, max_new_tokens=2)
    compiled = grammar.compile("a", ["a", "b"])
    long = grammar.compile("aaa", ["a", "b", "c", "<eos>"])
    with pytest.raises(
        ValueError, match="shortest text of the grammar has 4 tokens, its end included, and max_new_to"
    ):
        token_mdp(prompts, reward, vocab_size=4, max_new_tokens=3, eos=3, grammar=long)
    with pytest.raises(ValueError, match="a grammar over 2 tokens with vocab_size=4"):
        token_mdp(prompts, reward, vocab_size=4, max_new_tokens=2, eos=3, grammar=compiled)
    with pytest.raises(ValueError, match="digits=7: must be 1, 2 or 3"):
        jrl.make("Addition-jrl", digits=7)
    with pytest.raises(ValueError, match="split='dev'"):
        jrl.make("Sorting-jrl", split="dev")
    with pytest.raises(ValueError, match="a shortest walk has 5 nodes, max_nodes=5"):
        jrl.make("RandomWalks-jrl", max_nodes=5)
    with pytest.raises(ValueError, match=r"21\^9 texts are more than 1,000,000"):
        exact.enumerate_prefixes(jrl.make("RandomWalks-jrl"))
    with pytest.raises(TypeError, match="needs a token environment"):
        exact.enumerate_prefixes(jrl.make("GridWorld-jrl"))
