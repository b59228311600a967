"""Networks: default ones for control, and adapters that make any ``init``/``apply`` pair one."""

from jrl.networks import noisy
from jrl.networks.adapters import (
    as_network,
    check_output,
    check_policy_output,
    check_q_output,
    from_nnx,
    mask_aware,
    observation_flattener,
)
from jrl.networks.cnn import CNN, PatchConv
from jrl.networks.defaults import (
    TorsoConfig,
    actor,
    actor_critic,
    critics,
    implicit_q_network,
    q_network,
)
from jrl.networks.heads import (
    Actor,
    ActorCritic,
    Ensemble,
    ImplicitQNetwork,
    PolicyHead,
    QNetwork,
    distribution,
)
from jrl.networks.mlp import ACTIVATIONS, MLP
from jrl.networks.recurrent import (
    GRU,
    WindowTransformer,
    apply_sequence,
    memory_core,
    recurrent_network,
    reset_before,
)

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "GRU",
    "MLP",
    "Actor",
    "ActorCritic",
    "Ensemble",
    "ImplicitQNetwork",
    "PatchConv",
    "PolicyHead",
    "QNetwork",
    "TorsoConfig",
    "WindowTransformer",
    "actor",
    "actor_critic",
    "apply_sequence",
    "as_network",
    "check_output",
    "check_policy_output",
    "check_q_output",
    "critics",
    "distribution",
    "from_nnx",
    "implicit_q_network",
    "mask_aware",
    "memory_core",
    "noisy",
    "observation_flattener",
    "q_network",
    "recurrent_network",
    "reset_before",
]
