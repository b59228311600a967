"""The mean over devices: of all of them, in whatever order and however late they come."""

import concurrent.futures
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jrl.native import mean

SHAPES = [(), (5,), (7, 11), (3, 4096), (9001,)]  # less than a vector, and more than a thread takes at a time


def values(num_devices, shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(num_devices, *shape)).astype(np.float32) for shape in shapes]


def over_devices(function, num_devices):
    """``function`` of what each device has, jitted; the results of all devices, stacked."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), "devices")

    def of_device(arrays):
        return [array[None] for array in function([array[0] for array in arrays])]

    split = PartitionSpec("devices")
    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
def test_every_device_has_the_sum_from_the_first_to_the_last_by_their_number(num_devices):
    arrays = values(num_devices)
    found = over_devices(lambda arrays: mean.mean(arrays, "devices", 0), num_devices)(arrays)
    for array, means in zip(arrays, found, strict=True):
        expected = array[0]
        for other in array[1:]:
            expected = expected + other
        np.testing.assert_array_equal(means, np.stack([expected / np.float32(num_devices)] * num_devices))


def test_what_is_not_finite_goes_where_it_was_and_nowhere_else():
    array = np.zeros((2, 40), np.float32)
    array[0, 3], array[1, 17] = np.nan, np.inf
    (found,) = over_devices(lambda arrays: mean.mean(arrays, "devices", 0), 2)([array])
    np.testing.assert_array_equal(found, np.stack([array.sum(0) / 2] * 2))


def test_devices_that_come_late_are_waited_for():
    """One of three comes 20 ms after the others, another one each time: who waits has long given its thread back."""

    def late(rank, now):
        time.sleep(0.02 * float(rank == now % 3))
        return np.float32(0)

    def program(arrays):
        rank = jax.lax.axis_index("devices")

        def step(arrays, now):
            delay = jax.pure_callback(late, jax.ShapeDtypeStruct((), jnp.float32), rank, now)
            return mean.mean([(rank + 1) * array + delay for array in arrays], "devices", 0), None

        return jax.lax.scan(step, arrays, jnp.arange(6))[0]

    arrays = [array[:1].repeat(3, axis=0) for array in values(3)]
    for array, found in zip(arrays, over_devices(program, 3)(arrays), strict=True):
        np.testing.assert_allclose(found, array * 2**6, rtol=1e-5)  # the mean of 1, 2 and 3


def test_programs_that_run_at_once_do_not_meet():
    """Of the same site, as two runs of one program have it."""

    def program(arrays):
        def step(arrays, _):
            return mean.mean(arrays, "devices", 0), None

        return jax.lax.scan(step, arrays, None, length=50)[0]

    compiled = over_devices(program, 2)
    several = [values(2, seed=seed) for seed in range(4)]
    expected = [[np.stack([array.sum(0) / 2] * 2) for array in arrays] for arrays in several]
    jax.block_until_ready(compiled(several[0]))
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            for found, arrays in zip(threads.map(compiled, several), expected, strict=True):
                for a, b in zip(found, arrays, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-6)
