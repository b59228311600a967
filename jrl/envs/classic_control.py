"""The classic control tasks over a batch: the transitions of gymnax, step by step, several times as fast.

Parameters are gymnax's records and are read by name. Start states are drawn from the same distributions, with
other random numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jrl.envs.batched import from_batched_functions, settle, uniform
from jrl.types import ActionSpace, Array, Environment


def columns(*vectors: Array) -> Array:
    """``[B]`` each to ``[B, D]``; stacking rows and transposing is faster than XLA's stacking of columns."""
    return jnp.stack(vectors).T


# ------------------------------------------------------------------------------------------- CartPole


class CartPoleState(NamedTuple):
    """All ``[B]``: position (m), velocity, angle (rad), angular velocity, and steps taken (int32)."""

    x: Array
    x_dot: Array
    theta: Array
    theta_dot: Array
    time: Array


def cart_pole(params: Any, action: ActionSpace, name: str) -> Environment:
    """A pole on a cart pushed left (0) or right (1); one Euler step of ``tau`` seconds (Barto et al. 1983).

    As in gymnax ``total_mass`` and ``polemass_length`` are parameters of their own, which ``masscart``, ``masspole``
    and ``length`` do not change: ``masscart`` has no effect.
    """

    def reset(words: Array, params: Any) -> CartPoleState:
        x, x_dot, theta, theta_dot = uniform(words, -0.05, 0.05)
        return CartPoleState(x, x_dot, theta, theta_dot, jnp.zeros(words.shape[1], jnp.int32))

    def fallen(state: CartPoleState, params: Any) -> Array:
        return (jnp.abs(state.x) > params.x_threshold) | (
            jnp.abs(state.theta) > params.theta_threshold_radians
        )

    def transition(words: Array, state: CartPoleState, action: Array, params: Any) -> tuple:
        x, x_dot, theta, theta_dot, time = state
        force = params.force_mag * action - params.force_mag * (1 - action)
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        push = (force + params.polemass_length * theta_dot**2 * sin) / params.total_mass
        theta_acc = (params.gravity * sin - cos * push) / (
            params.length * (4.0 / 3.0 - params.masspole * cos**2 / params.total_mass)
        )
        x_acc = push - params.polemass_length * theta_acc * cos / params.total_mass
        stepped = CartPoleState(
            x=x + params.tau * x_dot,
            x_dot=x_dot + params.tau * x_acc,
            theta=theta + params.tau * theta_dot,
            theta_dot=theta_dot + params.tau * theta_acc,
            time=time + 1,
        )
        # As in gymnax: the step that falls is rewarded, one from a state already fallen is not.
        reward = 1.0 - fallen(state, params)
        return stepped, reward, fallen(stepped, params), stepped.time >= params.max_steps_in_episode

    def observe(state: CartPoleState) -> Array:
        return columns(*state[:4])

    return from_batched_functions(reset, transition, observe, params, action, name, reset_words=4)


# ---------------------------------------------------------------------------------------- MountainCar


class MountainCarState(NamedTuple):
    """All ``[B]``: position, velocity (a step), and steps taken (int32)."""

    position: Array
    velocity: Array
    time: Array


def mountain_car(params: Any, action: ActionSpace, name: str) -> Environment:
    """A car in a valley pushed left (0), not (1) or right (2), until it reaches the goal (Moore 1990)."""

    def transition(words: Array, state: MountainCarState, action: Array, params: Any) -> tuple:
        position, velocity = _roll(state, (action - 1) * params.force, params)
        stopped = (position == params.min_position) & (velocity < 0)
        stepped = MountainCarState(position, jnp.where(stopped, 0.0, velocity), state.time + 1)
        reward = jnp.full(position.shape, -1.0)
        return stepped, reward, _arrived(stepped, params), stepped.time >= params.max_steps_in_episode

    return from_batched_functions(
        _in_the_valley, transition, _position_and_velocity, params, action, name, reset_words=1
    )


