"""PureJaxRL with the constant key of its DQN replaced, so that vmapped seeds are independent as jrl's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers import purejaxrl
from peers.protocol import Training


def training(algorithm: str, work: Any, source: Path) -> Training:
    return purejaxrl.training(algorithm, work, source, own_keys=True)
