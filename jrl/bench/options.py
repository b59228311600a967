"""The flags of ``jrl bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

MIN_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured and how; beside it every field of the algorithm's Config is a flag."""

    algo: Literal["ppo", "dqn"] = "ppo"
    """Algorithm; it also decides which settings there are."""
    env: str = "CartPole-v1"
    """Environment id; `jrl envs` lists them."""
    num_envs: tuple[int, ...] = ()
    """Environments side by side; several values are measured in turn. Default: the algorithm's own."""
    members: tuple[int, ...] = (1, 8)
    """Seeds side by side, for sweep (of the first --num-envs) and, the largest of them, for memory."""
    capacities: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Transitions the replay holds at least, for replay; rounded up to whole blocks of steps."""
    repeats: int = MIN_REPEATS
    """Timed repeats after a warm-up, at least five."""
    seconds: float = 0.5
    """Least length of a repeat; how much is computed in it follows from that."""
    json: Path | None = None
    """File to which each result is appended as a JSON line."""
    plot: Path | None = None
    """PNG of steps per second over environments and over seeds."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "members", "capacities"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1.")
        for name in ("members", "capacities"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: needs at least one value.")
        if self.repeats < MIN_REPEATS:
            raise ValueError(
                f"--repeats {self.repeats}: must be at least {MIN_REPEATS}, or the median and its spread say "
                "little; for a quick look lower --seconds instead."
            )
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds {self.seconds}: must be above 0 and finite.")
        if self.json is not None and self.json.is_dir():
            raise ValueError(f"--json {self.json}: is a folder; name a file in it.")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise ValueError(f"--plot {self.plot}: must end in .png.")
