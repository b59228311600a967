"""The simulated user against its rules in dictionaries, outcomes told by hand, noise, words, the real movies."""

import dataclasses
import itertools
import json
import random

import bundle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrl
from jrl.language import booking, dialogue
from jrl.language.dialogue import ANY, AVAILABLE, NO_MATCH, NOTHING

ACTS = ["request", "inform", "confirm_question", "confirm_answer", "thanks", "deny"]
SLOTS = [
    "moviename",
    "city",
    "date",
    "numberofpeople",
    "theater",
    "starttime",
    "state",
    "ticket",
    "taskcomplete",
]
TOLD = ["moviename", "theater", "starttime", "date", "city", "state", "taskcomplete", "ticket"]
ASKED = ["moviename", "theater", "starttime", "date", "numberofpeople", "city", "state"]
SHOWINGS = [
    {"moviename": "metropolis", "city": "Berlin", "date": "today", "theater": "capitol", "starttime": "8pm"},
    {"moviename": "metropolis", "city": "berlin", "date": "today", "theater": "palast", "starttime": "9pm"},
    {
        "moviename": "metropolis",
        "city": "berlin",
        "date": "tomorrow",
        "theater": "palast",
        "starttime": "9pm",
    },
    {"moviename": "nosferatu", "city": "paris", "date": "today", "theater": "palast", "starttime": "8pm"},
    {"moviename": "nosferatu", "city": "paris", "date": "tomorrow", "theater": "rex"},
    {"moviename": "nosferatu", "city": "berlin", "date": "tomorrow", "state": "brandenburg"},
]


def goal(request=(), **inform):
    return {"diaact": "request", "inform_slots": inform, "request_slots": dict.fromkeys(request, "UNK")}


GOALS = [
    goal(moviename="metropolis", city="berlin", date="today", numberofpeople="2"),
    goal(["theater", "starttime"], moviename="Metropolis", city="berlin", numberofpeople="3"),
    goal(["theater", "date"], moviename="nosferatu", starttime="8pm", numberofpeople="1"),
    goal(["starttime"], moviename="nosferatu", theater="rex", numberofpeople="2"),  # no showing knows it
    goal(["date"], moviename="metropolis", city="paris", numberofpeople="2"),  # no showing
]
GOOD, HOPELESS = GOALS[:3], GOALS[3:]
FILES = {
    "movie_kb.json": SHOWINGS,
    "user_goals.json": {"train": GOOD, "test": [GOOD[0], *HOPELESS]},
    "slot_sets.json": {"all": SLOTS, "system_inform": TOLD, "system_request": ASKED},
    "dialogue_acts.json": ACTS,
    "slot_values.json": {"city": ["Rome"], "date": ["sunday"]},
}


def talk_of(goals):
    return dialogue.domain(
        SHOWINGS, goals, acts=ACTS, slots=SLOTS, system_inform=TOLD, system_request=ASKED,
        more_values={"city": ["Rome"]},
    )  # fmt: skip


TALK = talk_of(GOALS)


@pytest.fixture(scope="module")
def env():
    return dialogue.booking(TALK, max_turns=24)


@pytest.fixture(scope="module")
def compiled(env):
    return jax.jit(env.reset), jax.jit(env.step)


@pytest.fixture(scope="module")
def play(compiled, env):
    """Return a function that has a dialogue about one goal: ``(goal, actions) -> rewards, states``."""

    def play(number, actions, **params):
        reset, step = compiled
        params = env.params._replace(**params)
        state, _ = next(
            start
            for start in (reset(jax.random.key(i), params) for i in range(200))
            if int(start[0].goal) == number
        )
        rewards, states = [], [state]
        for i, action in enumerate(actions):
            state, out = step(jax.random.key(i), state, TALK.action(*action), params)
            rewards.append(float(out.reward))
            states.append(state)
            assert not out.truncated
            assert bool(out.terminated) == (i == len(actions) - 1), i
        return rewards, states

    return play


def ask(slot):
    return ("request", None, slot)


def tell(slot):
    return ("inform", slot, None)


QUESTIONS = [ask("moviename"), ask("city"), ask("date"), ask("numberofpeople")]
BOOK, THANKS = tell("taskcomplete"), ("thanks", None, None)

# ------------------------------------------------------------------------------------------- rules in dictionaries


