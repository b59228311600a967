"""Games of MinAtar over a batch: the transitions of gymnax, step by step, many times as fast.

Young and Tian 2019, https://arxiv.org/abs/1903.03176, with gymnax's differences: minimal actions, no sticky
ones. A board is kept as ten columns of bits, int32 ``[B, 10]``: bit ``y`` of entry ``x`` is the cell in row ``y``
(0 at the top) and column ``x``. To move, look up or count is then arithmetic on ten numbers; gymnax indexes
and sorts arrays of cells, which a vmap turns into gathers, scatters and a sort for each environment. Cells
appear only in the observation, bool ``[B, 10, 10, C]`` (float32 in gymnax).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jrl.envs.batched import from_batched_functions, settle
from jrl.types import ActionSpace, Array, Environment

SIZE = 10
BOTTOM = SIZE - 1


def show(*boards: Array) -> Array:
    """Boards ``[B, 10]``, one a channel, to their cells, bool ``[B, 10, 10, C]``."""
    # Two settled stages, columns then cells, so that inner loops run over 10 C neighbours in vector instructions.
    channel = jnp.arange(len(boards))
    columns = boards[0][..., None]
    for i, board in enumerate(boards[1:], 1):
        columns = jnp.where(channel == i, board[..., None], columns)
    lanes = settle(columns).reshape(len(columns), 1, -1)
    rows = 1 << jnp.arange(SIZE)[:, None]
    return settle(lanes & rows != 0).reshape(-1, SIZE, SIZE, len(boards))


def point(x: Array, y: Array | int) -> Array:
    """Return the board on which only the cell ``(x, y)``, each ``[B]``, is set."""
    return jnp.where(jnp.arange(SIZE) == x[:, None], 1 << jnp.broadcast_to(y, x.shape)[:, None], 0)


def meets(board: Array, other: Array) -> Array:
    """Whether some cell is set on both boards, bool ``[B]``."""
    return jnp.any(board & other != 0, axis=1)


# ------------------------------------------------------------------------------------------- Breakout

ALL_BRICKS = 2 ** (3 * SIZE) - 1


class BreakoutState(NamedTuple):
    """All ``[B]``, int32 unless said otherwise.

    ``ball_dir``: 0 up-left, 1 up-right, 2 down-right, 3 down-left. ``bricks``: bit ``3x + y - 1`` is the brick in
    column ``x`` and row ``y``, of 1 to 3. ``strike`` (bool): the ball hit a brick in the last step.
    """

    ball_y: Array
    ball_x: Array
    ball_dir: Array
    pos: Array
    bricks: Array
    strike: Array
    last_y: Array
    last_x: Array
    time: Array


def breakout(params: Any, action: ActionSpace, name: str) -> Environment:
    """Stay (0), left (1), right (2); a brick gives 1; losing the ball terminates."""

    def reset(words: Array, params: Any) -> BreakoutState:
        right = (words[0] & 1).astype(jnp.int32)
        zero = jnp.zeros_like(right)
        return BreakoutState(
            ball_y=zero + 3,
            ball_x=BOTTOM * right,
            ball_dir=2 + right,
            pos=zero + 4,
            bricks=zero + ALL_BRICKS,
            strike=zero > 0,
            last_y=zero + 3,
            last_x=BOTTOM * right,
            time=zero,
        )

    def transition(words: Array, state: BreakoutState, action: Array, params: Any) -> tuple:
        pos = jnp.clip(state.pos + (action == 2) - (action == 1), 0, BOTTOM)
        direction = state.ball_dir  # ^ 1 flips it sideways, ^ 3 up and down, ^ 2 both
        x = state.ball_x + jnp.where((direction == 1) | (direction == 2), 1, -1)
        wall = (x < 0) | (x > BOTTOM)
        x = jnp.clip(x, 0, BOTTOM)
        direction = jnp.where(wall, direction ^ 1, direction)

        y = state.ball_y + jnp.where(state.ball_dir < 2, -1, 1)
        ceiling = y < 0
        y = jnp.maximum(y, 0)
        direction = jnp.where(ceiling, direction ^ 3, direction)

        brick = jnp.where((y >= 1) & (y <= 3), 1 << (3 * x + y - 1) % 32, 0)
        touched = ~ceiling & (state.bricks & brick != 0)
        broken = touched & ~state.strike  # only every other step in a row, so that a ball cannot cut through
        bricks = jnp.where(broken, state.bricks & ~brick, state.bricks)

        low = ~touched & (y == BOTTOM)
        bricks = jnp.where(low & (bricks == 0), ALL_BRICKS, bricks)
        straight = low & (state.ball_x == pos)
        corner = low & ~straight & (x == pos)
        direction = jnp.where(broken | straight, direction ^ 3, jnp.where(corner, direction ^ 2, direction))
        stepped = BreakoutState(
            ball_y=jnp.where(broken | straight | corner, state.ball_y, y),
            ball_x=x,
            ball_dir=direction,
            pos=pos,
            bricks=bricks,
            strike=touched,
            last_y=state.ball_y,
            last_x=state.ball_x,
            time=state.time + 1,
        )
        lost = low & ~straight & ~corner
        return stepped, broken.astype(jnp.float32), lost, stepped.time >= params.max_steps_in_episode

    def observe(state: BreakoutState) -> Array:
        bricks = (state.bricks[:, None] >> 3 * jnp.arange(SIZE) & 7) << 1
        return show(
            point(state.pos, BOTTOM),
            point(state.ball_x, state.ball_y),
            point(state.last_x, state.last_y),
            bricks,
        )

    return from_batched_functions(reset, transition, observe, params, action, name, reset_words=1)


# -------------------------------------------------------------------------------------- Space Invaders

BOARD = 2**SIZE - 1  # all rows of a column


class SpaceInvadersState(NamedTuple):
    """Boards are int32 ``[B, 10]``, ``ramping`` is bool ``[B]``, the rest int32 ``[B]``."""

    pos: Array
    f_bullet_map: Array
    e_bullet_map: Array
    alien_map: Array
    alien_dir: Array
    enemy_move_interval: Array
    alien_move_timer: Array
    alien_shot_timer: Array
    ramp_index: Array
    shot_timer: Array
    ramping: Array
    time: Array


def space_invaders(params: Any, action: ActionSpace, name: str) -> Environment:
    """Stay (0), left (1), right (2), fire (3); an alien shot gives 1; being hit or reached terminates."""
    x = jnp.arange(SIZE)
    wave = jnp.where((x >= 2) & (x < 8), 0b1111, 0)  # rows 0 to 3

    def reset(words: Array, params: Any) -> SpaceInvadersState:
        zero = jnp.zeros(words.shape[1], jnp.int32)
        empty = jnp.zeros((words.shape[1], SIZE), jnp.int32)
        return SpaceInvadersState(
            pos=zero + 5,
            f_bullet_map=empty,
            e_bullet_map=empty,
            alien_map=empty + wave,
            alien_dir=zero - 1,
            enemy_move_interval=zero + params.enemy_move_interval,
            alien_move_timer=zero + params.enemy_move_interval,
            alien_shot_timer=zero + params.enemy_shot_interval,
            ramp_index=zero,
            shot_timer=zero,
            ramping=zero == 0,
            time=zero,
        )

    def transition(words: Array, state: SpaceInvadersState, action: Array, params: Any) -> tuple:
        # The cannon, then all bullets.
        fire = (action == 3) & (state.shot_timer == 0)
        shot_timer = jnp.where(fire, params.shot_cool_down, state.shot_timer)
        shot = jnp.where(fire[:, None], point(state.pos, BOTTOM), 0)
        pos = jnp.clip(state.pos + (action == 2) - (action == 1), 0, BOTTOM)
        friendly = (state.f_bullet_map | shot) >> 1
        hostile = (state.e_bullet_map << 1) & BOARD
        cannon = point(pos, BOTTOM)
        hit = meets(hostile | state.alien_map, cannon)

        # The aliens: sideways, or down and round at the border.
        move = state.alien_move_timer == 0
        aliens, direction = state.alien_map, state.alien_dir
        count = lax.population_count(aliens).sum(1)
        move_timer = jnp.where(move, jnp.minimum(count, state.enemy_move_interval), state.alien_move_timer)
        edge = jnp.where(direction < 0, aliens[:, 0], aliens[:, BOTTOM])
        turn = move & (edge != 0)
        landed = turn & jnp.any(aliens >> BOTTOM != 0, axis=1)
        down = (aliens << 1 | aliens >> BOTTOM) & BOARD
        sideways = jnp.where(direction[:, None] < 0, jnp.roll(aliens, -1, 1), jnp.roll(aliens, 1, 1))
        moved = jnp.where(turn[:, None], down, sideways)
        aliens = jnp.where(move[:, None], moved, aliens)
        direction = jnp.where(turn, -direction, direction)
        reached = move & meets(aliens, cannon)

        # The lowest alien of the nearest column shoots, of two the left one; bullets and aliens that meet vanish.
        shoot = state.alien_shot_timer == 0
        alien_shot_timer = jnp.where(shoot, params.enemy_shot_interval, state.alien_shot_timer)
        distance = 2 * jnp.abs(x - pos[:, None]) + (x > pos[:, None])
        distance = jnp.where(aliens != 0, distance, 2 * SIZE)
        nearest = (distance == distance.min(1, keepdims=True)) & shoot[:, None]
        hostile = jnp.where(nearest, hostile | _highest_bit(aliens), hostile)
        killed = aliens & friendly
        reward = lax.population_count(killed).sum(1).astype(jnp.float32)
        aliens, friendly = aliens & ~killed, friendly & ~killed

        # A wave that is cleared is followed by a faster one.
        cleared = ~jnp.any(aliens != 0, axis=1)
        ramp = cleared & state.ramping & (state.enemy_move_interval > 6)
        stepped = state._replace(
            pos=pos,
            f_bullet_map=friendly,
            e_bullet_map=hostile,
            alien_map=jnp.where(cleared[:, None], wave, aliens),
            alien_dir=direction,
            enemy_move_interval=state.enemy_move_interval - ramp,
            alien_move_timer=move_timer - 1,
            alien_shot_timer=alien_shot_timer - 1,
            ramp_index=state.ramp_index + ramp,
            shot_timer=shot_timer - (shot_timer > 0),
            time=state.time + 1,
        )
        return stepped, reward, hit | landed | reached, stepped.time >= params.max_steps_in_episode

    def observe(state: SpaceInvadersState) -> Array:
        left = state.alien_dir[:, None] < 0
        return show(
            point(state.pos, BOTTOM),
            state.alien_map,
            jnp.where(left, state.alien_map, 0),
            jnp.where(left, 0, state.alien_map),
            state.f_bullet_map,
            state.e_bullet_map,
        )

    return from_batched_functions(reset, transition, observe, params, action, name)


def _highest_bit(board: Array) -> Array:
    """Keep of each column only its lowest cell, the highest of its ten bits."""
    for shift in (1, 2, 4, 8):
        board = board | board >> shift
    return board ^ board >> 1
