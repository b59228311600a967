"""Environments: :func:`make` by id, wrappers as functions, probes with known values.

gymnax is imported when an environment of it is first asked for, never by importing this module.
"""

from jrl.envs import probes
from jrl.envs.build import from_functions, strict
from jrl.envs.normalizing import normalize_observation, normalize_reward
from jrl.envs.observations import (
    action_mask,
    flatten_observation,
    frame_stack,
    one_hot_observation,
    transform_observation,
)
from jrl.envs.registry import DOWNLOADS, ids, make, register
from jrl.envs.wrappers import (
    clip_action,
    clip_reward,
    discretize_actions,
    rescale_action,
    scale_reward,
    sticky_actions,
    time_limit,
    transform_action,
    vectorize,
)

__all__ = [
    "DOWNLOADS",
    "action_mask",
    "clip_action",
    "clip_reward",
    "discretize_actions",
    "flatten_observation",
    "frame_stack",
    "from_functions",
    "ids",
    "make",
    "normalize_observation",
    "normalize_reward",
    "one_hot_observation",
    "probes",
    "register",
    "rescale_action",
    "scale_reward",
    "sticky_actions",
    "strict",
    "time_limit",
    "transform_action",
    "transform_observation",
    "vectorize",
]
