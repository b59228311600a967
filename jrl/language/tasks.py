"""Token environments with known answers: random walks, addition, sorting, reversing, the next word.

Each is an id of :func:`jrl.make` (:mod:`jrl.envs.text`), so that the generic algorithms run on it too.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jrl.language import ngrams
from jrl.language.environments import Prompts, TokenReward, token_mdp
from jrl.language.rewards import Text
from jrl.types import Array, Environment, PyTree

SPLITS = ("train", "test", "all")


# ------------------------------------------------------------------------------------------------ random rewards


def random_rewards(vocab_size: int = 8, length: int = 5, seed: int = 0, scale: float = 0.5) -> Environment:
    """Say ``length`` tokens, each worth a normal number that depends on its place, itself and the token before it.

    Every text is one of ``vocab_size ** length``, so that :mod:`jrl.language.exact` knows all answers.

    Args:
        vocab_size: ``V``.
        length: ``T``.
        seed: of the rewards.
        scale: their standard deviation.
    """
    size = (length, vocab_size + 1, vocab_size)
    worth = jnp.asarray(scale * np.random.default_rng(seed).normal(size=size), jnp.float32)

    def step(carry: PyTree, text: Text, over: Array) -> tuple[PyTree, Array, Array]:
        place = text.length - text.prompt_length - 1
        before = jnp.where(place > 0, text.tokens[text.length - 2], vocab_size)
        return carry, worth[place, before, text.tokens[text.length - 1]], jnp.bool_(False)

    return token_mdp(
        Prompts(np.zeros((1, 1), int), np.ones(1, int)),
        TokenReward(lambda text: (), step),
        vocab_size=vocab_size,
        max_new_tokens=length,
        at_limit="terminate",
        name=f"random rewards {vocab_size}^{length}",
    )


# ------------------------------------------------------------------------------------------------- random walks


def walk_graph(nodes: int = 21, edge_probability: float = 0.1, seed: int = 1002) -> np.ndarray:
    """Draw a directed graph in which every node leads to another and at last to node 0: bool ``[nodes, nodes]``.

    The defaults are the graph of trlx's example: uniform numbers of NumPy's legacy generator above
    ``1 − edge_probability``, the diagonal left out, drawn again until no row is empty.

    Raises:
        ValueError: no such graph within a thousand draws.
    """
    random = np.random.RandomState(seed)
    for _ in range(1000):
        edges = random.rand(nodes, nodes) > 1.0 - edge_probability
        np.fill_diagonal(edges, False)
        if edges.any(1).all() and np.isfinite(shortest_walks(edges)).all():
            return edges
    raise ValueError(
        f"walk_graph(nodes={nodes}, edge_probability={edge_probability}): no graph in which node 0 can be reached "
        "from everywhere; raise edge_probability."
    )


def logged_walks(
    edges: np.ndarray, count: int = 1000, max_nodes: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw walks of a walker who takes every edge alike and stops at node 0: int32 ``[count, max_nodes]``, and lengths.

    What offline algorithms learn from; behind its end a walk is −1.
    """
    random = np.random.default_rng(seed)
    walks = np.full((count, max_nodes), -1, np.int32)
    walks[:, 0] = random.integers(1, len(edges), count)
    for walk in walks:
        for i in range(1, max_nodes):
            walk[i] = random.choice(np.flatnonzero(edges[walk[i - 1]]))
            if walk[i] == 0:
                break
    return walks, (walks >= 0).sum(1).astype(np.int32)


def shortest_walks(edges: np.ndarray) -> np.ndarray:
    """Return the nodes on the shortest walk from each node to node 0, both ends included; inf where there is none."""
    length = np.full(len(edges), np.inf)
    length[0] = 1
    for _ in range(len(edges)):
        length = np.minimum(length, np.where(edges, length, np.inf).min(1) + 1)
    return length


