"""The exact solver against lists of all texts."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.language import exact, grammar, tasks
from jrl.language.environments import Prompts, TokenReward, at_end, token_mdp

V, T, EOS = 3, 3, 0


@pytest.fixture(scope="module")
def solved():
    """Texts that may end early, and what each earns, from a table."""
    random = np.random.default_rng(0)
    worth = jnp.asarray(random.normal(size=(T, V, V)), jnp.float32)

    def step(carry, text, over):
        place = text.length - 2
        return (
            carry,
            worth[place, text.tokens[text.length - 2], text.tokens[text.length - 1]],
            jnp.bool_(False),
        )

    env = token_mdp(
        Prompts([[1]], [1]), TokenReward(lambda text: (), step), vocab_size=V, max_new_tokens=T, eos=EOS
    )
    log_reference = [
        jax.nn.log_softmax(jnp.asarray(random.normal(size=(V**t, V)), jnp.float32)) for t in range(T)
    ]
    texts = [
        (*body, EOS) for n in range(T) for body in itertools.product(range(1, V), repeat=n)
    ] + list(itertools.product(range(1, V), repeat=T))  # fmt: skip
    returns, log_p = [], []
    for text in texts:
        total = sum(float(worth[t, ([1, *text])[t], a]) for t, a in enumerate(text))
        prefixes = [int(sum(a * V ** (t - 1 - k) for k, a in enumerate(text[:t]))) for t in range(len(text))]
        returns.append(total)
        log_p.append(sum(float(log_reference[t][prefixes[t], a]) for t, a in enumerate(text)))
    return exact.enumerate_prefixes(env), log_reference, texts, np.array(returns), np.array(log_p)


def text_log_prob(log_policy, texts):
    return np.array([
        sum(float(log_policy[t][int(sum(a * V ** (t - 1 - k) for k, a in enumerate(text[:t]))), b])
            for t, b in enumerate(text))
        for text in texts
    ])  # fmt: skip


def test_values_are_maxima_over_texts(solved):
    tree, _, texts, returns, _ = solved
    q = exact.optimal_values(tree)
    for a in range(V):
        best = max(r for text, r in zip(texts, returns, strict=True) if text[0] == a)
        np.testing.assert_allclose(q[0][0, a], best, rtol=1e-5)


def test_soft_policy_is_the_tilted_reference(solved):
    tree, log_reference, texts, returns, log_p = solved
    beta = 0.7
    expected = np.exp(log_p + returns / beta)
    expected /= expected.sum()
    ours = np.exp(text_log_prob(exact.soft_policy(tree, log_reference, beta), texts))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_expectation_divergence_and_gradient_are_those_of_the_list(solved):
    tree, log_reference, texts, returns, log_p = solved
    p = np.exp(log_p)
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(exact.expectation(tree, log_reference), (p * returns).sum(), rtol=1e-4)
    other = exact.soft_policy(tree, log_reference, 0.7)
    expected = (p * (log_p - text_log_prob(other, texts))).sum()
    np.testing.assert_allclose(exact.divergence(tree, log_reference, other), expected, rtol=1e-4)

    def objective(logits):
        return exact.expectation(tree, [jax.nn.log_softmax(logits), *log_reference[1:]])

    grads = jax.grad(objective)(log_reference[0])[0]
    first = np.array([text[0] for text in texts])
    # ∂/∂logit_a E[R] = Σ_text p(text) R ([first = a] − π(a)).
    slow = [(p * returns * ((first == a) - np.exp(float(log_reference[0][0, a])))).sum() for a in range(V)]
    np.testing.assert_allclose(grads, slow, atol=1e-5)


def test_under_a_grammar_only_its_texts_are_said():
    """Texts ``x`` and ``yx`` alone: of a reference that knows no grammar, what the mask leaves of it counts."""
    texts, returns, reference = [[2], [1, 2]], [0.3, -0.5], np.array([0.2, 0.3, 0.5])  # ids: 0 end, 1 y, 2 x
    reward = at_end(lambda text: jnp.where(text.length == 3, *returns))  # a prompt, the text and its end
    env = token_mdp(
        Prompts([[1]], [1]),
        reward,
        vocab_size=V,
        max_new_tokens=T,
        eos=EOS,
        grammar=grammar.compile("y?x", "-yx"),
    )
    tree, beta = exact.enumerate_prefixes(env), 0.7
    unaware = [jnp.broadcast_to(jnp.log(reference), x.shape) for x in tree.reward]
    aware = [jnp.where(mask, x, -jnp.inf) for x, mask in zip(unaware, tree.allowed, strict=True)]
    p = np.array([0.5, 0.3]) / 0.8
    tilted = p * np.exp(np.array(returns) / beta)
    for log_reference in (unaware, aware):
        soft, rest = (f(tree, log_reference, beta) for f in (exact.soft_policy, exact.penalised_policy))
        ours = np.exp(text_log_prob(soft, [[*text, EOS] for text in texts]))
        np.testing.assert_allclose(ours, tilted / tilted.sum(), rtol=1e-5)
        pi = np.exp(text_log_prob(rest, [[*text, EOS] for text in texts]))
        np.testing.assert_allclose(pi.sum(), 1.0, rtol=1e-5)
        np.testing.assert_allclose(pi * (returns - pi @ returns), beta * (pi - p), atol=1e-5)
        np.testing.assert_allclose(exact.expectation(tree, rest), pi @ returns, rtol=1e-5)


def test_small_penalties_give_the_greedy_policy_and_large_ones_the_reference():
    env = tasks.random_rewards(4, 3)
    tree = exact.enumerate_prefixes(env)
    uniform = [jnp.full(x.shape, -jnp.log(4.0)) for x in tree.reward]
    best = exact.optimal_values(tree)[0].max()
    for policy in (exact.soft_policy, exact.penalised_policy):
        np.testing.assert_allclose(exact.expectation(tree, policy(tree, uniform, 1e-3)), best, atol=0.01)
        assert exact.divergence(tree, policy(tree, uniform, 1e4), uniform) < 1e-6


def one_token(values):
    """A tree of one token, worth so much."""
    reward = TokenReward(
        lambda text: (),
        lambda carry, text, over: (carry, jnp.asarray(values)[text.tokens[1]], jnp.bool_(False)),
    )
    env = token_mdp(
        Prompts([[0]], [1]), reward, vocab_size=len(values), max_new_tokens=1, at_limit="terminate"
    )
    return exact.enumerate_prefixes(env)


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        ([0.0, 1.0, 10.0], [0.5, 0.5, 0.0]),
        ([0.0, 1.0, 2.0], [0.5, 0.5, 1e-8]),
        ([0.0, 1.0, 20.0], [0.5, 0.5, 1e-9]),
    ],
)
def test_where_grpo_comes_to_rest_solves_its_equation_for_tiny_references(values, reference):
    """``π(a)(Q(a) − V) = β (π(a) − π_ref(a))`` with ``V = E[Q]``, against a solution in float64."""
    reference, q, beta = np.array(reference) / np.sum(reference), np.array(values), 1.0
    rest = np.exp(
        exact.penalised_policy(one_token(values), [jnp.log(jnp.asarray(reference))[None]], beta)[0][0]
    )
    low, high = q[reference > 0].max() - beta * (1 - 1e-16), q[reference > 0].max()
    for _ in range(200):
        value = 0.5 * (low + high)
        denominator = np.where(reference > 0, beta + value - q, 1.0)
        low, high = (value, high) if (beta * reference / denominator).sum() > 1 else (low, value)
    np.testing.assert_allclose(rest, beta * reference / denominator, atol=2e-3)


def test_gradients_of_an_expectation_pass_by_what_is_never_said():
    tree = one_token([0.0, 1.0, 2.0])
    mask = jnp.array([True, True, False])

    def kl(logits):
        policy, other = (jax.nn.log_softmax(jnp.where(mask, x, -jnp.inf)) for x in (logits, jnp.zeros(3)))
        return exact.divergence(tree, [policy[None]], [other[None]])

    logits = jnp.array([0.3, -0.2, 0.1])
    p = 1 / (1 + np.exp(-0.5))
    slope = p * (1 - p) * np.log(p / (1 - p))
    np.testing.assert_allclose(jax.grad(kl)(logits), [slope, -slope, 0.0], atol=1e-5)


def test_there_is_a_prompt_of_that_number():
    with pytest.raises(ValueError, match="prompt=3: there are 1 prompts, 0 to 0"):
        exact.enumerate_prefixes(tasks.random_rewards(2, 2), prompt=3)
