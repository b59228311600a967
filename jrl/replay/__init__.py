"""Replay buffers: pure functions over rings that XLA updates in place."""

from jrl.replay import prioritized, sequence, sum_tree, uniform
from jrl.replay.prioritized import PrioritizedState
from jrl.replay.uniform import Sample, UniformState, num_rows

__all__ = [
    "PrioritizedState",
    "Sample",
    "UniformState",
    "num_rows",
    "prioritized",
    "sequence",
    "sum_tree",
    "uniform",
]
