"""Grammars as finite automata over tokens: whether a text belongs to one, and which tokens may come next."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.types import Array


class Automaton(NamedTuple):
    """A deterministic automaton that starts in state 0; a pytree.

    Attributes:
        transitions: int32 ``[S, V]``; −1 where no accepted text goes on so.
        accepting: bool ``[S]``.
        distance: int32 ``[S]``, fewest tokens from here to an accepting state.
    """

    transitions: Array
    accepting: Array
    distance: Array


def automaton(
    transitions: Sequence[Sequence[int]] | np.ndarray, accepting: Sequence[bool] | np.ndarray
) -> Automaton:
    """Make an automaton of a table; ways that never reach acceptance are closed.

    Args:
        transitions: ``[S, V]``, the next state or −1.
        accepting: ``[S]``.

    Raises:
        ValueError: shapes do not fit, a next state does not exist, or no text at all is accepted.
    """
    table, ends = np.asarray(transitions), np.asarray(accepting, bool)
    if table.ndim != 2 or ends.shape != table.shape[:1]:
        raise ValueError(
            f"automaton: transitions {table.shape} and accepting {ends.shape}: expected [S, V] and [S]."
        )
    if not table.size:
        raise ValueError(
            f"automaton: transitions {table.shape}: it accepts no text; needs at least one state and one token."
        )
    if table.min() < -1 or table.max() >= len(table):
        wrong = table[(table < -1) | (table >= len(table))][0]
        raise ValueError(
            f"automaton: next state {wrong} does not exist; states are 0 to {len(table) - 1}, or -1."
        )
    distance = np.where(ends, 0, len(table) + 1)
    for _ in range(len(table)):
        through = np.where(table >= 0, distance[np.maximum(table, 0)], len(table) + 1).min(1) + 1
        if (through >= distance).all():
            break
        distance = np.minimum(distance, through)
    if distance[0] > len(table):
        raise ValueError("automaton: it accepts no text: no accepting state can be reached from state 0.")
    dead = (table >= 0) & (distance[np.maximum(table, 0)] > len(table))
    return Automaton(
        jnp.asarray(np.where(dead, -1, table), jnp.int32), jnp.asarray(ends), jnp.asarray(distance, jnp.int32)
    )


def step(grammar: Automaton, state: Array, token: Array) -> Array:
    """Return the state after ``token``; −1, once left, is never left again. Any batch shape."""
    inside = (state >= 0) & (token >= 0)
    return jnp.where(inside, grammar.transitions[jnp.maximum(state, 0), jnp.maximum(token, 0)], -1)


def run(grammar: Automaton, tokens: Array, length: Array) -> Array:
    """Return the state after the first ``length`` of ``tokens`` ``[..., L]``, int32 ``[...]``; −1 outside."""

    def advance(state: Array, x: tuple[Array, Array]) -> tuple[Array, None]:
        token, i = x
        return jnp.where(i < length, step(grammar, state, token), state), None

    rows = (jnp.moveaxis(tokens, -1, 0), jnp.arange(tokens.shape[-1]))
    return jax.lax.scan(advance, jnp.zeros(tokens.shape[:-1], jnp.int32), rows)[0]


def accepts(grammar: Automaton, tokens: Array, length: Array) -> Array:
    """Whether the first ``length`` of ``tokens`` ``[..., L]`` are a text of the grammar, bool ``[...]``."""
    state = run(grammar, tokens, length)
    return (state >= 0) & grammar.accepting[jnp.maximum(state, 0)]


def allowed(grammar: Automaton, state: Array, eos: int, remaining: Array | int | None = None) -> Array:
    """Which tokens may come next, bool ``[..., V]``: the action mask of a text that is to belong to the grammar.

    Args:
        grammar: over ``V`` tokens, ``eos`` among them (whose own column is not read).
        state: int32 ``[...]``.
        eos: the token that ends a text; allowed where the grammar accepts.
        remaining: tokens that still fit, that end included; ways that cannot be finished in time are closed.
    """
    inside = jnp.maximum(state, 0)
    following = grammar.transitions[inside]
    possible = following >= 0
    if remaining is not None:
        left = jnp.asarray(remaining)[..., None] - 1
        possible &= grammar.distance[jnp.maximum(following, 0)] + 1 <= left
    is_eos = jnp.arange(following.shape[-1]) == eos
    return jnp.where(is_eos, grammar.accepting[inside][..., None], possible) & (state >= 0)[..., None]


def compile(pattern: str, symbols: Sequence[str]) -> Automaton:
    """Compile a regular expression over single-character symbols.

    ``a b`` concatenation (no blanks), ``a|b``, ``a*``, ``a+``, ``a?``, ``a{2}``, ``a{2,5}``, ``a{2,}``, ``(…)``,
    ``[a-z,]``, ``.`` for any symbol, ``\\`` before a special character. The whole text must match: ``^`` and
    ``$`` say nothing more, and are refused without the backslash.

    Source: Thompson 1968, "Regular Expression Search Algorithm", https://doi.org/10.1145/363347.363387, and the
    subset construction (Rabin and Scott 1959).

    Args:
        pattern: the expression.
        symbols: the character of each token, in the order of the ids; a token of another length matches nothing.

    Raises:
        ValueError: a malformed expression, with the place, one that no text matches, or one of more than 5,000 states
            beside those that its length accounts for, its repetitions written out.
    """
    most_states = 5_000 + 5 * len(pattern)
    edges: list[list[tuple[frozenset[int] | None, int]]] = []  # a set of tokens, or None for a free move

    def state() -> int:
        if len(edges) == most_states:
            raise fail(f"more than {most_states:,} states, its repetitions written out (use smaller ones),")
        edges.append([])
        return len(edges) - 1

    place = 0

    def fail(what: str) -> ValueError:
        return ValueError(f"grammar.compile({pattern!r}): {what} at character {place}.")

    def peek() -> str:
        return pattern[place] if place < len(pattern) else ""

    def literal() -> str:
        nonlocal place
        if peek() == "\\":
            place += 1
            if peek().isascii() and peek().isalnum():  # which mean something elsewhere, and never themselves
                raise fail(f"\\{peek()} is not known: write a set such as [0-9], or the character itself,")
        if not peek():
            raise fail("the expression ends too early")
        place += 1
        return pattern[place - 1]

    def tokens_of(letters: set[str]) -> frozenset[int]:
        return frozenset(i for i, symbol in enumerate(symbols) if symbol in letters)

    def atom() -> tuple[int, int]:
        nonlocal place
        first, last = state(), state()
        match peek():
            case "(":
                place += 1
                inner = alternatives()
                if peek() != ")":
                    raise fail("a parenthesis is not closed")
                place += 1
                edges[first].append((None, inner[0]))
                edges[inner[1]].append((None, last))
            case "[":
                place += 1
                letters: set[str] = set()
                if peek() == "^":
                    raise fail(
                        "sets of what is not in them are not known; a character ^ is written \\^, and '^'"
                    )
                while peek() != "]":
                    low = high = literal()
                    if peek() == "-" and pattern[place + 1 : place + 2] not in ("]", ""):
                        place += 1
                        high = literal()
                    if high < low:
                        raise fail(f"a range from {low!r} to {high!r}, which holds nothing,")
                    letters |= {chr(code) for code in range(ord(low), ord(high) + 1)}
                place += 1
                edges[first].append((tokens_of(letters), last))
            case ".":
                place += 1
                edges[first].append((frozenset(i for i, s in enumerate(symbols) if len(s) == 1), last))
            case "*" | "+" | "?" | "{" | ")":
                raise fail(f"{peek()!r} has nothing before it")
            case "^" | "$":
                raise fail(
                    f"the whole text must match anyway; a character {peek()} is written \\{peek()}, and {peek()!r}"
                )
            case _:
                edges[first].append((tokens_of({literal()}), last))
        return first, last

    def repeated() -> tuple[int, int]:
        nonlocal place
        begin, count = place, len(edges)
        piece = atom()
        least, most = 1, 1
        if peek() and peek() in "*+?":
            least, most = {"*": (0, -1), "+": (1, -1), "?": (0, 1)}[peek()]
            place += 1
        elif peek() == "{":
            inside, closed, _ = pattern[place + 1 :].partition("}")
            low, comma, high = inside.partition(",")
            if not closed or not low.isdecimal() or not (high or low).isdecimal():
                raise fail("a repetition must be {2}, {2,5} or {2,}")
            least, most = int(low), -1 if comma and not high else int(high or low)
            place += len(inside) + 2
            if 0 <= most < least:
                raise fail(f"a repetition of at least {least} and at most {most}")
        if (least, most) == (1, 1):
            return piece
        # Copies are made by reading the atom again: states are cheap, and the subset construction joins them.
        after = place
        del edges[count:]
        first = last = state()
        ends = [first] if least == 0 else []
        for i in range(1, max(least, most, 1) + 1):
            place = begin
            start, end = atom()
            edges[last].append((None, start))
            last = end
            if i >= least:
                ends.append(end)
            if most == -1 and i == max(least, 1):
                edges[end].append((None, start))
        place = after
        if most == 0:
            return first, first
        final = state()
        for end in ends:
            edges[end].append((None, final))
        return first, final

    def sequence() -> tuple[int, int]:
        first = last = state()
        while peek() and peek() not in "|)":
            start, end = repeated()
            edges[last].append((None, start))
            last = end
        return first, last

    def alternatives() -> tuple[int, int]:
        nonlocal place
        first, last = state(), state()
        while True:
            start, end = sequence()
            edges[first].append((None, start))
            edges[end].append((None, last))
            if peek() != "|":
                return first, last
            place += 1

    try:
        start, end = alternatives()
    except RecursionError:
        raise fail("parentheses are nested too deeply; write it with fewer of them") from None
    if place < len(pattern):
        raise fail("a parenthesis was never opened")

    @functools.cache
    def closure(states: frozenset[int]) -> frozenset[int]:
        found, waiting = set(states), list(states)
        while waiting:
            for label, to in edges[waiting.pop()]:
                if label is None and to not in found:
                    found.add(to)
                    waiting.append(to)
        return frozenset(found)

    numbers = {closure(frozenset([start])): 0}
    table: list[list[int]] = []
    waiting = list(numbers)
    while waiting:
        reached: list[set[int]] = [set() for _ in symbols]
        for label, to in (edge for here in waiting.pop(0) for edge in edges[here]):
            for token in label or ():
                reached[token].add(to)
        row = []
        for there in (closure(frozenset(states)) for states in reached):
            if there and there not in numbers:
                if len(numbers) == most_states:
                    raise ValueError(
                        f"grammar.compile({pattern!r}): more than {most_states:,} states, as what may follow depends "
                        "on too much of what was said before; use smaller repetitions."
                    )
                numbers[there] = len(numbers)
                waiting.append(there)
            row.append(numbers[there] if there else -1)
        table.append(row)
    return automaton(np.array(table), np.array([end in states for states in numbers]))
