"""Returns against loops written from the equations, against each other, and against pinned numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import ops

T, A, GAMMA, LAMBDA = 13, 4, 0.9, 0.7
BATCH_SHAPES = [(), (3,), (2, 3)]


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def window(seed, batch, length=T):
    """One random window; where no episode ends, the successor's value is that of the next row."""
    rng = np.random.default_rng(seed)
    shape = (length, *batch)
    terminated, truncated = rng.random(shape) < 0.2, rng.random(shape) < 0.2
    terminated[length // 2] = truncated[length // 2] = True
    value, next_value = rng.normal(size=shape), rng.normal(size=shape)
    inside = ~(terminated | truncated)[:-1]
    next_value[:-1] = np.where(inside, value[1:], next_value[:-1])
    data = {
        "reward": rng.normal(size=shape),
        "value": value,
        "next_value": next_value,
        "log_rho": 0.7 * rng.normal(size=shape),
        "next_q": rng.normal(size=(*shape, A)),
    }
    data = {name: x.astype(np.float32) for name, x in data.items()}
    return data | {"terminated": terminated, "truncated": truncated, "greedy": rng.random(shape) < 0.6}


def columns(data):
    """Every batch entry on its own, as float64 ``[T]`` rows."""
    batch = data["reward"].shape[1:]
    for index in np.ndindex(*batch):
        yield index, {k: v[(slice(None), *index)].astype(np.float64) for k, v in data.items()}


def from_oracle(oracle, data):
    out = np.zeros(data["reward"].shape)
    for index, column in columns(data):
        out[(slice(None), *index)] = oracle(column)
    return out


def arguments(data, *names):
    return [jnp.asarray(data[name]) for name in names]


FLAGS = ("terminated", "truncated")


# ----------------------------------------------------------------------------------------------- oracles


def gae_oracle(d, gamma=GAMMA, lam=LAMBDA):
    out = np.zeros(len(d["reward"]))
    for t in range(len(out)):
        weight = 1.0
        for u in range(t, len(out)):
            bootstrap = 0.0 if d["terminated"][u] else d["next_value"][u]
            out[t] += weight * (d["reward"][u] + gamma * bootstrap - d["value"][u])
            if d["terminated"][u] or d["truncated"][u]:
                break
            weight *= gamma * lam
    return out


def n_step_oracle(d, n, gamma=GAMMA):
    out = np.zeros(len(d["reward"]))
    for t in range(len(out)):
        for k in range(1, n + 1):
            u = t + k - 1
            out[t] += gamma ** (k - 1) * d["reward"][u]
            if d["terminated"][u]:
                break
            if k == n or d["truncated"][u] or u == len(out) - 1:
                out[t] += gamma**k * d["next_value"][u]
                break
    return out


def lambda_oracle(d, weight_of_next, gamma=GAMMA):
    """Recursion with a weight per row; ``weight_of_next[t]`` multiplies the return of row t+1."""
    out = np.zeros(len(d["reward"]))
    for t in reversed(range(len(out))):
        if d["terminated"][t]:
            out[t] = d["reward"][t]
        elif d["truncated"][t] or t == len(out) - 1:
            out[t] = d["reward"][t] + gamma * d["next_value"][t]
        else:
            mixed = (1 - weight_of_next[t]) * d["next_value"][t] + weight_of_next[t] * out[t + 1]
            out[t] = d["reward"][t] + gamma * mixed
    return out


def vtrace_oracle(d, gamma=GAMMA, lam=LAMBDA, clip_rho=1.3, clip_c=0.9, clip_pg_rho=1.1):
    """The paper's sum over products, not the recursion."""
    rho, length = np.exp(d["log_rho"]), len(d["reward"])
    end = (d["terminated"] + d["truncated"]) > 0
    live = 1 - d["terminated"]
    target = d["value"].copy()
    for s in range(length):
        product = 1.0
        for t in range(s, length):
            delta = d["reward"][t] + gamma * live[t] * d["next_value"][t] - d["value"][t]
            target[s] += gamma ** (t - s) * product * min(clip_rho, rho[t]) * delta
            if end[t]:
                break
            product *= lam * min(clip_c, rho[t])
    advantage = np.zeros(length)
    for s in range(length):
        following = d["next_value"][s] if end[s] or s == length - 1 else target[s + 1]
        q = d["reward"][s] + gamma * live[s] * following
        advantage[s] = min(clip_pg_rho, rho[s]) * (q - d["value"][s])
    return target, advantage


def retrace_oracle(d, gamma=GAMMA, lam=LAMBDA):
    """Equation 3 of the paper: a sum of errors weighted by products over the actions after the first."""
    length = len(d["reward"])
    out = d["value"].copy()  # here Q(s, a) of the action taken
    for s in range(length):
        product = 1.0
        for t in range(s, length):
            if t > s:
                product *= lam * min(1.0, np.exp(d["log_rho"][t]))
            bootstrap = 0.0 if d["terminated"][t] else d["next_value"][t]
            out[s] += gamma ** (t - s) * product * (d["reward"][t] + gamma * bootstrap - d["value"][t])
            if d["terminated"][t] or d["truncated"][t]:
                break
    return out


def close(actual, desired):
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=2e-5, atol=2e-5)


