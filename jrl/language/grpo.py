"""GRPO over texts, and with `--variant` PPO with a KL penalty, Dr. GRPO, RLOO or REINFORCE.

The kernel is :mod:`jrl.language.policy_gradient`; here it has the name that the command knows it by.
"""

from jrl.language.policy_gradient import Config, HParams, State, flops_per_env_step, make

__all__ = ["Config", "HParams", "State", "flops_per_env_step", "make"]