class Rules:
    """The user and the system's memory with dictionaries and sets; ``pick(options)`` decides what is left open."""

    def __init__(self, goal, pick):
        self.pick, self.turn, self.agreed, self.history, self.system = pick, 0, False, {}, ("", {}, set())
        self.want = {slot: value.lower() for slot, value in goal["inform_slots"].items()}
        self.wonder = {*goal["request_slots"], "ticket"}
        first = {"moviename", pick(set(self.want))}
        self.kind, self.inform = "request", {slot: self.want[slot] for slot in first}
        self.request = {pick(self.wonder - {"ticket"} or {"ticket"})}
        self.rest = {*self.want, *self.wonder} - first
        self.known = dict(self.inform)

    def fitting(self, known):
        given = {slot: value for slot, value in known.items() if value != ANY}
        rows = [{slot: value.lower() for slot, value in row.items()} for row in SHOWINGS]
        return [row for row in rows if all(row.get(slot) == value for slot, value in given.items())]

    def step(self, action):
        """Return the reward, and whether the dialogue is over."""
        kind, told, asked = action
        self.speak(kind, told, asked)
        self.turn += 2
        self.history |= self.inform
        self.inform = {}
        if self.turn > 24 or kind == "thanks":
            return (80 if self.turn <= 24 and self.satisfied() else -40), True
        if kind == "request":
            self.to_question(asked)
        elif told == "taskcomplete":
            self.to_booking()
        elif kind == "inform":
            self.to_value(told)
        elif kind == "confirm_answer":
            self.agenda(self.rest)
        self.known |= self.inform
        return -1, False

    def speak(self, kind, told, asked):
        inform = {}
        if told:
            rows = self.fitting({s: v for s, v in self.known.items() if s not in dialogue.UNCONSTRAINING})
            column = [row[told] for row in rows if told in row]
            most = sorted(
                set(column), key=lambda v: (-column.count(v), TALK.values[SLOTS.index(told)].index(v))
            )
            value = (most or [NO_MATCH])[0]
            if told in ("ticket", "taskcomplete"):
                value = AVAILABLE if rows else NO_MATCH
            inform = {told: value}
            if told == "taskcomplete":
                hide = ANY if rows else None
                inform |= {s: v for s, v in self.known.items() if v != hide and s != told}
            self.known[told] = value
        self.system = (kind, inform, {asked} - {None})

    def satisfied(self):
        right = all(self.want.get(slot, value) == value for slot, value in self.history.items())
        done = not (self.request | self.rest) - {"ticket"}
        return self.agreed and right and done and NO_MATCH not in self.history.values()

    def tell(self, *slots):
        self.kind = "inform"
        self.inform |= {slot: self.want[slot] for slot in slots}
        self.rest -= {*slots}

    def agenda(self, options, with_ticket=False):
        if not options:
            self.kind = "thanks"
            return
        slot = self.pick(options)
        if slot in self.want:
            self.tell(slot)
            slot = "ticket" if with_ticket and "ticket" in self.rest else None
        if slot:
            self.kind = "request"
            self.request |= {slot}

    def to_question(self, slot):
        if slot in self.want:
            self.tell(slot)
            self.request = set()
        elif slot in self.wonder and slot in self.rest:
            self.tell(*(self.rest & set(self.want)))
            self.kind = "request"
            self.request |= {slot}
        elif slot in self.wonder:
            self.kind, self.inform, self.request = "inform", {slot: self.history[slot]}, set()
        else:
            self.kind = "inform" if self.request | self.rest else "thanks"
            self.inform = {slot: ANY}

    def to_value(self, slot):
        value = self.history[slot] = self.system[1][slot]
        if self.want.get(slot, value) != value:
            self.tell(slot)
            return
        self.rest -= {slot}
        if slot not in self.want:
            self.request -= {slot}
        if self.request:
            self.kind = "request"
        else:
            others = self.rest - {"ticket"} or self.rest
            self.agenda(others, with_ticket=slot not in self.want)

    def to_booking(self):
        informed = self.system[1]
        if informed["taskcomplete"] == NO_MATCH:
            self.history["ticket"] = NO_MATCH
            self.rest -= {"ticket"}
            self.request -= {"ticket"}
        self.agreed = all(informed.get(slot) == value for slot, value in self.want.items())
        self.kind = "thanks" if self.agreed else "deny"
        if not self.agreed:
            self.request = set()

    def observation(self):
        def bag(slots):
            return [slot in slots for slot in SLOTS]

        def kinds(kind):
            return [kind == act for act in ACTS]

        whole = len(self.fitting({slot: value for slot, value in self.known.items() if slot != "ticket"}))
        counts = [
            whole if slot not in self.known
            else 0 if slot == "ticket" or self.known[slot] == ANY
            else len(self.fitting({slot: self.known[slot]}))
            for slot in SLOTS
        ] + [whole]  # fmt: skip
        kind, told, asked = self.system
        return np.array([
            *kinds(self.kind), *bag(self.inform), *bag(self.request), *kinds(kind), *bag(told), *bag(asked),
            *bag(self.known), (self.turn + 1) / 10, *(self.turn + 1 == np.arange(24 + 4)),
            *(count > 0 for count in counts), *(count / 100 for count in counts),
        ], np.float32)  # fmt: skip