def continuous_mountain_car(params: Any, action: ActionSpace, name: str) -> Environment:
    """The same with a force in [-1, 1], which costs a tenth of its square; the goal gives 100."""

    def transition(words: Array, state: MountainCarState, action: Array, params: Any) -> tuple:
        action = action[:, 0]
        force = jnp.clip(action, params.min_action, params.max_action) * params.power
        position, velocity = _roll(state, force, params)
        # gymnax stops the car at the goal, where others stop it at the left wall.
        stopped = (position >= params.goal_position) & (velocity < 0)
        stepped = MountainCarState(position, jnp.where(stopped, 0.0, velocity), state.time + 1)
        arrived = (position >= params.goal_position) & (stepped.velocity >= params.goal_velocity)
        reward = -0.1 * action**2 + 100.0 * arrived
        return stepped, reward, _arrived(stepped, params), stepped.time >= params.max_steps_in_episode

    return from_batched_functions(
        _in_the_valley, transition, _position_and_velocity, params, action, name, reset_words=1
    )


def _in_the_valley(words: Array, params: Any) -> MountainCarState:
    position = uniform(words[0], -0.6, -0.4)
    return MountainCarState(position, jnp.zeros_like(position), jnp.zeros(position.shape, jnp.int32))


def _roll(state: MountainCarState, force: Array, params: Any) -> tuple[Array, Array]:
    velocity = state.velocity + force - jnp.cos(3 * state.position) * params.gravity
    velocity = jnp.clip(velocity, -params.max_speed, params.max_speed)
    return jnp.clip(state.position + velocity, params.min_position, params.max_position), velocity


def _arrived(state: MountainCarState, params: Any) -> Array:
    return (state.position >= params.goal_position) & (state.velocity >= params.goal_velocity)


def _position_and_velocity(state: MountainCarState) -> Array:
    return columns(state.position, state.velocity)


# ------------------------------------------------------------------------------------------- Pendulum


class PendulumState(NamedTuple):
    """All ``[B]``: angle from upright (rad), angular velocity, last torque, and steps taken (int32)."""

    theta: Array
    theta_dot: Array
    last_u: Array
    time: Array