def random_walks(
    nodes: int = 21, max_nodes: int = 10, edge_probability: float = 0.1, seed: int = 1002
) -> Environment:
    """Walk a directed graph to node 0 over as few nodes as can be, the start given as the prompt.

    The reward on arrival is ``(worst − n) / (worst − shortest)`` for a walk over ``n`` nodes, 1 for a shortest one;
    a step along no edge ends the walk without reward, and so do ``max_nodes`` nodes.

    Source: the toy task of Chen et al. 2021, "Decision Transformer", https://arxiv.org/abs/2106.01345, as trlx has it
    (Havrilla et al. 2023, https://aclanthology.org/2023.emnlp-main.530).

    Args:
        nodes: of the graph, the vocabulary; node 0 is the goal.
        max_nodes: the worst walk.
        edge_probability: of each ordered pair of nodes.
        seed: of the graph.

    Raises:
        ValueError: ``max_nodes`` is not more than the longest of the shortest walks.
    """
    edges = walk_graph(nodes, edge_probability, seed)
    shortest = shortest_walks(edges)
    if shortest.max() >= max_nodes:
        raise ValueError(
            f"RandomWalks-jrl: a shortest walk has {int(shortest.max())} nodes, max_nodes={max_nodes}: must be more."
        )
    best, neighbours = jnp.asarray(shortest, jnp.float32), jnp.asarray(edges)

    def step(carry: PyTree, text: Text, over: Array) -> tuple[PyTree, Array, Array]:
        start, here, there = text.tokens[0], text.tokens[text.length - 2], text.tokens[text.length - 1]
        along = neighbours[here, there]
        optimality = (max_nodes - text.length) / (max_nodes - best[start])
        return carry, jnp.where(along & (there == 0), optimality, 0.0), ~along

    return token_mdp(
        Prompts(np.arange(1, nodes)[:, None], np.ones(nodes - 1, int)),
        TokenReward(lambda text: (), step),
        vocab_size=nodes,
        max_new_tokens=max_nodes - 1,
        eos=0,
        at_limit="terminate",
        name="RandomWalks-jrl",
    )


# --------------------------------------------------------------------------------------- sequences to sequences


def _match(carry: PyTree, text: Text, over: Array) -> tuple[PyTree, Array, Array]:
    place = text.length - text.prompt_length - 1
    right = text.tokens[text.length - 1] == text.reference[place]
    return carry, right / (text.reference >= 0).sum(), jnp.bool_(False)


MATCH = TokenReward(lambda text: (), _match)
"""Each token that is the answer's at its place is worth ``1 / n``: the return is 1 for an exact match only. The
prompts' reference is the answer, int ``[M, T]``, the end of the text included and −1 behind it."""


def questions(
    name: str,
    asked: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    eos: int,
    split: str = "train",
    held_out: float = 0.1,
    seed: int = 0,
) -> Environment:
    """Make an environment of questions of one length and their answers, rewarded by :data:`MATCH`.

    Args:
        name: for messages and records.
        asked: the prompts.
        answers: what is to follow each, without its end.
        vocab_size: tokens in all.
        eos: the token that ends an answer.
        split: ``train``, ``test`` (a share ``held_out`` of the questions, in neither more nor less), or ``all``.
        held_out: that share.
        seed: of the split.

    Raises:
        ValueError: an unknown split, or a share outside (0, 1).
    """
    if split not in SPLITS or not 0.0 < held_out < 1.0:
        raise ValueError(
            f"{name}: split={split!r}, held_out={held_out}: expected one of {', '.join(SPLITS)} and a share in (0, 1)."
        )
    longest = max(map(len, answers)) + 1
    table = np.array([[*answer, eos, *[-1] * (longest - len(answer) - 1)] for answer in answers], np.int32)
    prompts = np.array(asked, np.int32)
    order = np.random.default_rng(seed).permutation(len(prompts))
    tested = int(held_out * len(prompts))
    chosen = {"train": order[tested:], "test": order[:tested], "all": order}[split]
    return token_mdp(
        Prompts(prompts[chosen], np.full(len(chosen), prompts.shape[1]), table[chosen]),
        MATCH,
        vocab_size=vocab_size,
        max_new_tokens=longest,
        eos=eos,
        at_limit="terminate",
        name=name,
    )


def addition(
    digits: int = 2, split: str = "train", seed: int = 0, last_digit_first: bool = False
) -> Environment:
    """Add two numbers, ``17+25=`` → ``42``: tokens 0 to 9, ``+`` (10), ``=`` (11) and the end (12).

    Args:
        digits: of each number.
        split: as of :func:`questions`.
        seed: of the split.
        last_digit_first: the answer is said backwards, ``24``, as one adds on paper: a digit then follows from two
            digits of the question and the last one said.

    Raises:
        ValueError: ``digits`` is not 1, 2 or 3.
    """
    if digits not in (1, 2, 3):
        raise ValueError(f"Addition-jrl: digits={digits}: must be 1, 2 or 3.")
    numbers = range(10**digits)
    pairs = list(itertools.product(numbers, numbers))
    if len(pairs) > 20_000:
        pairs = [pairs[i] for i in np.random.default_rng(seed).choice(len(pairs), 20_000, replace=False)]

    def spell(number: int) -> list[int]:
        return [int(digit) for digit in f"{number:0{digits}d}"]

    asked = [[*spell(a), 10, *spell(b), 11] for a, b in pairs]
    answers = [[int(digit) for digit in str(a + b)][:: -1 if last_digit_first else 1] for a, b in pairs]
    return questions("Addition-jrl", asked, answers, vocab_size=13, eos=12, split=split, seed=seed)