def code(slot, value):
    return value if isinstance(value, int) else TALK.values[SLOTS.index(slot)].index(value)


def codes(values):
    return [code(slot, values[slot]) if slot in values else NOTHING for slot in SLOTS]


def mask(slots):
    return [slot in slots for slot in SLOTS]


def names(which):
    return {slot for slot, has in zip(SLOTS, np.asarray(which), strict=True) if has}


def test_the_user_keeps_the_rules(compiled, env):
    reset, step = compiled
    agent = dialogue.rule_agent(TALK, answers=True)
    rule = jax.jit(lambda obs: agent(None, obs)[0])
    chance = random.Random(0)
    new: set = set()

    def pick(options):
        return next(iter(sorted(options & new) or sorted(options)))

    won = 0
    for episode in range(80):
        state, obs = reset(jax.random.key(episode), env.params)
        told = names(state.user.said.inform != NOTHING)
        new = (told - {"moviename"} or told) | names(state.user.said.request)
        rules = Rules(GOALS[int(state.goal)], pick)
        over = False
        while not over:
            np.testing.assert_allclose(obs, rules.observation(), rtol=1e-6)
            action = int(rule(obs))
            if chance.random() < (episode % 4) / 3:
                action = chance.randrange(len(TALK.actions))
            before = names(state.user.said.request)
            state, out = step(jax.random.key(chance.randrange(2**31)), state, action, env.params)
            asked = names(state.user.said.request)
            new = names(state.user.said.inform != NOTHING) | (asked - before) or asked
            reward, over = rules.step(TALK.actions[action])
            assert (float(out.reward), bool(out.terminated), bool(out.truncated)) == (reward, over, False)
            if over:
                won += reward > 0
                break
            obs, said = out.obs, state.user.said
            assert ACTS[int(said.kind)] == rules.kind
            np.testing.assert_array_equal(said.inform, codes(rules.inform))
            np.testing.assert_array_equal(said.request, mask(rules.request))
            np.testing.assert_array_equal(state.user.rest, mask(rules.rest))
            np.testing.assert_array_equal(state.user.history, codes(rules.history))
            np.testing.assert_array_equal(state.known, codes(rules.known))
            np.testing.assert_array_equal(state.system.inform, codes(rules.system[1]))
    assert 10 <= won <= 70  # both ends were seen


# ------------------------------------------------------------------------------------------------- told by hand


@pytest.mark.parametrize(
    ("number", "actions", "last"),
    [
        (0, [*QUESTIONS, BOOK, THANKS], 80),
        (0, [*QUESTIONS, THANKS], -40),  # nothing was booked
        (0, [*QUESTIONS[:2], BOOK, THANKS], -40),  # booked without the date and for no number of people
        (0, [*QUESTIONS[:2], BOOK, *QUESTIONS[2:], BOOK, THANKS], 80),  # the user denies, and is asked again
        (1, [*QUESTIONS, tell("theater"), tell("starttime"), BOOK, THANKS], 80),
        (1, [*QUESTIONS, tell("theater"), BOOK, THANKS], -40),  # a question is open
        (2, [*QUESTIONS, ask("starttime"), tell("theater"), tell("date"), BOOK, THANKS], 80),
        (3, [*QUESTIONS, ask("theater"), tell("starttime"), BOOK, THANKS], -40),  # no showing has a time
        (4, [*QUESTIONS, tell("date"), BOOK, THANKS], -40),  # no showing at all
    ],
)  # fmt: skip
def test_outcomes(play, number, actions, last):
    rewards, _ = play(number, actions)
    assert rewards == [-1.0] * (len(actions) - 1) + [last]


def test_too_long_a_dialogue_fails_whatever_is_said_last(play):
    idle = [("confirm_question", None, None)] * (12 - len(QUESTIONS) - 1)
    assert play(0, [*QUESTIONS, BOOK, *idle, THANKS])[0] == [-1.0] * 12 + [-40.0]
    assert play(0, [*QUESTIONS, BOOK, *idle[1:], THANKS])[0] == [-1.0] * 11 + [80.0]


