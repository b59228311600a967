"""Token DQN over texts, and with `--variant` ILQL.

The kernel is :mod:`jrl.language.token_q`; here it has the name that the command knows it by.
"""

from jrl.language.token_q import Config, HParams, State, flops_per_env_step, make

__all__ = ["Config", "HParams", "State", "flops_per_env_step", "make"]
