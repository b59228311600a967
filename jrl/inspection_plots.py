"""Figures of what a policy has learned: ``jrl inspect``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jrl import driver, inspection, normalize, ops, plots, records
from jrl.envs.grid_world import FREE
from jrl.types import Array


def inspect(
    path: str | os.PathLike, *, num_steps: int = 200, seed: int = 0, step: int | None = None
) -> list[Path]:
    """Draw what the policy of a run folder expects: along an episode, and on a grid.

    Args:
        path: the run folder; ``episode.png``, and for a GridWorld-jrl ``grid.png``, are written into it.
        num_steps: of the episode (of several, where they are shorter).
        seed: of the episode.
        step: the checkpoint; the newest by default.

    Returns:
        The files.

    Raises:
        RunError, CheckpointError: as :func:`jrl.driver.load`.
        ValueError: the policy tells no value, ``num_steps`` is not in 1 … 2³¹ − 1, or ``seed`` not in 0 … 2³² − 1.
    """
    driver.check_numbers(num_steps=num_steps, seed=seed)
    loaded, record = driver.load(path, step), records.read_run(path)
    driver.warn_of_other_sources(record, loaded.env, path)
    policy = loaded.algo.policy(loaded.state)
    in_rewards = _unit(loaded.hparams, loaded.state)
    follow = jax.jit(
        lambda key, policy: inspection.follow(
            key,
            loaded.env,
            policy,
            num_steps=num_steps,
            gamma=getattr(loaded.hparams, "gamma", 1.0),
            gae_lambda=getattr(loaded.hparams, "gae_lambda", 0.95),
            params=getattr(loaded.hparams, "env", None),
            in_rewards=in_rewards,
        )
    )
    files = [Path(path) / "episode.png"]
    episode_figure(jax.device_get(follow(jax.random.key(seed), policy)), out=files[0])
    if loaded.env.name == "GridWorld-jrl":
        kwargs = record["environment"]["kwargs"]
        rows, columns = kwargs.get("rows", 4), kwargs.get("columns", 4)
        num_cells = rows * columns
        cells = jnp.arange(num_cells) if kwargs.get("raw") else jnp.eye(num_cells)
        action, _, extras = policy(jax.random.key(seed), cells, policy.init_memory((num_cells,)))
        value = extras["value"] if "value" in extras else extras["q"].max(-1)
        given = getattr(loaded.hparams, "env", None)
        # Nobody acts in a wall, a goal or a trap: what is learned elsewhere says nothing of it.
        free = np.asarray((loaded.env.params if given is None else given).cells) == FREE
        files.append(Path(path) / "grid.png")
        grid_figure(
            np.where(free, np.asarray(in_rewards(value)), np.nan).reshape(rows, columns),
            np.where(free[:, None], inspection.ARROWS[np.asarray(action)], np.nan).reshape(rows, columns, 2),
            out=files[1],
        )
    return files


def _unit(hparams: Any, state: Any) -> Callable[[Array], Array]:
    """Return what takes the values that a policy tells to the unit of its rewards."""
    if hasattr(hparams, "rescale_eps"):
        return lambda q: ops.unscale_value(q, hparams.rescale_eps)
    scaling = getattr(state, "reward_scaling", ())
    if isinstance(scaling, normalize.RewardScaling):
        return lambda value: value * normalize.reward_scale(scaling)
    return lambda value: value


def episode_figure(episode: Any, *, out: str | os.PathLike | None = None) -> Figure:
    """Plot value, reward and advantage of an :class:`~jrl.inspection.Episode` over its steps."""
    figure = plots.new_figure(7.0, 5.0)
    axes = figure.subplots(3, 1, sharex=True)
    for one, name, colour in zip(axes, ("value", "reward", "advantage"), plots.COLOURS, strict=False):
        one.plot(getattr(episode, name), color=colour, linewidth=1.2)
        one.set_ylabel(name)
        plots.plain(one)
        for end in np.flatnonzero(episode.terminated | episode.truncated):
            one.axvline(end + 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("environment step (dotted: an episode ends)")
    plots.save(figure, out)
    return figure


def grid_figure(value: np.ndarray, arrows: np.ndarray, *, out: str | os.PathLike | None = None) -> Figure:
    """Plot ``value [rows, columns]`` as a heat map under the policy's ``arrows [rows, columns, 2]``; NaN is grey."""
    rows, columns = value.shape
    figure = plots.new_figure(1.5 + 0.6 * columns, 1.0 + 0.6 * rows)
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(value, cmap="cividis")
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    axes.quiver(
        x, y, arrows[..., 0], arrows[..., 1], angles="xy", pivot="mid", color="white", scale=2.2 * columns
    )
    axes.set_xticks([])
    axes.set_yticks([])
    if np.isnan(value).any():
        axes.set_xlabel("grey: walls, goals, traps", fontsize=9)
    figure.colorbar(image, ax=axes, label="value")
    plots.save(figure, out)
    return figure