# ------------------------------------------------------------------------------------- against the oracles


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_gae(batch):
    data = window(0, batch)
    args = arguments(data, "reward", "value", "next_value", *FLAGS)
    advantage, target = jax.jit(functools.partial(ops.gae, gamma=GAMMA, gae_lambda=LAMBDA))(*args)
    expected = from_oracle(gae_oracle, data)
    close(advantage, expected)
    close(target, expected + data["value"])


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_lambda_returns_and_discounted_returns(batch):
    data = window(1, batch)
    args = arguments(data, "reward", "next_value", *FLAGS)

    @jax.jit
    def both(*args):
        return (
            ops.lambda_returns(*args, gamma=GAMMA, lambda_=LAMBDA),
            ops.discounted_returns(*args, gamma=GAMMA),
        )

    mixed, monte_carlo = both(*args)
    close(mixed, from_oracle(lambda d: lambda_oracle(d, np.full(T, LAMBDA)), data))
    close(monte_carlo, from_oracle(lambda d: n_step_oracle(d, T), data))


@pytest.mark.parametrize("n", [1, 2, 3, T, T + 5])
def test_n_step_returns(n):
    data = window(2, (3,))
    args = arguments(data, "reward", "next_value", *FLAGS)
    actual = jax.jit(functools.partial(ops.n_step_returns, gamma=GAMMA, n=n))(*args)
    close(actual, from_oracle(lambda d: n_step_oracle(d, n), data))


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_vtrace(batch):
    data = window(3, batch)
    args = arguments(data, "reward", "value", "next_value", *FLAGS, "log_rho")
    numbers = {"gamma": GAMMA, "lambda_": LAMBDA, "clip_rho": 1.3, "clip_c": 0.9, "clip_pg_rho": 1.1}
    target, advantage = jax.jit(functools.partial(ops.vtrace, **numbers))(*args)
    close(target, from_oracle(lambda d: vtrace_oracle(d)[0], data))
    close(advantage, from_oracle(lambda d: vtrace_oracle(d)[1], data))


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_retrace(batch):
    data = window(4, batch)
    args = arguments(data, "reward", "value", "next_value", *FLAGS, "log_rho")
    actual = jax.jit(functools.partial(ops.retrace, gamma=GAMMA, lambda_=LAMBDA))(*args)
    close(actual, from_oracle(retrace_oracle, data))


@pytest.mark.parametrize("batch", BATCH_SHAPES)
def test_q_lambda_of_peng_and_of_watkins(batch):
    data = window(5, batch)
    data["next_value"] = data["next_q"].max(-1)
    next_q = data.pop("next_q")
    args = (jnp.asarray(data["reward"]), jnp.asarray(next_q))
    flags = arguments(data, *FLAGS)

    @jax.jit
    def both(reward, next_q, greedy, flags):
        numbers = {"gamma": GAMMA, "lambda_": LAMBDA}
        return (
            ops.q_lambda(reward, next_q, *flags, **numbers),
            ops.watkins_q_lambda(reward, next_q, greedy, *flags, **numbers),
        )

    peng, watkins = both(*args, jnp.asarray(data["greedy"]), flags)
    close(peng, from_oracle(lambda d: lambda_oracle(d, np.full(T, LAMBDA)), data))
    close(watkins, from_oracle(lambda d: lambda_oracle(d, LAMBDA * np.append(d["greedy"][1:], 1.0)), data))


