"""``MovieBooking-jrl``: the movie-booking task of TC-Bot from a folder of its data, and dialogues in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.language import dialogue
from jrl.language.dialogue import ANY, AVAILABLE, NO_MATCH, NOTHING, Act, Domain
from jrl.types import Environment, Policy

SPLITS = ("all", "train", "test", "unseen")
SPECIAL = {NO_MATCH: "no value", ANY: "any", AVAILABLE: "available"}


def movie_booking(
    data: str | None = None, split: str = "all", goals: str = "user_goals.json", max_turns: int = 40
) -> Environment:
    """Book a ticket for users with a goal in mind: :func:`jrl.language.dialogue.booking` over the movies of ``data``.

    Args:
        data: a folder with ``movie_kb.json``, ``slot_sets.json``, ``dialogue_acts.json``, ``slot_values.json`` and the
            goals, as :func:`load` reads them. The package ships none.
        split: ``train`` or ``test`` goals, ``unseen``: those of ``test`` that do not occur in ``train``, or ``all``.
        goals: name of the file of goals.
        max_turns: turns of both sides after which a dialogue fails.

    Raises:
        ValueError: no folder, a file that is missing or malformed, or another split.
    """
    return dialogue.booking(load(data, split, goals), max_turns=max_turns, name="MovieBooking-jrl")


def load(data: str | Path | None, split: str = "all", goals: str = "user_goals.json") -> Domain:
    """Read what is talked about from a folder.

    ``movie_kb.json`` is a list of showings, slot -> value. The goals are ``{"train": [...], "test": [...]}`` of
    ``{"inform_slots": {slot: value}, "request_slots": {slot: ...}}``. ``slot_sets.json`` has the slots in order
    (``all``) and those that the system may ask for and tell (``system_request``, ``system_inform``),
    ``dialogue_acts.json`` the kinds of acts in order, ``slot_values.json`` more values of slots, for noise.

    Raises:
        ValueError: as :func:`movie_booking`.
    """
    if data is None:
        raise ValueError(
            "MovieBooking-jrl needs data, a folder with a knowledge base and user goals: "
            "jrl train dqn --env MovieBooking-jrl --env-kwarg data=FOLDER."
        )
    if split not in SPLITS:
        raise ValueError(f"MovieBooking-jrl: split={split!r}: must be one of {', '.join(SPLITS)}.")
    folder = Path(data)
    sets, by_split = _read(folder, "slot_sets.json"), _read(folder, goals)
    try:
        train, test = by_split["train"], by_split["test"]
        chosen = {
            "all": train + test,
            "train": train,
            "test": test,
            "unseen": [goal for goal in test if goal not in train],
        }[split]
        return dialogue.domain(
            _read(folder, "movie_kb.json"),
            chosen,
            acts=_read(folder, "dialogue_acts.json"),
            slots=sets["all"],
            system_inform=sets["system_inform"],
            system_request=sets["system_request"],
            more_values=_read(folder, "slot_values.json"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"MovieBooking-jrl: {folder} is not laid out as jrl.language.booking.load says: "
            f"{type(error).__name__} {error}."
        ) from error


def _read(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MovieBooking-jrl: {folder / name} cannot be read ({error}). data={str(folder)!r} must be a folder with "
            "the knowledge base and the user goals of the task."
        ) from error


# ------------------------------------------------------------------------------------------------------ in words


def converse(
    key: jax.Array,
    env: Environment,
    talk: Domain,
    policy: Policy | Callable[..., Any],
    templates: Mapping[str, Any],
) -> tuple[list[str], float]:
    """Return the lines of one dialogue, user and system in turn, and its return.

    Args:
        key: of the dialogue.
        env: from :func:`jrl.language.dialogue.booking`.
        talk: what it was made of.
        policy: as for :func:`jrl.evaluate`.
        templates: kind of act -> list of ``{"inform_slots", "request_slots", "nl": {"usr", "agt"}}``, sentences with
            ``$slot$`` in place of values (TC-Bot's ``nl_templates.json``, under ``dia_acts``).
    """
    reset_key, key = jax.random.split(key)
    state, obs = jax.jit(env.reset)(reset_key, env.params)
    step = jax.jit(env.step)
    lines, total, over = [f"user: {say(state.user.said, talk, templates, 'usr')}"], 0.0, False
    while not over:
        action_key, step_key, key = jax.random.split(key, 3)
        action = policy(action_key, obs[None], ())[0][0]
        before = state
        state, out = step(step_key, state, action, env.params)
        obs = out.obs
        over = bool(out.terminated | out.truncated)
        total += float(out.reward)
        if over:  # the state is the next dialogue's
            system = _last_said(step_key, before, action, env, talk)
            lines.append(f"system: {say(system, talk, templates, 'agt')}")
        else:
            lines.append(f"system: {say(state.system, talk, templates, 'agt')}")
            lines.append(f"user: {say(state.user.said, talk, templates, 'usr')}")
    return lines, total


def _last_said(
    key: jax.Array, state: dialogue.DialogueState, action: jax.Array, env: Environment, talk: Domain
) -> Act:
    """Return what the system says in the last exchange, as where the dialogue goes on."""
    kind = talk.actions[int(action)][0]
    if kind == "thanks":  # after which none goes on
        return state.system._replace(
            kind=jnp.int32(talk.acts.index(kind)),
            inform=jnp.full_like(state.known, NOTHING),
            request=jnp.zeros_like(state.system.request),
        )
    longer = dialogue.booking(talk, max_turns=2 * int(state.exchanges) + 2)
    return jax.jit(longer.step)(key, state, action, env.params)[0].system


def say(act: Act, talk: Domain, templates: Mapping[str, Any], side: str) -> str:
    """Put an act into words: its template, else those of its slots one by one, else its slots and values as they are.

    Args:
        act: one dialogue act.
        talk: names its slots and values.
        templates: as for :func:`converse`.
        side: ``usr`` or ``agt``.
    """
    kind, told = talk.acts[int(act.kind)], np.asarray(act.inform)
    inform = {
        slot: SPECIAL[code] if code < 0 else talk.values[i][code]
        for i, (slot, code) in enumerate(zip(talk.slots, told.tolist(), strict=True))
        if code != NOTHING
    }
    request = [slot for slot, asked in zip(talk.slots, np.asarray(act.request), strict=True) if asked]
    if side == "agt" and inform.get("taskcomplete") == SPECIAL[NO_MATCH]:
        return "I am sorry, there is no ticket."
    if side == "agt" and SPECIAL[NO_MATCH] in inform.values():
        return f"I have no {next(iter(inform))} for that."
    if inform and set(inform.values()) == {SPECIAL[ANY]}:
        return "I do not care."
    whole = _template(kind, inform, request, templates, side)
    if whole is not None:
        return whole
    single: list[tuple[str, dict[str, str], list[str]]] = [
        ("inform", {slot: value}, []) for slot, value in inform.items() if slot != "taskcomplete"
    ]
    single += [("request", {}, [slot]) for slot in request]
    parts = [_template(*part, templates, side) or _plain(*part) for part in single]
    parts += ["That is booked."] if "taskcomplete" in inform else []
    return " ".join(parts) or kind.replace("_", " ")


def _plain(kind: str, inform: Mapping[str, str], request: list[str]) -> str:
    return f"{kind}({', '.join([*(f'{slot}={value}' for slot, value in inform.items()), *request])})"


def _template(
    kind: str, inform: Mapping[str, str], request: list[str], templates: Mapping[str, Any], side: str
) -> str | None:
    for template in templates.get(kind, ()):
        if set(template["inform_slots"]) == set(inform) and set(template["request_slots"]) == set(request):
            sentence = template["nl"][side]
            for slot, value in inform.items():
                sentence = sentence.replace(f"${slot}$", value)
            return sentence
    return None
