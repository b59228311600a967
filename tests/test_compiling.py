"""How the tests themselves are compiled (tests/conftest.py)."""

import conftest
import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler


def overrides():
    """What differs from the compiler's own settings in the next program, and that it compiles with it."""
    assert jax.jit(lambda x: x * 2 + 1)(jnp.float32(3)) == 7
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    return dict(options.env_option_overrides)


@pytest.mark.skipif(conftest.ALL_OPTIMIZED, reason="JRL_TEST_OPTIMIZED=1")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs compile with few optimisations")
def test_a_test_is_compiled_with_few_optimisations():
    assert overrides() == conftest.FEW_OPTIMIZATIONS


@pytest.mark.optimized
def test_a_marked_test_is_compiled_as_for_a_user():
    assert overrides() == {}


@pytest.mark.skipif(conftest.ALL_OPTIMIZED, reason="JRL_TEST_OPTIMIZED=1")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs compile with few optimisations")
@pytest.mark.optimized
class TestAmongMarkedOnes:
    @pytest.mark.optimized(False)
    def test_a_test_may_still_be_compiled_with_few(self):
        assert overrides() == conftest.FEW_OPTIMIZATIONS


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an option of CPUs")
def test_an_option_that_the_compiler_does_not_know_is_an_error(monkeypatch):
    """So that a new compiler cannot leave the options without effect."""
    monkeypatch.setattr(conftest, "optimized", False)
    monkeypatch.setitem(conftest.FEW_OPTIMIZATIONS, "xla_cpu_no_such_option", True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_no_such_option"):
        jax.jit(lambda x: x * 3 + 1)(jnp.float32(3))