def test_values_told_are_the_most_frequent_that_fit(play):
    theater, time, city = (SLOTS.index(slot) for slot in ("theater", "starttime", "city"))
    _, states = play(1, [ask("moviename"), tell("theater"), tell("starttime"), tell("city"), THANKS])
    assert TALK.values[theater][int(states[2].system.inform[theater])] == "palast"  # two of metropolis' three
    assert TALK.values[time][int(states[3].system.inform[time])] == "9pm"
    assert TALK.values[city][int(states[4].system.inform[city])] == "berlin"  # and "Berlin": one value
    _, states = play(4, [ask("city"), tell("date"), THANKS])
    assert int(states[2].system.inform[SLOTS.index("date")]) == NO_MATCH


def test_rewards_are_parameters(play):
    assert play(0, [*QUESTIONS, BOOK, THANKS], success_reward=1.0, turn_reward=0.0)[0] == [0.0] * 5 + [1.0]


def both_rules(env, talk, num_episodes):
    """Evaluate the rule that answers and the published one, compiled once."""
    answers = dialogue.rule_agent(talk, answers=True)
    return [
        jrl.evaluate(jax.random.key(0), env, policy, num_episodes=num_episodes)
        for policy in (answers, dataclasses.replace(answers, params=jnp.bool_(False)))
    ]


def test_returns_follow_from_success_and_length(env):
    stats, basic = both_rules(env, TALK, 512)
    won = stats.episode_return > 0
    assert stats.completed.all()
    np.testing.assert_allclose(stats.episode_return, 80.0 * won - 40.0 * ~won - (stats.episode_length - 1.0))
    # The rule asks and answers all that the first three goals need; nobody can serve the other two.
    np.testing.assert_allclose(won.mean(), 3 / 5, atol=0.08)
    np.testing.assert_allclose((basic.episode_return > 0).mean(), 1 / 5, atol=0.07)


def test_noise(compiled, env):
    reset, step = compiled

    def heard(**params):
        params = env.params._replace(**params)
        return [
            step(jax.random.key(i), reset(jax.random.key(i), params)[0], TALK.action(*ask("city")), params)[0]
            for i in range(40)
        ]

    city = SLOTS.index("city")
    true = {int(state.known[city]) for state in heard()}
    assert true <= {code("city", "berlin"), code("city", "paris"), ANY}
    assert all(int(state.known[city]) < 0 for state in heard(slot_error=1.0, deleted_share=1.0)
               if int(state.goal) == 2)  # fmt: skip
    wrong = {int(state.known[city]) for state in heard(slot_error=1.0)}
    assert wrong == {code("city", name) for name in ("berlin", "paris", "rome")}
    kinds = {int(state.user.said.kind) for state in heard(intent_error=1.0)}
    assert kinds == set(range(len(ACTS)))


# ------------------------------------------------------------------------------------------------ files and words


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_splits(folder):
    counts = {split: len(booking.load(folder, split).goal_inform) for split in booking.SPLITS}
    assert counts == {"all": 6, "train": 3, "test": 3, "unseen": 2}
    env = jrl.make("MovieBooking-jrl", data=str(folder), split="train", max_turns=20)
    assert env.name == "MovieBooking-jrl"
    assert env.action.n == 4 + len(TOLD) + len(ASKED)
    assert env.observation.shape == (2 * len(ACTS) + 7 * len(SLOTS) + 3 + 24,)


