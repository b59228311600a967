"""Sweeps: seeds, hyperparameters and environment parameters side by side, in one compiled program."""

from jrl.sweep.batching import batch
from jrl.sweep.members import broadcast, concatenate, grid, names, product, random, seeds, size, varying
from jrl.sweep.planning import Plan
from jrl.sweep.runner import Finished, execute, load, plan, resume, run
from jrl.sweep.search import PBT, Halving, exploit_and_explore
from jrl.sweep.spaces import choice, loguniform, normal, parse, uniform

__all__ = [
    "PBT",
    "Finished",
    "Halving",
    "Plan",
    "batch",
    "broadcast",
    "choice",
    "concatenate",
    "execute",
    "exploit_and_explore",
    "grid",
    "load",
    "loguniform",
    "names",
    "normal",
    "parse",
    "plan",
    "product",
    "random",
    "resume",
    "run",
    "seeds",
    "size",
    "uniform",
    "varying",
]