# --------------------------------------------------------------------------------------------- identities


def test_lambda_zero_is_td_and_lambda_one_is_monte_carlo():
    data = window(6, (3,))
    r, v, nv, term, trunc = args = arguments(data, "reward", "value", "next_value", *FLAGS)
    without_v = (r, nv, term, trunc)
    td = r + GAMMA * jnp.where(term, 0, nv)
    monte_carlo = ops.discounted_returns(*without_v, gamma=GAMMA)
    close(ops.gae(*args, gamma=GAMMA, gae_lambda=0.0)[0], td - v)
    close(ops.lambda_returns(*without_v, gamma=GAMMA, lambda_=0.0), td)
    close(ops.n_step_returns(*without_v, gamma=GAMMA, n=1), td)
    close(ops.gae(*args, gamma=GAMMA, gae_lambda=1.0)[1], monte_carlo)
    close(ops.n_step_returns(*without_v, gamma=GAMMA, n=T), monte_carlo)
    close(
        ops.gae(*args, gamma=GAMMA, gae_lambda=LAMBDA)[1],
        ops.lambda_returns(*without_v, gamma=GAMMA, lambda_=LAMBDA),
    )


def test_on_policy_traces():
    data = window(7, (3,))
    r, v, nv, term, trunc = args = arguments(data, "reward", "value", "next_value", *FLAGS)
    on_policy = jnp.zeros_like(r)
    monte_carlo = ops.discounted_returns(r, nv, term, trunc, gamma=GAMMA)
    target, advantage = ops.vtrace(*args, on_policy, gamma=GAMMA)
    close(target, monte_carlo)
    close(advantage, monte_carlo - v)
    gae_target = ops.gae(*args, gamma=GAMMA, gae_lambda=LAMBDA)[1]
    close(ops.vtrace(*args, on_policy, gamma=GAMMA, lambda_=LAMBDA)[0], gae_target)
    # With q(s, a) = v(s), Retrace and V-trace agree on policy.
    close(ops.retrace(*args, on_policy, gamma=GAMMA, lambda_=LAMBDA), gae_target)


def test_retrace_and_watkins_without_a_trace_are_one_step():
    data = window(8, (3,))
    r, q, nv, term, trunc = arguments(data, "reward", "value", "next_value", *FLAGS)
    one_step = r + GAMMA * jnp.where(term, 0, nv)
    never = jnp.full_like(r, -1e9)
    close(ops.retrace(r, q, nv, term, trunc, never, gamma=GAMMA), one_step)
    next_q, exploring = nv[..., None], jnp.zeros_like(term)
    last_row = ops.watkins_q_lambda(r, next_q, exploring, term, trunc, gamma=GAMMA, lambda_=1.0)
    close(last_row, one_step)
    greedy = ops.watkins_q_lambda(r, next_q, ~exploring, term, trunc, gamma=GAMMA, lambda_=LAMBDA)
    close(greedy, ops.q_lambda(r, next_q, term, trunc, gamma=GAMMA, lambda_=LAMBDA))


