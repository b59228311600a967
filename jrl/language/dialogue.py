"""Booking dialogues: a user with an agenda as a pure function, and the system that talks to it as an Environment.

Sources: the simulated user of Li et al. 2016, "A User Simulator for Task-Completion Dialogues",
https://arxiv.org/abs/1612.05688; task, features, actions and rewards of Li et al. 2017, "End-to-End Task-Completion
Neural Dialogue Systems", https://arxiv.org/abs/1703.01008, as in its code, TC-Bot.

A user wants showings with some values (``inform``), wants to learn others (``request``), and a ticket. Both sides speak
in *acts*: a kind, slots with values that are told, slots that are asked for. The system chooses one of 43 acts; values
it tells come from a knowledge base, restricted to what has been said so far. It succeeds if it says ``thanks`` after it
has announced a booking (``inform(taskcomplete)``) that agrees with all the user wants, has answered every question, and
has never been without an answer. The dialogue fails otherwise, or at the turn limit: that is part of the task, and so
a termination.

Deviations: values are compared without case everywhere (theirs: in the knowledge base and the final check, but not
where the system tells a single value); of equally frequent values the first in the knowledge base is told (theirs:
whichever a dictionary has first); noise draws a wrong value among all that the slot has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.build import from_functions
from jrl.types import Array, Discrete, Environment, Key, Policy, PyTree

NOTHING, NO_MATCH, ANY, AVAILABLE = -1, -2, -3, -4
"""In place of a value: not said; the knowledge base has none; the user does not care; there are tickets."""

UNCONSTRAINING = ("ticket", "taskcomplete", "closing", "numberofpeople")
"""Slots that say nothing about a showing."""

Goal = Mapping[str, Mapping[str, str]]


class Act(NamedTuple):
    """What one side says.

    Attributes:
        kind: int32 ``[]``, an index of ``Domain.acts``; −1 before the system has said anything.
        inform: int32 ``[S]``, values told; :data:`NOTHING` for the other slots.
        request: bool ``[S]``, slots asked for.
    """

    kind: Array
    inform: Array
    request: Array


class User(NamedTuple):
    """The agenda.

    Attributes:
        said: the user's last :class:`Act`; its requests stay until they are answered.
        rest: bool ``[S]``, what is still to be told or asked.
        history: int32 ``[S]``, the values that either side has told.
        agreed: bool ``[]``, the last booking announced was what the user wants.
    """

    said: Act
    rest: Array
    history: Array
    agreed: Array


class DialogueState(NamedTuple):
    """A dialogue: ``goal`` int32 ``[]``, the system's last act, values it holds ``[S]``, exchanges so far ``[]``."""

    goal: Array
    user: User
    system: Act
    known: Array
    exchanges: Array


class DialogueParams(NamedTuple):
    """Parameters, all traced.

    Attributes:
        success_reward: float32, of the last exchange of a dialogue that succeeds.
        failure_reward: float32, of the last exchange of one that fails.
        turn_reward: float32, of every other exchange.
        slot_error: float32 in [0, 1], the chance that a value the user tells is lost, or drawn anew among the slot's.
        deleted_share: float32 in [0, 1], the share of these that are lost; one drawn anew may be the right one.
        intent_error: float32 in [0, 1], the chance that the kind of the user's act is taken for a random one.
    """

    success_reward: Any = 80.0
    failure_reward: Any = -40.0
    turn_reward: Any = -1.0
    slot_error: Any = 0.0
    deleted_share: Any = 0.0
    intent_error: Any = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
    """What is talked about: ``S`` slots, ``G`` goals, a knowledge base of ``32 W`` showings at most.

    Attributes:
        acts: kinds of acts, in the order of their indices.
        slots: names, in the order of their indices.
        actions: ``(kind, slot told or None, slot asked for or None)`` of each action.
        values: spellings of each slot's values, in the order of their indices; those of the knowledge base first.
        showings: uint32 ``[S, V + 1, W]``: bit sets of the showings that have a value; the last is empty.
        all_showings: uint32 ``[W]``.
        goal_inform: int32 ``[G, S]``.
        goal_request: bool ``[G, S]``; the ticket is always among them.
    """

    acts: tuple[str, ...]
    slots: tuple[str, ...]
    actions: tuple[tuple[str, str | None, str | None], ...]
    values: tuple[tuple[str, ...], ...]
    showings: np.ndarray
    all_showings: np.ndarray
    goal_inform: np.ndarray
    goal_request: np.ndarray

    def action(self, kind: str, inform: str | None = None, request: str | None = None) -> int:
        """Return the index of an action."""
        return self.actions.index((kind, inform, request))


