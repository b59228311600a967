"""Algorithms, one file each: ``Config``, ``HParams``, ``State`` and ``make(env, config) -> Algorithm``."""
