"""jrl: reinforcement-learning kernels as pure functions in JAX.

Names are resolved on first use (PEP 562), so that ``import jrl`` costs nothing and ``import jrl.ops`` loads
only jax and chex.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> (module, attribute or None for the module itself)
_EXPORTS: dict[str, tuple[str, str | None]] = {
    # ring 0
    "ops": ("jrl.ops", None),
    "types": ("jrl.types", None),
    # ring 1
    "envs": ("jrl.envs", None),
    "make": ("jrl.envs", "make"),
    "networks": ("jrl.networks", None),
    "replay": ("jrl.replay", None),
    "rollout": ("jrl.rollout", None),
    "normalize": ("jrl.normalize", None),
    "optim": ("jrl.optim", None),
    # ring 2
    "grpo": ("jrl.language.grpo", None),
    "language": ("jrl.language", None),
    "token_dqn": ("jrl.language.token_dqn", None),
    "train": ("jrl.training", "train"),
    "evaluate": ("jrl.training", "evaluate"),
    "EpisodeStats": ("jrl.training", "EpisodeStats"),
    "parallel": ("jrl.parallel", None),
    "inspection": ("jrl.inspection", None),
    "meta": ("jrl.meta", None),
    "stages": ("jrl.stages", None),
    "warm_start": ("jrl.stages", "warm_start"),
    # ring 3
    "sweep": ("jrl.sweep", None),
    "run": ("jrl.driver", "run"),
    "resume": ("jrl.driver", "resume"),
    "checkpoint": ("jrl.checkpoint", None),
    "testing": ("jrl.testing", None),
    # records
    "Algorithm": ("jrl.types", "Algorithm"),
    "Environment": ("jrl.types", "Environment"),
    "TimeStep": ("jrl.types", "TimeStep"),
    "Transition": ("jrl.types", "Transition"),
    "Policy": ("jrl.types", "Policy"),
    "Network": ("jrl.types", "Network"),
    "Discrete": ("jrl.types", "Discrete"),
    "MultiDiscrete": ("jrl.types", "MultiDiscrete"),
    "Box": ("jrl.types", "Box"),
}

# The algorithms by name, all that the command needs to know of one: each file of jrl/algos is one, but for what they
# share.
_SHARED = ("checks", "exploration", "off_policy", "on_policy", "planning", "q_functions")
_ALGORITHMS = {
    file.name: f"jrl.algos.{file.name}"
    for file in pkgutil.iter_modules([os.path.join(os.path.dirname(__file__), "algos")])
    if file.name not in _SHARED
}
_EXPORTS |= {name: (module, None) for name, module in _ALGORITHMS.items()}
_ALGORITHMS |= {name: _EXPORTS[name][0] for name in ("grpo", "token_dqn")}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'jrl' has no attribute {name!r}") from None
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from jrl import (
        checkpoint,
        envs,
        inspection,
        language,
        meta,
        networks,
        normalize,
        ops,
        optim,
        parallel,
        replay,
        rollout,
        stages,
        sweep,
        testing,
        types,
    )
    from jrl.algos import (
        a2c,
        dqn,
        linear,
        maml,
        monte_carlo,
        ppo,
        pqn,
        r2d2,
        rainbow,
        reinforce,
        sac,
        tabular,
        td3,
    )
    from jrl.driver import resume, run
    from jrl.envs import make
    from jrl.language import grpo, token_dqn
    from jrl.stages import warm_start
    from jrl.training import EpisodeStats, evaluate, train
    from jrl.types import (
        Algorithm,
        Box,
        Discrete,
        Environment,
        MultiDiscrete,
        Network,
        Policy,
        TimeStep,
        Transition,
    )