def sorting(length: int = 4, symbols: int = 8, split: str = "train", seed: int = 0) -> Environment:
    """Sort ``length`` of ``symbols`` tokens; ``=`` (token ``symbols``) ends the question, the next id the answer."""
    return _rearranging("Sorting-jrl", sorted, length, symbols, split, seed)


def reversing(length: int = 4, symbols: int = 8, split: str = "train", seed: int = 0) -> Environment:
    """Say ``length`` of ``symbols`` tokens backwards; tokens as in :func:`sorting`."""
    return _rearranging("Reversing-jrl", lambda word: list(word)[::-1], length, symbols, split, seed)


def _rearranging(
    name: str,
    answer: Callable[[Sequence[int]], list[int]],
    length: int,
    symbols: int,
    split: str,
    seed: int,
) -> Environment:
    if length < 1 or symbols < 2 or symbols**length > 10**6:
        raise ValueError(
            f"{name}: length={length}, symbols={symbols}: length must be at least 1, symbols at least 2, and there may "
            f"be at most 10^6 questions ({symbols}^{length})."
        )
    words = list(itertools.product(range(symbols), repeat=length))
    if len(words) > 20_000:
        words = [words[i] for i in np.random.default_rng(seed).choice(len(words), 20_000, replace=False)]
    asked = [[*word, symbols] for word in words]
    answers = [answer(word) for word in words]
    return questions(name, asked, answers, vocab_size=symbols + 2, eos=symbols + 1, split=split, seed=seed)


# ---------------------------------------------------------------------------------------------------- next word


def next_word(
    text: str | None = None,
    prompt: str = "the cat sat on the",
    rhyme: str = "at",
    candidates: tuple[str, ...] = ("mat",),
    num_words: int = 40,
    fluency_weight: float = 0.05,
    max_new_tokens: int = 2,
) -> Environment:
    """Go on with a verse, ``the cat sat on the`` → ``mat``: words that are fluent after a real text, and a rhyme.

    Each word is worth ``fluency_weight · log p(word | the word before)`` under the bigrams of the text
    (:mod:`jrl.language.ngrams`, at least e^-10), and the first 1 more where it is one letter and ``rhyme`` and not in
    the prompt. The full stop ends a text.

    Args:
        text: where the words and their bigrams come from; None is the text of the standard library's own help topics.
        prompt: what the text begins with.
        rhyme: the last letters.
        candidates: words that are in the vocabulary whether or not the text has them.
        num_words: the most frequent words of the text that are in it too.
        fluency_weight: of the bigrams.
        max_new_tokens: words at most, the full stop among them.
    """
    words, ids = corpus_words(text), prompt.split()
    known = {word: i for i, word in enumerate(next_word_vocabulary(text, prompt, candidates, num_words))}
    lines = " ".join(words).split(" . ")
    # Words that are not in the vocabulary break a line in two: nothing is counted across them.
    texts = [
        [known[word] for word in group]
        for line in lines
        for inside, group in itertools.groupby([*line.split(), "."], key=known.__contains__)
        if inside
    ]
    model = ngrams.fit(texts, len(known), 2)
    log_p = np.stack(
        [np.asarray(ngrams.next_log_probs(model, jnp.array([w]), jnp.int32(1))) for w in range(len(known))]
    )
    bigrams = jnp.asarray(np.maximum(log_p, -10.0))
    rhymes = jnp.array([word[1:] == rhyme and word not in ids for word in known])

    def step(carry: PyTree, text: Text, over: Array) -> tuple[PyTree, Array, Array]:
        word, before = text.tokens[text.length - 1], text.tokens[text.length - 2]
        bonus = (text.length == text.prompt_length + 1) & rhymes[word]
        return carry, fluency_weight * bigrams[before, word] + bonus, jnp.bool_(False)

    return token_mdp(
        Prompts(np.array([[known[word] for word in ids]]), np.array([len(ids)])),
        TokenReward(lambda text: (), step),
        vocab_size=len(known),
        max_new_tokens=max_new_tokens,
        eos=0,
        at_limit="terminate",
        name="NextWord-jrl",
    )


def next_word_vocabulary(
    text: str | None = None,
    prompt: str = "the cat sat on the",
    candidates: tuple[str, ...] = ("mat",),
    num_words: int = 40,
) -> list[str]:
    """Return the words of :func:`next_word` in the order of their ids."""
    frequent = [word for word, _ in collections.Counter(corpus_words(text)).most_common(num_words)]
    return list(dict.fromkeys([".", *prompt.split(), *candidates, *frequent]))


def corpus_words(text: str | None = None) -> list[str]:
    """Return the words of a text in lower case, full stops among them.

    Raises:
        ValueError: there are none.
    """
    if text is None:
        from pydoc_data import topics

        text = " ".join(topics.topics.values())
    words = re.findall(r"[a-z]+|\.", text.lower())
    if not words:
        raise ValueError("NextWord-jrl: the text has no words.")
    return words