@pytest.mark.parametrize("cut", [1, 5, T // 2 + 1, T - 1])
def test_a_window_cut_at_a_truncation_changes_nothing(cut):
    """Rows before a truncation do not depend on what follows it, nor rows after it on what came before."""
    data = window(9, (3,))
    data["truncated"][cut - 1] = True
    names = ("reward", "value", "next_value", *FLAGS, "log_rho")

    def targets(rows):
        r, v, nv, term, trunc, log_rho = arguments({n: data[n][rows] for n in names}, *names)
        return (
            ops.gae(r, v, nv, term, trunc, gamma=GAMMA, gae_lambda=LAMBDA)[0],
            ops.n_step_returns(r, nv, term, trunc, gamma=GAMMA, n=4),
            ops.lambda_returns(r, nv, term, trunc, gamma=GAMMA, lambda_=LAMBDA),
            *ops.vtrace(r, v, nv, term, trunc, log_rho, gamma=GAMMA),
            ops.retrace(r, v, nv, term, trunc, log_rho, gamma=GAMMA),
        )

    pieces = zip(targets(slice(None, cut)), targets(slice(cut, None)), strict=True)
    for whole, (front, back) in zip(targets(slice(None)), pieces, strict=True):
        close(whole, jnp.concatenate([front, back]))


def test_a_window_cut_anywhere_changes_nothing_when_bootstrapped_with_its_own_target():
    data = window(10, (3,))
    r, nv, term, trunc = arguments(data, "reward", "next_value", *FLAGS)
    for cut in (1, T // 2, T - 1):
        whole = ops.discounted_returns(r, nv, term, trunc, gamma=GAMMA)
        end = (term | trunc)[cut - 1]
        handed_over = nv.at[cut - 1].set(jnp.where(end, nv[cut - 1], whole[cut]))
        front = ops.discounted_returns(r[:cut], handed_over[:cut], term[:cut], trunc[:cut], gamma=GAMMA)
        close(front, whole[:cut])


def test_termination_decides_where_both_flags_are_true():
    data = window(11, (3,))
    term, trunc = jnp.asarray(data["terminated"]), jnp.asarray(data["truncated"])
    r, v, nv = arguments(data, "reward", "value", "next_value")
    both = ops.gae(r, v, nv, term, trunc, gamma=GAMMA, gae_lambda=LAMBDA)[0]
    terminated_only = ops.gae(r, v, nv, term, trunc & ~term, gamma=GAMMA, gae_lambda=LAMBDA)[0]
    np.testing.assert_array_equal(both, terminated_only)


def test_an_episode_that_only_truncates_is_worth_a_perpetuity():
    ones, never = jnp.ones(5), jnp.zeros(5, bool)
    worth = jnp.full(5, 1.0 / (1.0 - GAMMA))
    actual = ops.discounted_returns(ones, worth, never, ~never, gamma=GAMMA)
    close(actual, worth)


# ------------------------------------------------------------------------------------------ pinned numbers


def test_pinned_values():
    """Worked by hand with γ = ½: row 1 truncates (bootstrap 4), row 3 terminates (its 100 is never read)."""
    r, nv = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), jnp.array([8.0, 4.0, 6.0, 100.0, 2.0])
    term, trunc = jnp.arange(5) == 3, jnp.arange(5) == 1
    numbers = {"gamma": 0.5}
    np.testing.assert_array_equal(ops.discounted_returns(r, nv, term, trunc, **numbers), [3, 4, 5, 4, 6])
    mixed = ops.lambda_returns(r, nv, term, trunc, lambda_=0.5, **numbers)
    np.testing.assert_array_equal(mixed, [4, 4, 5.5, 4, 6])
    advantage, target = ops.gae(r, jnp.ones(5), nv, term, trunc, gae_lambda=0.5, **numbers)
    np.testing.assert_array_equal(advantage, [4.75, 3, 5.75, 3, 5])
    np.testing.assert_array_equal(target, [5.75, 4, 6.75, 4, 6])
    halved = jnp.log(jnp.full(5, 0.5))
    target, advantage = ops.vtrace(r, jnp.ones(5), nv, term, trunc, halved, **numbers)
    np.testing.assert_allclose(target, [3.375, 2.5, 3.875, 2.5, 3.5], rtol=1e-6)
    np.testing.assert_allclose(advantage, [0.625, 1.5, 1.625, 1.5, 2.5], rtol=1e-6)


# ------------------------------------------------------------------------------ transformations and errors


def test_vmapped_equals_looped_and_numbers_may_be_swept():
    data = window(12, (3,))
    args = arguments(data, "reward", "value", "next_value", *FLAGS)
    gammas = jnp.array([0.5, 0.9, 0.99])
    in_axes = (1, 1, 1, 1, 1, 0)
    swept = jax.jit(
        jax.vmap(lambda *x: ops.gae(*x[:5], gamma=x[5], gae_lambda=LAMBDA)[0], in_axes, out_axes=1)
    )(*args, gammas)
    for i, gamma in enumerate(gammas):
        alone = ops.gae(*[x[:, i] for x in args], gamma=gamma, gae_lambda=LAMBDA)[0]
        close(swept[:, i], alone)


@pytest.mark.parametrize("name", ["gae", "n_step", "vtrace", "retrace", "lambda", "discounted"])
def test_gradients_are_finite_and_ignore_what_lies_behind_a_termination(name):
    data = window(13, ())
    r, v, nv, term, trunc, log_rho = arguments(data, "reward", "value", "next_value", *FLAGS, "log_rho")
    term = term.at[-1].set(True)
    nv = jnp.where(term, jnp.inf, nv)  # whatever a network says of a terminal state
    calls = {
        "gae": lambda v, nv: ops.gae(r, v, nv, term, trunc, gamma=GAMMA, gae_lambda=LAMBDA)[0],
        "n_step": lambda v, nv: ops.n_step_returns(r, nv, term, trunc, gamma=GAMMA, n=3) + v,
        "vtrace": lambda v, nv: sum(ops.vtrace(r, v, nv, term, trunc, log_rho, gamma=GAMMA)),
        "retrace": lambda v, nv: ops.retrace(r, v, nv, term, trunc, log_rho, gamma=GAMMA),
        "lambda": lambda v, nv: ops.lambda_returns(r, nv, term, trunc, gamma=GAMMA, lambda_=LAMBDA) + v,
        "discounted": lambda v, nv: ops.discounted_returns(r, nv, term, trunc, gamma=GAMMA) + v,
    }
    total, grads = jax.jit(jax.value_and_grad(lambda *x: calls[name](*x).sum(), (0, 1)))(v, nv)
    assert np.isfinite(total)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[1][term], 0.0)


def test_monte_carlo_reads_estimates_where_experience_stops_and_nowhere_else():
    data = window(15, ())
    r, nv, term, trunc = arguments(data, "reward", "next_value", *FLAGS)
    read = (term | trunc).at[-1].set(True)
    expected = ops.discounted_returns(r, nv, term, trunc, gamma=GAMMA)
    found = ops.discounted_returns(r, jnp.where(read, nv, jnp.nan), term, trunc, gamma=GAMMA)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_window_of_no_steps_has_no_targets(batch):
    data = {name: array[:0] for name, array in window(16, batch).items()}
    r, v, nv, rho, q = arguments(data, "reward", "value", "next_value", "log_rho", "next_q")
    flags = arguments(data, *FLAGS)
    results = (
        *ops.gae(r, v, nv, *flags, gamma=GAMMA, gae_lambda=0.9),
        ops.lambda_returns(r, nv, *flags, gamma=GAMMA, lambda_=0.9),
        ops.discounted_returns(r, nv, *flags, gamma=GAMMA),
        ops.n_step_returns(r, nv, *flags, gamma=GAMMA, n=3),
        *ops.vtrace(r, v, nv, *flags, rho, gamma=GAMMA),
        ops.retrace(r, v, nv, *flags, rho, gamma=GAMMA),
        ops.q_lambda(r, q, *flags, gamma=GAMMA, lambda_=0.9),
        ops.watkins_q_lambda(r, q, flags[0], *flags, gamma=GAMMA, lambda_=0.9),
    )
    assert {result.shape for result in results} == {(0, *batch)}


def test_half_precision_stays_and_a_float32_gamma_is_accepted():
    data = window(14, (3,))
    r, v, nv = (x.astype(jnp.bfloat16) for x in arguments(data, "reward", "value", "next_value"))
    flags = arguments(data, *FLAGS)
    assert ops.gae(r, v, nv, *flags, gamma=0.9, gae_lambda=0.9)[0].dtype == jnp.bfloat16
    traced = ops.gae(r, v, nv, *flags, gamma=jnp.float32(0.9), gae_lambda=0.9)[0]
    assert traced.dtype == jnp.float32
    assert ops.n_step_returns(r, nv, *flags, gamma=jnp.float32(0.9), n=3).dtype == jnp.float32


def test_errors_name_the_argument():
    r, flag = jnp.ones(4), jnp.zeros(4, bool)
    numbers = {"gamma": 0.9, "gae_lambda": 0.9}
    with pytest.raises(AssertionError, match=r"value \[4, 2\]"):
        ops.gae(r, jnp.ones((4, 2)), r, flag, flag, **numbers)
    with pytest.raises(AssertionError, match=r"reward must be floating, got int32"):
        ops.gae(jnp.ones(4, jnp.int32), r, r, flag, flag, **numbers)
    with pytest.raises(AssertionError, match=r"truncated must be bool, got float32"):
        ops.gae(r, r, r, flag, r, **numbers)
    with pytest.raises(ValueError, match=r"n_step_returns\(n=0\)"):
        ops.n_step_returns(r, r, flag, flag, gamma=0.9, n=0)
