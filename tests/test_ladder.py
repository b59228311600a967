"""The rows of the ladder of language tasks that take under a minute: each reaches its bar."""

import ladder
import pytest

UNDER_A_MINUTE = [
    *(f"level0-{name}" for name in ("rloo", "reinforce", "grpo", "dr_grpo", "ppo", "dqn")),
    "level1-ppo",
    "level1-dqn",
    "level1-ilql",
    "level8-dqn",
]


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", ["level1-grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in UNDER_A_MINUTE)]
)
def test_a_row_reaches_its_bar(name):
    row = ladder.ROWS[name]
    result = row.run(1)  # the records are of seed 0
    assert row.reached(result), f"{row.bar}: {result}"
