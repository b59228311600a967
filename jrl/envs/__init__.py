"""Environments: :func:`make` by id, wrappers as functions, probes with known values.

gymnax is imported when an environment of it is first asked for, never by importing this module.
"""

from jrl.envs import (
    blackjack,
    classic_tabular,
    counterexamples,
    grid_world,
    navigation,
    probes,
    text,
    traffic_light,
)
from jrl.envs.build import from_functions, strict
from jrl.envs.enumeration import to_mdp
from jrl.envs.finite import FiniteModel, Outcomes, Start, from_mdp, from_outcomes
from jrl.envs.normalizing import normalize_observation, normalize_reward
from jrl.envs.observations import (
    action_mask,
    flatten_observation,
    frame_stack,
    one_hot_observation,
    transform_observation,
)
from jrl.envs.registry import DOWNLOADS, ids, make, register, register_with_gymnax
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
    "FiniteModel",
    "Outcomes",
    "Start",
    "action_mask",
    "blackjack",
    "classic_tabular",
    "clip_action",
    "clip_reward",
    "counterexamples",
    "discretize_actions",
    "flatten_observation",
    "frame_stack",
    "from_functions",
    "from_mdp",
    "from_outcomes",
    "grid_world",
    "ids",
    "make",
    "navigation",
    "normalize_observation",
    "normalize_reward",
    "one_hot_observation",
    "probes",
    "register",
    "register_with_gymnax",
    "rescale_action",
    "scale_reward",
    "sticky_actions",
    "strict",
    "text",
    "time_limit",
    "to_mdp",
    "traffic_light",
    "transform_action",
    "transform_observation",
    "vectorize",
]