def domain(
    showings: Sequence[Mapping[str, str]],
    goals: Sequence[Goal],
    *,
    acts: Sequence[str],
    slots: Sequence[str],
    system_inform: Sequence[str],
    system_request: Sequence[str],
    more_values: Mapping[str, Sequence[str]] | None = None,
) -> Domain:
    """Lay out a knowledge base and the goals of users as arrays.

    Args:
        showings: slot -> value; slots may be missing.
        goals: ``{"inform_slots": {slot: value}, "request_slots": {slot: ...}}``.
        acts: kinds of acts.
        slots: names of all slots.
        system_inform: those that the system may tell; ``taskcomplete`` and ``ticket`` among them.
        system_request: those that it may ask for.
        more_values: slot -> values that may be misheard beside those of showings and goals.

    Raises:
        ValueError: no goal or no showing, a slot that is not in ``slots``, or a kind or slot the rules need that is
            missing.
    """
    slots, acts = tuple(slots), tuple(acts)
    _check(showings, goals, acts, slots, (*system_inform, *system_request, *(more_values or {})))
    rows = [{slot: value.lower() for slot, value in showing.items()} for showing in showings]
    wanted = [{slot: value.lower() for slot, value in goal["inform_slots"].items()} for goal in goals]
    more = {slot: [value.lower() for value in values] for slot, values in (more_values or {}).items()}
    in_base = {slot: list(dict.fromkeys(row[slot] for row in rows if slot in row)) for slot in slots}
    values = {
        slot: tuple(
            dict.fromkeys(
                [*in_base[slot], *(goal[slot] for goal in wanted if slot in goal), *more.get(slot, ())]
            )
        )
        for slot in slots
    }
    number = {slot: {value: i for i, value in enumerate(values[slot])} for slot in slots}
    most, words = max(len(found) for found in in_base.values()), -(-len(rows) // 32)
    bits = np.zeros((len(slots), most + 1, 32 * words), bool)
    for i, row in enumerate(rows):
        for slot, value in row.items():
            bits[slots.index(slot), number[slot][value], i] = True
    inform = np.full((len(goals), len(slots)), NOTHING, np.int32)
    request = np.zeros((len(goals), len(slots)), bool)
    for i, goal in enumerate(wanted):
        for slot, value in goal.items():
            inform[i, slots.index(slot)] = number[slot][value]
        for slot in (*goals[i]["request_slots"], "ticket"):
            request[i, slots.index(slot)] = True
    return Domain(
        acts=acts,
        slots=slots,
        actions=(
            *((kind, None, None) for kind in ("confirm_question", "confirm_answer", "thanks", "deny")),
            *(("inform", slot, None) for slot in system_inform),
            *(("request", None, slot) for slot in system_request),
        ),
        values=tuple(values[slot] for slot in slots),
        showings=_pack(bits),
        all_showings=_pack(np.arange(32 * words) < len(rows)),
        goal_inform=inform,
        goal_request=request,
    )


def _pack(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def _check(
    showings: Sequence[Mapping[str, str]],
    goals: Sequence[Goal],
    acts: tuple[str, ...],
    slots: tuple[str, ...],
    spoken: tuple[str, ...],
) -> None:
    for name, given in (("showings", showings), ("goals", goals)):
        if not given:
            raise ValueError(f"{name} is empty: a booking needs at least one.")
    for kind in ("request", "inform", "thanks", "deny", "confirm_answer", "confirm_question"):
        if kind not in acts:
            raise ValueError(f"acts={acts} has no {kind!r}: the rules of the dialogue need it.")
    if not {"ticket", "taskcomplete"} <= set(spoken) & set(slots):
        raise ValueError("system_inform needs 'ticket' and 'taskcomplete', and slots too.")
    for what, names in (
        ("system_inform, system_request or more_values", spoken),
        *((f"showing {i}", showing) for i, showing in enumerate(showings)),
        *((f"goal {i}", (*goal["inform_slots"], *goal["request_slots"])) for i, goal in enumerate(goals)),
    ):
        for slot in names:
            if slot not in slots:
                raise ValueError(f"{what}: slot {slot!r} is not one of {slots}.")


# --------------------------------------------------------------------------------------------------- environment


def booking(talk: Domain, *, max_turns: int = 40, name: str = "Booking") -> Environment:
    """Make an environment of a system that books for users whose goals are drawn uniformly.

    The observation, float32 ``[2 K + 7 S + 3 + (max_turns + 4)]`` for ``K`` kinds of acts, is that of the published
    agent: the user's last act (kind, slots told, slots asked), the system's, slots whose value is known, the turn / 10
    and one-hot, and for each slot whether showings have its value, and how many / 100 (for slots without a value and
    at the end: showings that have all values). Like theirs, the last counts none once a value is known that showings
    do not have, such as the number of people.

    Args:
        talk: what is talked about.
        max_turns: turns of both sides after which a dialogue fails.
        name: for messages and records.

    Raises:
        ValueError: ``max_turns`` is below 2.
    """
    if max_turns < 2:
        raise ValueError(f"{name}: max_turns={max_turns}: must be at least 2, a turn for each side.")
    kind = {act: i for i, act in enumerate(talk.acts)}
    place = {slot: i for i, slot in enumerate(talk.slots)}
    num_slots = len(talk.slots)
    ticket, complete = (
        jnp.arange(num_slots) == place["ticket"],
        jnp.arange(num_slots) == place["taskcomplete"],
    )
    constrains = jnp.array([slot not in UNCONSTRAINING for slot in talk.slots])
    showings, all_showings = jnp.asarray(talk.showings), jnp.asarray(talk.all_showings)
    counts = jax.lax.population_count(showings).sum(-1, dtype=jnp.int32)
    goal_inform, goal_request = jnp.asarray(talk.goal_inform), jnp.asarray(talk.goal_request)
    num_values = jnp.array([len(values) for values in talk.values])
    action_kind = jnp.array([kind[act] for act, _, _ in talk.actions])
    told, asked = (
        jnp.array([[slot == action[i] for slot in talk.slots] for action in talk.actions]) for i in (1, 2)
    )

    def row_of(known: Array) -> Array:
        """Return the rows of ``showings[s]`` that hold the values known: the empty one for any but a value."""
        last = showings.shape[1] - 1
        return jnp.where(known >= 0, jnp.minimum(known, last), last)

    def fitting(known: Array, which: Array) -> Array:
        """Return the bit set of the showings that have all values known in the slots ``which``: uint32 ``[W]``."""
        having = showings[jnp.arange(num_slots), row_of(known)]
        free = ~which | (known == NOTHING) | (known == ANY)
        having = jnp.where(free[:, None], all_showings, having)
        return jax.lax.reduce(having, np.uint32(2**32 - 1), jax.lax.bitwise_and, (0,))

    def observe(state: DialogueState) -> Array:
        turn = 1 + 2 * state.exchanges
        is_known = state.known != NOTHING
        whole = _count(fitting(state.known, ~ticket))
        single = jnp.where(ticket, 0, counts[jnp.arange(num_slots), row_of(state.known)])
        found = jnp.concatenate([jnp.where(is_known, single, whole), whole[None]])
        parts = []
        for act in (state.user.said, state.system):
            parts += [jax.nn.one_hot(act.kind, len(talk.acts)), act.inform != NOTHING, act.request]
        parts += [is_known, turn[None] / 10.0, jax.nn.one_hot(turn, max_turns + 4), found > 0, found / 100.0]
        return jnp.concatenate([part.astype(jnp.float32) for part in parts])

    def speak(known: Array, action: Array) -> tuple[Act, Array]:
        """Return the system's act, with values from the knowledge base, and what it holds to be known after it."""
        one = told[action]
        fit = fitting(known, constrains)
        tickets = jnp.where(_count(fit) > 0, AVAILABLE, NO_MATCH)
        frequency = jax.lax.population_count(showings[jnp.argmax(one)] & fit).sum(-1, dtype=jnp.int32)
        value = jnp.where(frequency.max() > 0, jnp.argmax(frequency), NO_MATCH)
        value = jnp.where((one & (ticket | complete)).any(), tickets, value)
        known = jnp.where(one, value, known)
        whole = (one & complete).any()  # a booking repeats all that is known
        inform = jnp.where(one | whole, known, NOTHING)
        inform = jnp.where(whole & (value == AVAILABLE) & (inform == ANY), NOTHING, inform)
        return Act(action_kind[action], inform, asked[action]), known

    respond = _responses(kind, ticket, complete)

    def misheard(luck: Array, said: Act, params: DialogueParams) -> Act:
        """Return what the system hears; ``luck``: uniform numbers ``[3 S + 2]``."""
        error, lost, other = luck[:-2].reshape(3, num_slots)
        wrong = (said.inform != NOTHING) & (num_values > 0) & (error < params.slot_error)
        heard = jnp.where(lost < params.deleted_share, NOTHING, _floor(other, num_values))
        random_kind = _floor(luck[-1], len(talk.acts))
        return said._replace(
            kind=jnp.where(luck[-2] < params.intent_error, random_kind, said.kind),
            inform=jnp.where(wrong, heard, said.inform),
        )

    def reset(key: Key, params: DialogueParams) -> tuple[DialogueState, Array]:
        # One draw, cut into pieces: on a CPU random numbers are the most expensive part of a step.
        luck = jax.random.uniform(key, (2 * num_slots + 1,))
        goal = _floor(luck[-1], len(talk.goal_inform))
        inform, request = goal_inform[goal], goal_request[goal]
        movie = jnp.arange(num_slots) == place.get("moviename", -1)  # a film that is wanted is named at once
        first = (movie | _one_of(luck[:num_slots], inform != NOTHING)) & (inform != NOTHING)
        wonder = request & ~ticket
        question = jnp.where(wonder.any(), _one_of(luck[num_slots:-1], wonder), ticket)
        nothing = jnp.full((num_slots,), NOTHING)
        said = Act(jnp.int32(kind["request"]), jnp.where(first, inform, NOTHING), question)
        user = User(said, ((inform != NOTHING) & ~first) | request, nothing, jnp.bool_(False))
        silent = Act(jnp.int32(-1), nothing, jnp.zeros((num_slots,), bool))
        state = DialogueState(goal, user, silent, said.inform, jnp.int32(0))
        return state, observe(state)

    def transition(key: Key, state: DialogueState, action: Array, params: DialogueParams) -> tuple:
        luck = jax.random.uniform(key, (4 * num_slots + 2,))
        inform, request = goal_inform[state.goal], goal_request[state.goal]
        system, known = speak(state.known, action)
        before = state.user
        heard = before._replace(
            history=jnp.where(before.said.inform != NOTHING, before.said.inform, before.history),
            said=before.said._replace(inform=jnp.full_like(before.said.inform, NOTHING)),
        )
        exchanges = state.exchanges + 1
        late = 2 * exchanges > max_turns
        thanked = system.kind == kind["thanks"]
        won = thanked & ~late & _satisfied(heard, inform, ticket)
        user = respond(luck[:num_slots], heard, inform, request, system)
        user = user._replace(said=misheard(luck[num_slots:], user.said, params))
        known = jnp.where(user.said.inform != NOTHING, user.said.inform, known)
        state = DialogueState(state.goal, user, system, known, exchanges)
        over = thanked | late
        reward = jnp.where(
            over, jnp.where(won, params.success_reward, params.failure_reward), params.turn_reward
        )
        return state, observe(state), reward, over, False

    return from_functions(reset, transition, DialogueParams(), Discrete(len(talk.actions)), name)


# ------------------------------------------------------------------------------------------------------ the user


def _satisfied(user: User, inform: Array, ticket: Array) -> Array:
    """Tell whether the user has all that was wanted when the system says thanks: bool ``[]``."""
    open_ends = ((user.said.request | user.rest) & ~ticket).any()
    wrong = (inform != NOTHING) & (user.history != NOTHING) & (user.history != inform)
    return user.agreed & ~open_ends & ~(user.history == NO_MATCH).any() & ~wrong.any()


def _responses(kind: Mapping[str, int], ticket: Array, complete: Array) -> Callable[..., User]:
    """Return ``(luck [S], user, inform, request, system's act) -> user``: the rules of the agenda."""
    request_kind, inform_kind, thanks, deny = (
        jnp.int32(kind[name]) for name in ("request", "inform", "thanks", "deny")
    )

    def tell(user: User, which: Array, values: Array) -> User:
        """Say values, which are then off the agenda."""
        said = user.said._replace(kind=inform_kind, inform=jnp.where(which, values, user.said.inform))
        return user._replace(said=said, rest=user.rest & ~which)

    def ask(user: User, which: Array) -> User:
        return user._replace(said=user.said._replace(kind=request_kind, request=user.said.request | which))

    def quiet(user: User) -> User:
        """Take back every question that is open; they stay on the agenda."""
        return user._replace(said=user.said._replace(request=jnp.zeros_like(user.rest)))

    def to_question(user: User, inform: Array, request: Array, slot: Array) -> User:
        """Answer the question for a slot."""
        wanted, wondered = (slot & (inform != NOTHING)).any(), (slot & request).any()
        waiting = (slot & user.rest).any()
        answered = (slot & (user.history != NOTHING)).any()
        idle = ~user.said.request.any() & ~user.rest.any()
        shrug = tell(user, slot, jnp.full_like(inform, ANY))
        shrug = shrug._replace(said=shrug.said._replace(kind=jnp.where(idle, thanks, inform_kind)))
        rest = user.rest & (inform != NOTHING)
        return _first(
            (wanted, quiet(tell(user, slot, inform))),
            (wondered & ~waiting & answered, quiet(tell(user, slot, user.history))),
            (wondered & waiting, ask(tell(user, rest, inform), slot)),
            (True, shrug),
        )

    def to_value(luck: Array, user: User, inform: Array, system: Act) -> User:
        """Answer a value that the system tells: correct it, or go on with the agenda."""
        slot = system.inform != NOTHING
        wanted = (slot & (inform != NOTHING)).any()
        correct = (slot & (system.inform == inform)).any()
        user = user._replace(history=jnp.where(slot, system.inform, user.history))
        corrected = tell(user, slot, inform)
        user = user._replace(rest=user.rest & ~slot)
        open_questions = user.said.request & (wanted | ~slot)
        user = user._replace(said=user.said._replace(request=open_questions))
        others = user.rest & ~ticket
        pick = _one_of(luck, others)
        picked = tell(user, pick, inform)
        with_ticket = (user.rest & ticket).any() & ~wanted
        return _first(
            (wanted & ~correct, corrected),
            (open_questions.any(), ask(user, jnp.zeros_like(slot))),
            (~user.rest.any(), user._replace(said=user.said._replace(kind=thanks))),
            (~others.any(), ask(user, ticket)),
            ((pick & (inform == NOTHING)).any(), ask(user, pick)),
            (with_ticket, ask(picked, ticket)),
            (True, picked),
        )

    def to_booking(user: User, inform: Array, system: Act) -> User:
        """Check a booking against the goal."""
        sold_out = (complete & (system.inform == NO_MATCH)).any()
        user = user._replace(
            history=jnp.where(ticket & sold_out, NO_MATCH, user.history),
            rest=user.rest & ~(ticket & sold_out),
        )
        agreed = ((inform == NOTHING) | (inform == system.inform)).all()
        request = user.said.request & ~(ticket & sold_out) & agreed
        said = user.said._replace(kind=jnp.where(agreed, thanks, deny), request=request)
        return user._replace(said=said, agreed=agreed)

    def to_confirmation(luck: Array, user: User, inform: Array, request: Array) -> User:
        """Go on with the agenda, or thank."""
        pick = _one_of(luck, user.rest)
        return _first(
            (~user.rest.any(), user._replace(said=user.said._replace(kind=thanks))),
            ((pick & request).any(), ask(user, pick)),
            (True, tell(user, pick, inform)),
        )

    def respond(luck: Array, user: User, inform: Array, request: Array, system: Act) -> User:
        books = (complete & (system.inform != NOTHING)).any()
        return _first(
            (system.kind == request_kind, to_question(user, inform, request, system.request)),
            ((system.kind == inform_kind) & books, to_booking(user, inform, system)),
            (system.kind == inform_kind, to_value(luck, user, inform, system)),
            (
                system.kind == kind["confirm_answer"],
                to_confirmation(luck, user, inform, request),
            ),
            (True, user),
        )

    return respond


def _first(*cases: tuple[Array | bool, PyTree]) -> PyTree:
    """Return the tree of the first condition that holds; the last one's is True."""
    result = cases[-1][1]
    for condition, tree in reversed(cases[:-1]):
        result = jax.tree.map(lambda a, b, c=condition: jnp.where(c, a, b), tree, result)
    return result


def _one_of(luck: Array, which: Array) -> Array:
    """Return one of the slots ``which``, by uniform numbers ``[S]``, as a mask ``[S]``; none where there is none."""
    chance = jnp.where(which, luck, -1.0)
    return (jnp.arange(which.shape[0]) == jnp.argmax(chance)) & which


def _floor(luck: Array, size: Array | int) -> Array:
    return jnp.minimum((luck * size).astype(jnp.int32), size - 1)


def _count(bits: Array) -> Array:
    return jax.lax.population_count(bits).sum(dtype=jnp.int32)


# -------------------------------------------------------------------------------------------------------- agents


BASIC_QUESTIONS = ("moviename", "starttime", "city", "date", "theater", "numberofpeople")


def rule_agent(talk: Domain, *, answers: bool) -> Policy:
    """Return a policy of rules: ask :data:`BASIC_QUESTIONS` in turn, announce the booking, say thanks.

    Args:
        talk: what is talked about.
        answers: tell, before the booking, the values of those slots that the user asked for in turn. False is the
            published baseline, and what fills the published DQN's first replay. The policy's only parameter.
    """
    num_slots, num_acts = len(talk.slots), len(talk.acts)
    known_at = 2 * (num_acts + 2 * num_slots)
    places = jnp.array([talk.slots.index(slot) for slot in BASIC_QUESTIONS])
    questions = jnp.array([talk.action("request", request=slot) for slot in BASIC_QUESTIONS])
    tellable = [slot for action, slot, _ in talk.actions if action == "inform"]
    values = jnp.array(
        [talk.action("inform", inform=slot) if slot in tellable else 0 for slot in BASIC_QUESTIONS]
    )
    can_tell = jnp.array([slot in tellable for slot in BASIC_QUESTIONS])
    book, thanks = talk.action("inform", inform="taskcomplete"), talk.action("thanks")
    complete = talk.slots.index("taskcomplete")

    def act(answers: Array, key: Key, obs: Array, memory: PyTree) -> tuple[Array, PyTree, PyTree]:
        known = obs[..., known_at : known_at + num_slots] > 0
        exchange = jnp.round((obs[..., known_at + num_slots] * 10 - 1) / 2).astype(jnp.int32)
        asking = exchange < len(BASIC_QUESTIONS)
        missing = ~known[..., places] & can_tell & answers
        action = jnp.where(known[..., complete], thanks, book)
        action = jnp.where(missing.any(-1), values[jnp.argmax(missing, -1)], action)
        question = questions[jnp.clip(exchange, 0, len(BASIC_QUESTIONS) - 1)]
        return jnp.where(asking, question, action), memory, ()

    return Policy(act, jnp.bool_(answers))
