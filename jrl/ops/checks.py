"""Trace-time checks of shapes and dtypes, in the caller's own names; nothing here looks at values."""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp


def same_shape(**arrays: Any) -> None:
    """Assert that all named arrays have one shape.

    Raises:
        AssertionError: they have not; the message lists every name with its shape.
    """
    listed = ", ".join(f"{name} {list(jnp.shape(array))}" for name, array in arrays.items())
    chex.assert_equal_shape(list(arrays.values()), custom_message=f"these must share one shape: {listed}")


def shape(**expected: tuple[Any, tuple[int, ...]]) -> None:
    """Assert the shape of every named array, each given as ``(array, shape)``.

    Raises:
        AssertionError: one has another shape; the message names it.
    """
    for name, (array, wanted) in expected.items():
        hint = f"{name} must have shape {list(wanted)}, got {list(jnp.shape(array))}"
        chex.assert_shape(array, wanted, custom_message=hint)


def floating(**arrays: Any) -> None:
    """Assert that every named array is floating.

    Raises:
        AssertionError: one is not; the message names it, its dtype and the fix.
    """
    for name, array in arrays.items():
        hint = f"{name} must be floating, got {jnp.result_type(array)}: cast it first"
        chex.assert_type(array, float, custom_message=hint)


def flags(**arrays: Any) -> None:
    """Assert that every named array is bool.

    Raises:
        AssertionError: one is not; the message names it and its dtype.
    """
    for name, array in arrays.items():
        hint = f"{name} must be bool, got {jnp.result_type(array)}"
        chex.assert_type(array, bool, custom_message=hint)


def selects(action: Any, scores: Any, name: str) -> None:
    """Assert that integer ``action`` ``[...]`` picks entries of ``scores`` ``[..., A]``.

    Raises:
        AssertionError: the action is not integer or its shape is not that of ``scores`` without ``A``.
    """
    chex.assert_type(action, int, custom_message=f"action must be integer, got {jnp.result_type(action)}")
    expected = jnp.shape(scores)[:-1]
    hint = f"action {list(jnp.shape(action))} must be {name} {list(jnp.shape(scores))} without its last axis"
    chex.assert_shape(action, expected, custom_message=hint)