def pendulum(params: Any, action: ActionSpace, name: str) -> Environment:
    """Swing a pendulum up with too weak a torque; the reward is minus a cost, no state is terminal."""

    def reset(words: Array, params: Any) -> PendulumState:
        zero = jnp.zeros(words.shape[1], jnp.int32)
        theta, theta_dot = uniform(words[0], -jnp.pi, jnp.pi), uniform(words[1], -1.0, 1.0)
        return PendulumState(theta, theta_dot, jnp.zeros_like(theta), zero)

    def transition(words: Array, state: PendulumState, action: Array, params: Any) -> tuple:
        u = jnp.clip(action[:, 0], -params.max_torque, params.max_torque)
        angle = (state.theta + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = angle**2 + 0.1 * state.theta_dot**2 + 0.001 * u**2
        gravity = 3 * params.g / (2 * params.l) * jnp.sin(state.theta)
        theta_dot = state.theta_dot + (gravity + 3.0 / (params.m * params.l**2) * u) * params.dt
        theta_dot = jnp.clip(theta_dot, -params.max_speed, params.max_speed)
        stepped = PendulumState(state.theta + theta_dot * params.dt, theta_dot, u, state.time + 1)
        return stepped, -cost, jnp.zeros(u.shape, bool), stepped.time >= params.max_steps_in_episode

    def observe(state: PendulumState) -> Array:
        return columns(jnp.cos(state.theta), jnp.sin(state.theta), state.theta_dot)

    return from_batched_functions(reset, transition, observe, params, action, name, reset_words=2)


# -------------------------------------------------------------------------------------------- Acrobot


class AcrobotState(NamedTuple):
    """All ``[B]``: two joint angles (rad), their velocities, and steps taken (int32)."""

    joint_angle1: Array
    joint_angle2: Array
    velocity_1: Array
    velocity_2: Array
    time: Array


def acrobot(params: Any, action: ActionSpace, name: str) -> Environment:
    """Swing the lower of two links above the bar with a torque between them (Sutton 1996, the book's form)."""

    def reset(words: Array, params: Any) -> AcrobotState:
        angle1, angle2, velocity_1, velocity_2 = uniform(words, -0.1, 0.1)
        return AcrobotState(angle1, angle2, velocity_1, velocity_2, jnp.zeros(words.shape[1], jnp.int32))

    def derivative(y: tuple, torque: Array, p: Any) -> tuple:
        angle1, angle2, velocity_1, velocity_2 = y
        m2, l1, lc1, lc2 = p.link_mass_2, p.link_length_1, p.link_com_pos_1, p.link_com_pos_2
        moi, g, half_pi = p.link_moi, 9.8, jnp.pi / 2
        cos, sin, pull1, pull2 = settle(
            (jnp.cos(angle2), jnp.sin(angle2), jnp.cos(angle1 - half_pi), jnp.cos(angle1 + angle2 - half_pi))
        )
        d1 = p.link_mass_1 * lc1**2 + m2 * (l1**2 + lc2**2 + 2 * l1 * lc2 * cos) + 2 * moi
        d2 = m2 * (lc2**2 + l1 * lc2 * cos) + moi
        phi2 = m2 * lc2 * g * pull2
        phi1 = (
            -m2 * l1 * lc2 * (velocity_2**2 + 2 * velocity_2 * velocity_1) * sin
            + (p.link_mass_1 * lc1 + m2 * l1) * g * pull1
            + phi2
        )
        acceleration_2 = (torque + d2 / d1 * phi1 - m2 * l1 * lc2 * velocity_1**2 * sin - phi2) / (
            m2 * lc2**2 + moi - d2**2 / d1
        )
        acceleration_1 = -(d2 * acceleration_2 + phi1) / d1
        return velocity_1, velocity_2, *settle((acceleration_1, acceleration_2))

    def transition(words: Array, state: AcrobotState, action: Array, params: Any) -> tuple:
        noise = uniform(words[0], -params.torque_noise_max, params.torque_noise_max)
        torque = params.available_torque[action] + noise

        def moved(slope: tuple, dt: Any) -> tuple:
            return tuple(y + dt * k for y, k in zip(state[:4], slope, strict=True))

        k1 = derivative(state[:4], torque, params)
        k2 = derivative(moved(k1, params.dt / 2), torque, params)
        k3 = derivative(moved(k2, params.dt / 2), torque, params)
        k4 = derivative(moved(k3, params.dt), torque, params)
        mean = tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
        angle1, angle2, velocity_1, velocity_2 = moved(mean, params.dt)
        stepped = AcrobotState(
            joint_angle1=_wrapped(angle1),
            joint_angle2=_wrapped(angle2),
            velocity_1=jnp.clip(velocity_1, -params.max_vel_1, params.max_vel_1),
            velocity_2=jnp.clip(velocity_2, -params.max_vel_2, params.max_vel_2),
            time=state.time + 1,
        )
        above = -jnp.cos(stepped.joint_angle1) - jnp.cos(stepped.joint_angle2 + stepped.joint_angle1) > 1.0
        return stepped, above - 1.0, above, stepped.time >= params.max_steps_in_episode

    def observe(state: AcrobotState) -> Array:
        angle1, angle2, velocity_1, velocity_2, _ = state
        return columns(
            jnp.cos(angle1), jnp.sin(angle1), jnp.cos(angle2), jnp.sin(angle2), velocity_1, velocity_2
        )

    return from_batched_functions(
        reset, transition, observe, params, action, name, reset_words=4, step_words=1
    )


def _wrapped(angle: Array) -> Array:
    turn = 2 * jnp.pi
    down = jnp.where(angle >= jnp.pi, jnp.floor((angle - jnp.pi) / turn + 1), 0.0)
    up = jnp.where(angle < -jnp.pi, jnp.ceil((-jnp.pi - angle) / turn), 0.0)
    return angle + (up - down) * turn
