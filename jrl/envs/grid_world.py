"""Grids with walls, goals and traps; the 4×4 one of many introductions is the default.

``GridWorld-jrl``: cells are numbered row by row from the upper left corner. Actions 0 up, 1 right, 2 down,
3 left; what would lead off the grid or into a wall leaves the agent where it is. Entering a goal or a trap ends
the episode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jrl.envs.build import check_whole
from jrl.envs.finite import Outcomes, Start, from_outcomes, replace_params
from jrl.envs.registry import register
from jrl.types import Array, Discrete, Environment

FREE, GOAL, TRAP, WALL = 0, 1, 2, 3

DYNA_MAZE = {
    "rows": 6,
    "columns": 9,
    "goals": (8,),
    "traps": (),
    "walls": (7, 11, 16, 20, 25, 29, 41),
    "start": 18,
}
"""The maze of Sutton and Barto 2018, figure 8.2, as arguments: the shortest way takes 14 steps."""


class GridParams(NamedTuple):
    """Parameters, all traced.

    Attributes:
        cells: int32 ``[S]``, what each cell is: 0 free, 1 goal, 2 trap, 3 wall.
        start: int32, the cell where episodes start; -1 draws a free cell, in a grid that was made with -1.
        goal_reward: float32, for entering a goal.
        trap_reward: float32, for entering a trap.
        step_reward: float32, for every other step.
        slip: float32 in [0, 1], the chance to move at a right angle instead, half to each side.
        max_steps: int32, time limit.
    """

    cells: Any
    start: Any = 0
    goal_reward: Any = 1.0
    trap_reward: Any = -1.0
    step_reward: Any = 0.0
    slip: Any = 0.0
    max_steps: Any = 100


def make(
    *,
    rows: int = 4,
    columns: int = 4,
    goals: Sequence[int] = (15,),
    traps: Sequence[int] = (14,),
    walls: Sequence[int] = (),
    start: int = 0,
    slip: float = 0.0,
    params: Any = None,
    raw: bool = False,
) -> Environment:
    """Build a grid.

    With γ = 0.9 the default one has ``V*(11) = 1``, ``V*(10) = 0.9`` and ``V*(0) = 0.9⁵ = 0.59049``.

    Args:
        rows: height.
        columns: width.
        goals: cells that end the episode with ``goal_reward``.
        traps: cells that end it with ``trap_reward``.
        walls: cells that cannot be entered.
        start: where episodes start; -1 draws a free cell.
        slip: chance to move at a right angle instead.
        params: :class:`GridParams`, or a mapping of fields to change, which goes before ``start`` and ``slip``.
        raw: observe the cell as an int32 index, instead of one-hot float32 ``[S]``.

    Raises:
        ValueError: a size or a cell that is no whole number, no free cell, a cell off the grid or given twice, a
            start that is not free, a slip that is no probability, or a parameter that does not exist.
    """
    name = "GridWorld-jrl"
    check_whole(name, rows=rows, columns=columns)
    num_states = rows * columns
    cells = np.full(max(num_states, 0), FREE, np.int32)
    for field, kind, given in (("goals", GOAL, goals), ("traps", TRAP, traps), ("walls", WALL, walls)):
        if not isinstance(given, Iterable):
            raise ValueError(f"{name}: {field}={given!r}: must be a list of cells, such as ({given!r},).")
        for cell in given:
            check_whole(name, **{f"a cell of {field}": cell})
            if not 0 <= cell < num_states:
                raise ValueError(
                    f"{name}: {field} has cell {cell}; a grid of {rows} rows and {columns} columns has cells "
                    f"0 to {num_states - 1}."
                )
            if cells[cell] != FREE:
                raise ValueError(f"{name}: cell {cell} of {field} is in another list too.")
            cells[cell] = kind
    params = replace_params(GridParams(cells, start, slip=slip), params, name)
    start, slip, cells = int(params.start), float(params.slip), np.asarray(params.cells)
    if not (cells == FREE).any():
        raise ValueError(f"{name}: rows={rows}, columns={columns} leaves no free cell.")
    if start != params.start:
        raise ValueError(
            f"{name}: start={params.start} is no whole number; give a free cell, or -1 to draw it."
        )
    if start != -1 and not (0 <= start < num_states and cells[start] == FREE):
        raise ValueError(f"{name}: start={start} is not a free cell; give one, or -1 to draw it.")
    if not 0.0 <= slip <= 1.0:
        raise ValueError(f"{name}: slip={slip}: must be in [0, 1].")
    # A start that is given needs no draw, which would be most of what a reset costs.
    random_start = start == -1

    def outcomes(state: Array, action: Array, params: GridParams) -> Outcomes:
        direction = (action + jnp.array([0, 1, 3])) % 4
        # Comparisons instead of a table of moves: XLA fuses them, and looks a table up entry by entry.
        to_row = state // columns + (direction == 2) - (direction == 0)
        to_column = state % columns + (direction == 1) - (direction == 3)
        inside = (to_row >= 0) & (to_row < rows) & (to_column >= 0) & (to_column < columns)
        to = jnp.where(inside, to_row * columns + to_column, state)
        here, there = params.cells[state], params.cells[to]
        to = jnp.where(there == WALL, state, to)
        kind = jnp.where(there == WALL, here, there)
        reward = jnp.where(kind == GOAL, params.goal_reward, params.step_reward)
        reward = jnp.where(kind == TRAP, params.trap_reward, reward)
        # No episode goes on in a goal or a trap; as a state of the process it is worth nothing.
        over = (here == GOAL) | (here == TRAP)
        half = params.slip / 2
        return Outcomes(
            probability=jnp.stack([1.0 - params.slip, half, half]),
            next_state=jnp.where(over, state, to),
            reward=jnp.where(over, 0.0, reward),
            terminated=over | (kind == GOAL) | (kind == TRAP),
        )

    def first(params: GridParams) -> Start:
        if not random_start:
            return Start(jnp.ones(1), jnp.asarray(params.start)[None])
        free = (params.cells == FREE).astype(jnp.float32)
        given = (jnp.arange(num_states) == params.start).astype(jnp.float32)
        return Start(jnp.where(params.start < 0, free / free.sum(), given), jnp.arange(num_states))

    return from_outcomes(outcomes, first, num_states, params, Discrete(4), name, raw=raw)


register("GridWorld-jrl", make)
