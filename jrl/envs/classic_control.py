"""The classic control tasks over a batch: the transitions of gymnax, step by step, several times as fast.

Parameters are gymnax's records and are read by name. Start states are drawn from the same distributions, with
other random numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jrl.envs.batched import from_batched_functions, uniform
from jrl.types import Array, Discrete, Environment


class CartPoleState(NamedTuple):
    """All ``[B]``: position (m), velocity, angle (rad), angular velocity, and steps taken (int32)."""

    x: Array
    x_dot: Array
    theta: Array
    theta_dot: Array
    time: Array


def cart_pole(params: Any, name: str = "CartPole-v1") -> Environment:
    """A pole on a cart pushed left (0) or right (1); one Euler step of ``tau`` seconds (Barto et al. 1983)."""

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

    return from_batched_functions(reset, transition, observe, params, Discrete(2), name, reset_words=4)


def columns(*vectors: Array) -> Array:
    """``[B]`` each to ``[B, D]``; stacking rows and transposing is faster than XLA's stacking of columns."""
    return jnp.stack(vectors).T
