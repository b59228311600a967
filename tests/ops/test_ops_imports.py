import subprocess
import sys

import jrl.ops

HEAVY = ("gymnax", "flax", "optax", "matplotlib", "pandas", "distrax", "orbax")


def test_ops_load_only_jax_and_chex():
    code = f"import sys, jrl.ops; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    assert len(set(jrl.ops.__all__)) == len(jrl.ops.__all__)
    for name in jrl.ops.__all__:
        assert getattr(jrl.ops, name).__doc__, name