def test_bad_input(folder):
    with pytest.raises(ValueError, match=r"MovieBooking-jrl needs data, a folder .*--env-kwarg data=FOLDER"):
        jrl.make("MovieBooking-jrl")
    with pytest.raises(ValueError, match="split='dev': must be one of all, train, test, unseen"):
        jrl.make("MovieBooking-jrl", data=str(folder), split="dev")
    with pytest.raises(ValueError, match="max_turns=1: must be at least 2"):
        jrl.make("MovieBooking-jrl", data=str(folder), max_turns=1)
    with pytest.raises(ValueError, match=r"goals\.json cannot be read .*No such file"):
        jrl.make("MovieBooking-jrl", data=str(folder), goals="goals.json")
    with pytest.raises(ValueError, match="goals is empty"):
        talk_of([])
    with pytest.raises(ValueError, match="goal 0: slot 'seat' is not one of"):
        talk_of([goal(seat="7")])
    (folder / "user_goals.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"is not laid out as .*TypeError"):
        jrl.make("MovieBooking-jrl", data=str(folder))
    (folder / "movie_kb.json").write_text("{")
    (folder / "user_goals.json").write_text(json.dumps(FILES["user_goals.json"]))
    with pytest.raises(ValueError, match=r"movie_kb\.json cannot be read"):
        jrl.make("MovieBooking-jrl", data=str(folder))


TEMPLATES = {
    "inform": [
        {
            "inform_slots": ["city"],
            "request_slots": [],
            "nl": {"usr": "In $city$.", "agt": "It is in $city$."},
        },
        {
            "inform_slots": ["date"],
            "request_slots": [],
            "nl": {"usr": "On $date$.", "agt": "It is on $date$."},
        },
    ],
    "request": [
        {"inform_slots": [], "request_slots": ["city"], "nl": {"usr": "Where?", "agt": "Which city?"}}
    ],
}


def test_words():
    def act(kind, request=(), **inform):
        told = {
            slot: value if value in booking.SPECIAL else code(slot, value) for slot, value in inform.items()
        }
        return dialogue.Act(jnp.int32(ACTS.index(kind)), jnp.array(codes(told)), jnp.array(mask(request)))

    def say(side, *args, **inform):
        return booking.say(act(*args, **inform), TALK, TEMPLATES, side)

    assert say("usr", "inform", city="berlin") == "In berlin."
    assert say("agt", "inform", city="berlin", date="today") == "It is in berlin. It is on today."
    assert say("agt", "request", ["city"]) == "Which city?"
    assert say("usr", "inform", theater="rex") == "inform(theater=rex)"
    assert say("usr", "inform", city=ANY) == "I do not care."
    assert say("agt", "inform", date=NO_MATCH) == "I have no date for that."
    assert say("agt", "inform", city="paris", taskcomplete=NO_MATCH) == "I am sorry, there is no ticket."
    assert say("agt", "inform", city="paris", taskcomplete=AVAILABLE) == "It is in paris. That is booked."
    assert say("usr", "confirm_question") == "confirm question"


def test_a_dialogue_in_words(env):
    lines, total = booking.converse(
        jax.random.key(1), env, TALK, dialogue.rule_agent(TALK, answers=True), TEMPLATES
    )
    assert [line.split(":")[0] for line in lines] == ["user", "system"] * (len(lines) // 2)
    assert lines[-1] == "system: thanks"
    assert "system: Which city?" in lines
    assert total in (80.0 - (len(lines) / 2 - 1), -40.0 - (len(lines) / 2 - 1))


@pytest.mark.parametrize("slot", ["theater", "ticket", "taskcomplete"])
def test_the_last_line_of_a_dialogue_that_is_cut_is_what_the_longer_one_has_there(slot):
    ask, tell = TALK.action("request", request="date"), TALK.action("inform", inform=slot)

    def converse(max_turns):
        said = itertools.chain([ask], itertools.repeat(tell))
        policy = lambda key, obs, memory: (jnp.array([next(said)]), memory)  # noqa: E731
        env = dialogue.booking(TALK, max_turns=max_turns)
        return booking.converse(jax.random.key(0), env, TALK, policy, TEMPLATES)[0]

    cut, longer = converse(3), converse(7)
    assert len(cut) == 4 < len(longer)
    assert cut == longer[:4]


# -------------------------------------------------------------------------------------------------- the real task


def test_the_movies():
    data = bundle.path("dialogue/movie_kb.json").parent
    talk = booking.load(data)
    env = jrl.make("MovieBooking-jrl", data=str(data))
    assert env.observation.shape == (272,)  # the published agent's
    assert env.action.n == 43
    counts = {split: len(booking.load(data, split).goal_inform) for split in booking.SPLITS}
    assert counts == {"all": 128, "train": 102, "test": 26, "unseen": 15}
    templates = json.loads((data / "nl_templates.json").read_text())["dia_acts"]
    lines, _ = booking.converse(
        jax.random.key(0), env, talk, dialogue.rule_agent(talk, answers=True), templates
    )
    assert len(lines) > 10
    assert not any("$" in line for line in lines)
    # Thousands of dialogues at once: the published rule, and the one that answers.
    rates = [float((stats.episode_return > 0).mean()) for stats in both_rules(env, talk, 2048)]
    np.testing.assert_allclose(rates, [0.85, 0.40], atol=0.04)
