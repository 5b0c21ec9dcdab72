"""The fused ops against formulas in float64, their gradients, their fakes, their checks, and the build itself."""
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from csrc import ops

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 33, 1000, 65537)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device: needs a gpu")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
nan, inf = math.nan, math.inf
HEADERS = ("common.cuh", "philox.h", "linear_step.h", "group_advantage.h")


@pytest.fixture(scope="module", autouse=True)
def built():
    ops.build()
    assert ops.lib is not None and ops.status().startswith("fused ops: compiled (cpu")


def randn(*shape, dtype=torch.float32, device="cpu", seed=0, grad=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(grad)


def error(x, truth):
    return (x.detach().double() - truth).abs().max().item()


def at_most_twice(fused, eager, truth):
    """The compiled op's error is at most twice eager's, or else the result's rounding (in float64 the truth's too)."""
    assert fused.shape == eager.shape and fused.dtype == eager.dtype and fused.device == eager.device
    rounding = torch.finfo(fused.dtype).eps * truth.abs().max().item() * (8 if fused.dtype == torch.float64 else 0.5)
    assert error(fused, truth) <= max(2 * error(eager, truth), rounding)


# == Forward and backward against float64 ==

def prox_naive(pred, target, zeta):
    """1 - exp(-mean square / zeta^2) and its gradient in pred, sample by sample."""
    loss, grads = [], []
    for p, t in zip(pred.detach().double(), target.detach().double()):
        weight = math.exp(-((p - t) ** 2).sum().item() / (p.numel() * zeta**2))
        loss.append(1 - weight)
        grads.append(weight * 2 * (p - t) / (p.numel() * zeta**2))
    return torch.tensor(loss, dtype=torch.float64, device=pred.device), torch.stack(grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
def test_prox_matching_loss(d, dtype, device):
    pred, target = (randn(3, d, dtype=dtype, device=device, seed=i, grad=True) for i in range(2))
    truth, slope = prox_naive(pred, target, 1.5)
    results = []
    for f in (ops.prox_matching_loss, ops.prox_matching_loss_ref):
        loss = f(pred, target, 1.5)
        results.append((loss, *torch.autograd.grad(loss.sum(), (pred, target))))
    for fused, eager, exact in zip(*results, (truth, slope, -slope)):
        at_most_twice(fused, eager, exact)
    assert results[0][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(ops.prox_matching_loss(pred, target, 1.5), results[0][0])


@pytest.mark.parametrize("device", DEVICES)
def test_prox_matching_loss_does_not_depend_on_the_batch_or_the_threads(device):
    pred, target = randn(5, 20000).to(device), randn(5, 20000, seed=1).to(device)
    whole = ops.prox_matching_loss(pred, target, 1.0)
    assert torch.equal(whole[3:4], ops.prox_matching_loss(pred[3:4], target[3:4], 1.0))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(whole, ops.prox_matching_loss(pred, target, 1.0))
    finally:
        torch.set_num_threads(threads)


def test_prox_matching_loss_keeps_small_and_large_distances():
    pred = torch.tensor([[1e-6], [4.0]], requires_grad=True)
    loss = ops.prox_matching_loss(pred, torch.zeros(2, 1), 1.0)
    assert loss[0].item() == pytest.approx(1e-12, rel=1e-5)                    # 1 - exp would give 0
    loss.sum().backward()
    assert pred.grad[1].item() == pytest.approx(8 * math.exp(-16), rel=1e-5)   # 1 - loss would have lost it


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_cfg_combine(n, dtype, device):
    uncond, cond = (randn(n, dtype=dtype, device=device, seed=i, grad=True) for i in range(2))
    grad, u, c = randn(n, dtype=dtype, device=device, seed=2), uncond.detach().double(), cond.detach().double()
    results = []
    for f in (ops.cfg_combine, ops.cfg_combine_ref):
        out = f(uncond, cond, 4.5)
        results.append((out, *torch.autograd.grad(out, (uncond, cond), grad)))
    for fused, eager, exact in zip(*results, (u + 4.5 * (c - u), -3.5 * grad.double(), 4.5 * grad.double())):
        at_most_twice(fused, eager, exact)
    [alone] = torch.autograd.grad(ops.cfg_combine(u.to(dtype), cond, 4.5), cond, grad)     # the other branch detached
    assert torch.equal(alone, results[0][2])


def advantage_naive(reward, group_size, std):
    """One reward after the other, in Python floats."""
    def mean(xs):
        return sum(xs) / len(xs)

    def deviation(xs):
        return math.sqrt(mean([(x - mean(xs)) ** 2 for x in xs]))

    rewards, out = [float(r) for r in reward], []
    for i, r in enumerate(rewards):
        group = [x for x in rewards[i - i % group_size:][:group_size] if x == x]
        by = {"group": lambda: deviation(group) + 1e-4, "none": lambda: 1.0,
              "batch": lambda: deviation([x for x in rewards if x == x]) + 1e-4}
        out.append((r - mean(group)) / by[std]() if r == r else 0.0)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", ops.STD)
@pytest.mark.parametrize("group_size", (2, 24, 33, 100))
def test_group_advantage(group_size, std, dtype, device):
    reward = randn(4 * group_size, dtype=dtype)
    reward[::7] = nan
    reward[:group_size] = nan                                                  # nobody left
    reward[group_size:2 * group_size] = 0.1                                    # nothing to choose
    reward[-1] = nan
    truth = advantage_naive(reward, group_size, std).to(device)
    fused = ops.group_advantage(reward.to(device), group_size, std)
    at_most_twice(fused, ops.group_advantage_ref(reward.to(device), group_size, std), truth)
    assert (fused[:2 * group_size] == 0).all() and (fused[-1] == 0).all() and not fused.isnan().any()


@pytest.mark.parametrize("std", ops.STD)
def test_group_advantage_by_hand(std):
    adv = ops.group_advantage(torch.tensor([1.0, 3.0, nan, 5.0, 5.0, 5.0]), 3, std)
    by = {"group": 1.0001, "batch": math.sqrt(2.56) + 1e-4, "none": 1.0}[std]  # batch: 1 3 5 5 5 has variance 2.56
    assert adv.tolist() == pytest.approx([-1 / by, 1 / by, 0, 0, 0, 0])
    assert not ops.group_advantage(torch.ones(4, requires_grad=True), 2, std).requires_grad


# == A sampler's step ==

STEP = dict(a=0.9, b=-0.2, scale=4.5, c=0.4, std=0.3)


def step_tensors(d, dtype, device="cpu", state=None, grad=True, rows=3):
    """x, cond, uncond, w, eps: (rows, d); state: the dtype of x, w and eps, if not the network's."""
    dtypes = (state or dtype, dtype, dtype, state or dtype, state or dtype)
    return [randn(rows, d, dtype=t, device=device, seed=i, grad=grad and i < 4) for i, t in enumerate(dtypes)]


def step_by(f, x, cond, uncond, w, **kwargs):
    return f(x, cond, uncond=uncond, w=w, **{**STEP, **kwargs})


def step_naive(x, cond, uncond, w, x_next):
    """The mean and, from torch.distributions, the log-prob of x_next, in float64, as functions of float64 leaves."""
    leaves = [t.detach().double().requires_grad_() for t in (x, cond, uncond, w)]
    x, cond, uncond, w = leaves
    mean = STEP["a"] * x + STEP["b"] * (uncond + STEP["scale"] * (cond - uncond)) + STEP["c"] * w
    logp = torch.distributions.Normal(mean, STEP["std"]).log_prob(x_next.detach().double()).mean(1)
    return mean, logp, leaves


STEP_DTYPES = [(t, t) for t in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, state", STEP_DTYPES)
@pytest.mark.parametrize("d", SIZES)
def test_linear_step(d, dtype, state, device):
    """Mean, x_next and log-prob, and their gradients: the error against float64 is at most twice the twin's."""
    rows = max(3, 256 // d)                                                    # enough for the worst to mean something
    *tensors, eps = step_tensors(d, dtype, device, state, rows=rows)
    weights = randn(rows, dtype=torch.promote_types(dtype, torch.float32), device=device, seed=9)
    results = []
    for f in (ops.linear_step, ops.linear_step_ref):
        mean, none = step_by(f, *tensors, std=0.0)
        x_next, logp = step_by(f, *tensors, eps=eps)
        exact_mean, exact_logp, leaves = step_naive(*tensors, x_next)          # of the x_next that it has stored
        slopes = torch.autograd.grad((exact_logp * weights).sum() + exact_mean.sum(), leaves)
        exact = (exact_mean, exact_mean + STEP["std"] * eps.double(), exact_logp, *slopes)
        grads = torch.autograd.grad((logp * weights).sum() + x_next.sum(), tensors)
        results.append([(got, want.detach(), error(got, want.detach())) for got, want in
                        zip((mean, x_next, logp, *grads), exact)])
    for (got, want, mine), (twin, _, theirs) in zip(*results):
        assert none is None and (got.shape, got.dtype, got.device) == (twin.shape, twin.dtype, twin.device)
        rounding = torch.finfo(got.dtype).eps * want.abs().max().item()
        assert mine <= max(2 * theirs, rounding * (8 if dtype == torch.float64 else 0.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, state", STEP_DTYPES)
@pytest.mark.parametrize("d", (7, 1000, 65537))
def test_a_step_taken_has_the_log_prob_it_is_scored_with(d, dtype, state, device):
    """Bit for bit: alone and in another batch, with gradients and without, guided here or by cfg_combine before."""
    x, cond, uncond, w, eps = step_tensors(d, dtype, device, state, rows=5)
    for how in (dict(eps=eps), dict(key=(7, 2, 100))):
        with torch.no_grad():
            x_next, taken = step_by(ops.linear_step, x, cond, uncond, w, **how)
        mean, scored = step_by(ops.linear_step, x, cond, uncond, w, x_next=x_next, mean=True)
        assert torch.equal(taken, scored) and scored.requires_grad
        assert torch.equal(mean, step_by(ops.linear_step, x, cond, uncond, w, std=0.0)[0])
        some = [4, 1]
        none, few = step_by(ops.linear_step, x[some], cond[some], uncond[some], w[some], x_next=x_next[some])
        assert none is None and torch.equal(few, taken[some])
        if state not in (torch.float32, torch.float64):
            continue
        v = ops.cfg_combine(uncond.to(state), cond.to(state), STEP["scale"])
        before = ops.linear_step(x, v, **{**STEP, "scale": 1.0}, w=w, x_next=x_next)[1]
        if dtype == state:
            assert torch.equal(before, taken)
        else:                                  # a kernel's threads take as many elements as 16 bytes of v hold, and so
            torch.testing.assert_close(before, taken, rtol=2e-6, atol=0)                   # sum in another order


@pytest.mark.parametrize("device", DEVICES)
def test_a_scale_without_guidance_is_none(device):
    """No uncond: v is cond, and its gradient b, whatever the scale."""
    x, cond = (randn(2, 33, device=device, seed=i) for i in range(2))
    x_next, _ = ops.linear_step(x, cond.requires_grad_(), 0.9, 0.5, scale=4.5)
    x_next.sum().backward()
    torch.testing.assert_close(x_next.detach(), 0.9 * x + 0.5 * cond.detach())
    assert torch.equal(cond.grad, torch.full_like(cond, 0.5))


def test_linear_step_of_many_threads_is_that_of_one():
    tensors = step_tensors(65537, torch.float32, grad=False)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(step_by(ops.linear_step, *tensors[:4], eps=tensors[4]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_every_sampler_is_a_linear_step():
    """fused_step reads a, b and std off the scripts' own formulas: the result is theirs."""
    import dgpo
    import grpo
    v, x, eps, after = (randn(3, 4, 5, 5, seed=i, dtype=torch.float64) for i in range(4))
    steps = [partial(grpo.sde_step, t=0.7, t_next=0.6, noise_level=0.7, kind=kind) for kind in ("flow", "dance", "cps")]
    steps += [partial(grpo.sde_step, t=1.0, t_next=0.9, noise_level=0.7, t_cap=0.9),
              partial(dgpo.sde_step, t=0.1, t_next=0.0, noise_level=0.7, kind="cps"),
              partial(grpo.ddim_step, alpha_bar=0.3, alpha_bar_next=0.5, eta=1.0),
              partial(grpo.ddim_step, alpha_bar=0.3, alpha_bar_next=0.5, eta=0.0)]
    for step in steps:
        for given in (dict(eps=eps), dict(x_next=after)):
            want, got = step(v, x, **given), ops.fused_step(step, v, x, **given)
            assert got[3] == want[3] and (got[1] is None) == (want[1] is None)
            for mine, theirs in zip(got[:3], want[:3]):
                if mine is not None and theirs is not None:
                    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14)
            assert (got[2] is None) == ("eps" in given)
    last = randn(3, 4, 5, 5, seed=5, dtype=torch.float64)                      # DPM-Solver++(2M), w its last estimate
    unit = torch.eye(3, dtype=torch.float64)
    b, c, a = grpo.dpm_step(unit[0], unit[1], unit[2], 0.8, 0.7, 0.6).tolist()
    got, none = ops.linear_step(x, v, a, b, w=last, c=c)
    torch.testing.assert_close(got, grpo.dpm_step(v, last, x, 0.8, 0.7, 0.6), rtol=1e-13, atol=1e-14)
    assert none is None


def test_first_order_of_logp_is_reinforce_and_second_derivatives_follow():
    *tensors, eps = step_tensors(13, torch.float64)
    after = randn(3, 13, dtype=torch.float64, seed=8)

    def scored(*tensors):
        return step_by(ops.linear_step, *tensors, x_next=after, mean=True)
    assert torch.autograd.gradcheck(scored, tensors) and torch.autograd.gradgradcheck(scored, tensors)
    assert torch.autograd.gradcheck(lambda *t: step_by(ops.linear_step, *t, std=0.0)[0], tensors)
    assert torch.autograd.gradcheck(lambda x: ops.linear_step(x, a=1.5, std=0.2, x_next=after)[1], tensors[0])
    assert torch.autograd.gradcheck(lambda *t: step_by(ops.linear_step, *t, eps=eps)[0], tensors)


# == Noise ==

def test_philox_gives_the_published_numbers():
    """The known-answer vectors of Random123, philox4x32-10."""
    for counter, key, words in (
            ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ([0xffffffff] * 4, [0xffffffff] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            ([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0],
             "d16cfe09 94fdcceb 5001e420 24126ea1")):
        bits = ops.philox([torch.tensor([c]) for c in counter], key)
        assert " ".join(f"{b.item():08x}" for b in bits) == words


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape, key", (((3, 65537), (2**63 - 5, 2**32 - 1, 2**32 - 2)), ((2, 5, 7), (1, 2, 3)),
                                        ((4, 1), (0, 0, 0))))
def test_noise_is_the_same_bits_everywhere(shape, key, device):
    for dtype in DTYPES:
        x = torch.zeros(shape, dtype=dtype, device=device)
        drawn, logp = ops.linear_step(x, a=0.0, std=1.0, key=key)
        assert torch.equal(drawn.cpu(), ops.noise(shape, *key).to(dtype))
        assert torch.equal(drawn[1:], ops.linear_step(x[1:], a=0.0, std=1.0, key=(*key[:2], key[2] + 1))[0])
        assert torch.equal(logp, ops.linear_step(x, a=0.0, std=1.0, x_next=drawn)[1])


def test_noise_is_gaussian():
    """Moments within 5 standard errors, Kolmogorov-Smirnov at 1e-4, no correlation between neighbours of any kind."""
    z = ops.noise((64, 16384), 12345, 6, 7).double()
    n = z.numel()
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - want) < 5 * math.sqrt(variance / n)
    exact = torch.special.ndtr(z.flatten().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((exact - steps[:-1]).max(), (steps[1:] - exact).max()) < 2.23 / math.sqrt(n)
    others = [ops.noise((64, 16384), *key).double() for key in ((12346, 6, 7), (12345, 7, 7), (12345 + 2**32, 6, 7))]
    pairs = [(z[:, i:], z[:, :-i]) for i in (1, 2, 3, 4)] + [(z[1:], z[:-1])] + [(z, other) for other in others]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
        assert abs((a.square() * b.square()).mean().item() - 1) < 0.02


# == Advantages by SLAS, and what images weigh in DGPO ==

def slas_naive(reward, group_size, gamma, recenter, std):
    """Eq. (20) of SLAS group by group, in 80 bits."""
    r = reward.double().numpy().astype(np.longdouble).reshape(-1, group_size)
    valid, out = ~np.isnan(r), np.zeros_like(r)
    for row, ok, to in zip(r, valid, out):
        to[ok] = row[ok] - row[ok].mean() if ok.any() else 0
    if std in ("before", "batch"):
        out[valid] /= out[valid].std() + np.longdouble("1e-4")
    for d, ok, to in zip(out.copy(), valid, out):
        weight = np.abs(d[ok]) ** gamma
        lam = (weight * d[ok]).sum() / weight.sum() if recenter and weight.sum() else 0
        to[ok] = weight * (d[ok] - lam)
    if std in ("after", "batch"):
        out[valid] /= out[valid].std() + np.longdouble("1e-4")
    return torch.from_numpy(out.astype(np.float64)).flatten()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", ops.SLAS_STD)
@pytest.mark.parametrize("gamma, recenter", ((0.0, False), (0.0, True), (1.0, False), (0.7, True), (2.0, False)))
def test_slas_advantage(gamma, recenter, std, dtype, device):
    import slas
    for groups, group_size in ((5, 24), (70, 33)):
        reward = randn(groups * group_size, dtype=dtype)
        reward[3:group_size:7] = nan
        reward[group_size:2 * group_size] = 0.1                                # nothing to choose
        reward[2 * group_size:3 * group_size] = nan                            # nobody left
        truth = slas_naive(reward, group_size, gamma, recenter, std)
        try:
            ops.use(False)
            own = slas.slas_advantage(reward.double(), group_size, gamma, recenter, std)   # the script's own text
        finally:
            ops.use(True)
        torch.testing.assert_close(own, truth, rtol=1e-12, atol=1e-12)
        fused = ops.slas_advantage(reward.to(device), group_size, gamma, recenter, std)
        twin = ops.slas_advantage_ref(reward.to(device), group_size, gamma, recenter, std)
        at_most_twice(fused, twin, truth.to(device))
        assert (fused[group_size:3 * group_size] == 0).all() and (fused[3:group_size:7] == 0).all()
        cut = ops.slas_advantage(reward.to(device), group_size, gamma, recenter, std, clip=0.5)
        assert torch.equal(cut, fused.clamp(-0.5, 0.5)) and cut.abs().max() == 0.5


def test_the_clip_of_advantages_keeps_nan():
    for reward in (torch.tensor([1.0, inf, 2.0, 3.0]), torch.tensor([nan, -4.0, 9.0, 3.0])):
        for std in ops.STD:
            want = ops.group_advantage_ref(reward, 2, std).clamp(-0.25, 0.25)
            torch.testing.assert_close(ops.group_advantage(reward, 2, std, 0.25), want, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups, group_size", ((1, 2), (3, 24), (40, 33)))
def test_dgpo_loss(groups, group_size, dtype, device):
    dsm, ref = (randn(groups * group_size, dtype=dtype, device=device, seed=i, grad=True) for i in range(2))
    adv = randn(groups * group_size, dtype=dtype, device=device, seed=2)
    leaves = [t.detach().double().requires_grad_() for t in (dsm, ref)]
    z = 30 / group_size * (adv.double() * (leaves[0] - leaves[1])).view(groups, group_size).sum(1)
    truth = torch.nn.functional.softplus(z).mean()
    exact, results = (truth, *torch.autograd.grad(truth, leaves)), []
    for f in (ops.dgpo_loss, ops.dgpo_loss_ref):
        loss = f(dsm, ref, adv, group_size, 30.0)
        results.append((loss, *torch.autograd.grad(loss, (dsm, ref))))
    for fused, eager, want in zip(*results, exact):
        at_most_twice(fused, eager, want.detach())
    assert torch.equal(ops.dgpo_loss(dsm, ref, adv, group_size, 30.0), results[0][0])


@pytest.mark.parametrize("device", DEVICES)
def test_dgpo_loss_far_from_zero_and_its_derivatives(device):
    dsm, ref, adv = (randn(12, dtype=torch.float64, seed=i).to(device) for i in range(3))
    for size in (1e3, 1e-9, inf, nan):
        args = (dsm * size, ref, adv, 4, 5.0)
        torch.testing.assert_close(ops.dgpo_loss(*args), ops.dgpo_loss_ref(*args), equal_nan=True, rtol=1e-12, atol=0)
    dsm.requires_grad_(), ref.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.dgpo_loss(a, b, adv, 4, 5.0), (dsm, ref))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.dgpo_loss(a, b, adv, 4, 5.0), (dsm, ref))


# == Odd inputs ==

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_alignments(dtype, device):
    """Transposed, expanded, channels-last and misaligned views give what their contiguous copies give."""
    a, b = (randn(6, 5, 7, 9, dtype=dtype, device=device, seed=i) for i in range(2))
    flat_a, flat_b = (randn(3 * 20001 + 5, dtype=dtype, device=device, seed=i) for i in range(2))
    pairs = [(a.transpose(0, 1), b.transpose(0, 1)), (a[:1].expand(4, 5, 7, 9), b[:4]), (a[:, :, ::2], b[:, :, 1:5]),
             (a.to(memory_format=torch.channels_last), b)]
    pairs += [(flat_a[i:i + 60003].view(3, -1), flat_b[j:j + 60003].view(3, -1)) for i, j in ((1, 1), (3, 0), (0, 5))]
    for x, y in pairs:
        for f, extra in ((ops.prox_matching_loss, 0.8), (ops.cfg_combine, 3.0)):
            results = []
            for u, v in ((x, y), (x.contiguous().clone(), y.contiguous().clone())):
                u, v = u.detach().requires_grad_(), v.detach().requires_grad_()
                out = f(u, v, extra)
                results.append((out, *torch.autograd.grad(out.sum(), (u, v))))
            for got, want in zip(*results):
                rtol, atol = 2e-6 if dtype != torch.float64 else 1e-14, 0
                if f is ops.prox_matching_loss and got.dtype in (torch.bfloat16, torch.float16):
                    # A sum's order follows the alignment, and its last bit may round a gradient to the neighbour: eps
                    # away at most, or among float16's subnormals, which lie as far apart as the smallest, by one.
                    info = torch.finfo(got.dtype)
                    rtol, atol = info.eps, info.smallest_normal * info.eps
                torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
        eps = randn(x.numel(), dtype=dtype, device=device, seed=7).view(x.shape)
        for how in (dict(eps=eps), dict(key=(1, 2, 3)), dict(x_next=eps, mean=True)):
            results = []
            for u, v in ((x, y), (x.contiguous().clone(), y.contiguous().clone())):
                u, v = u.detach().requires_grad_(), v.detach().requires_grad_()
                out = step_by(ops.linear_step, u, v, v, u, **how)
                results.append((*out, *torch.autograd.grad(out[1].sum() + out[0].sum(), (u, v))))
            assert all(torch.equal(got, want) for got, want in zip(*results))
    reward = randn(96, dtype=dtype, device=device)
    assert torch.equal(ops.group_advantage(reward[::2], 24), ops.group_advantage(reward[::2].clone(), 24))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype, device):
    for shape in ((0, 4), (0, 3, 0), (2, 0)):
        x, y = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        for f in (ops.prox_matching_loss, ops.cfg_combine):
            out = f(x, y, 2.0)
            out.sum().backward()
            assert x.grad.shape == y.grad.shape == shape
            assert out.shape == (shape if f is ops.cfg_combine else shape[:1])
        fused, eager = ops.prox_matching_loss(x, y, 2.0), ops.prox_matching_loss_ref(x, y, 2.0)
        torch.testing.assert_close(fused, eager, equal_nan=True)
        for std in (0.0, 0.3):
            given = dict(x_next=x.detach(), mean=True) if std else {}
            fused, eager = (f(x, y, 0.9, -0.2, std, **given) for f in (ops.linear_step, ops.linear_step_ref))
            assert fused[0].shape == shape and (fused[1] is None) == (not std)
            torch.testing.assert_close(fused, eager, equal_nan=True)
            (fused[0].sum() + (fused[1].sum() if std else 0)).backward()
    rewards = torch.zeros(0, dtype=dtype, device=device)
    assert ops.group_advantage(rewards, 4, "batch").shape == ops.slas_advantage(rewards, 4, 0.7).shape == (0,)
    assert ops.dgpo_loss(rewards, rewards, rewards, 4, 1.0).isnan()            # the mean of nothing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", (nan, inf, -inf))
def test_nan_and_inf_go_where_the_twin_sends_them(bad, dtype, device):
    pred, target = randn(4, 70, dtype=dtype, device=device), randn(4, 70, dtype=dtype, device=device, seed=1)
    pred[1, 3] = target[2, 69] = bad
    pred[3, 0] = target[3, 0] = bad
    pred.requires_grad_(), target.requires_grad_()
    for name in ("prox_matching_loss", "cfg_combine"):
        results = []
        for f in (getattr(ops, name), getattr(ops, name + "_ref")):
            out = f(pred, target, 2.0)
            results.append((out, *torch.autograd.grad(out.sum(), (pred, target))))
        for fused, eager in zip(*results):
            assert torch.equal(fused.isnan(), eager.isnan()) and torch.equal(fused.isinf(), eager.isinf())
    results = []
    for f in (ops.linear_step, ops.linear_step_ref):
        mean, logp = step_by(f, pred, target, pred, target, x_next=target.detach(), mean=True)
        results.append((mean, logp, *torch.autograd.grad(logp.sum() + mean.sum(), (pred, target))))
    for fused, eager in zip(*results):
        assert torch.equal(fused.isnan(), eager.isnan()) and torch.equal(fused.isinf(), eager.isinf())
    reward = randn(12, dtype=dtype, device=device)
    reward[5] = bad
    for std in ops.SLAS_STD:
        for how in ((0.0, False), (0.7, True)):
            fused, eager = (f(reward, 4, *how, std) for f in (ops.slas_advantage, ops.slas_advantage_ref))
            assert torch.equal(fused.isfinite(), eager.isfinite())
    for std in ops.STD:
        fused, eager = ops.group_advantage(reward, 4, std), ops.group_advantage_ref(reward, 4, std)
        torch.testing.assert_close(fused, eager, equal_nan=True)


@pytest.mark.parametrize("fused", (True, False))
def test_bad_inputs_are_named(fused):
    ops.use(fused)
    x = torch.zeros(2, 3)
    wrong = [
        (lambda: ops.cfg_combine(x, x[:1], 2.0), "uncond and cond must have the same shape, not (2, 3) and (1, 3)"),
        (lambda: ops.cfg_combine(x, x.half(), 2.0), "the same dtype, not torch.float32 and torch.float16"),
        (lambda: ops.cfg_combine(x, x.to("meta"), 2.0), "the same device, not cpu and meta"),
        (lambda: ops.cfg_combine(x.long(), x.long(), 2.0), "floating point"),
        (lambda: ops.prox_matching_loss(x, x[:, :2], 1.0), "pred and target must have the same shape"),
        (lambda: ops.prox_matching_loss(x[0], x[0], 1.0), "(3,)"),
        (lambda: ops.prox_matching_loss(x, x, 0.0), "zeta=0.0"),
        (lambda: ops.group_advantage(torch.zeros(7), 3), "7 rewards do not fill groups of group_size=3"),
        (lambda: ops.group_advantage(torch.zeros(4), 1), "group_size=1"),
        (lambda: ops.group_advantage(torch.zeros(4), 2, "global"), "std='global'"),
        (lambda: ops.group_advantage(torch.zeros(2, 2), 2), "(2, 2)"),
        (lambda: ops.group_advantage(torch.zeros(4).long(), 2), "torch.int64"),
        (lambda: ops.slas_advantage(torch.zeros(4), 2, 1.0, std="group"), "std='group'"),
        (lambda: ops.slas_advantage(torch.zeros(4), 2, -1.0), "gamma=-1.0"),
        (lambda: ops.group_advantage(torch.zeros(4), 2, clip=-1.0), "clip=-1.0"),
        (lambda: ops.slas_advantage(torch.zeros(4), 2, 1.0, clip=0.0), "clip=0.0"),
        (lambda: ops.dgpo_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4), 3, 1.0), "group_size=3"),
        (lambda: ops.dgpo_loss(torch.zeros(4), torch.zeros(2), torch.zeros(4), 2, 1.0), "dsm and dsm_ref"),
        (lambda: ops.linear_step(x[0]), "(3,)"),
        (lambda: ops.linear_step(x, x[:1]), "x and cond must have the same shape"),
        (lambda: ops.linear_step(x, x.double()), "x and cond must have the same dtype"),
        (lambda: ops.linear_step(x, x.half(), uncond=x), "cond and uncond must have the same dtype"),
        (lambda: ops.linear_step(x, x, std=0.1, eps=x.half()), "x and eps must have the same dtype"),
        (lambda: ops.linear_step(x, uncond=x), "uncond without cond"),
        (lambda: ops.linear_step(x, x, std=0.1, key=(1, 2)), "key=(1, 2)"),
        (lambda: ops.linear_step(x, x, std=0.1), "std=0.1 with 0 of eps, key and x_next"),
        (lambda: ops.linear_step(x, x, std=0.1, eps=x, key=(1, 2, 3)), "std=0.1 with 2 of eps, key and x_next"),
    ]
    try:
        for call, words in wrong:
            with pytest.raises(ValueError) as caught:
                call()
            assert words in str(caught.value) and "\n" not in str(caught.value)
    finally:
        ops.use(True)


def test_the_ops_own_doors_are_shut():
    """What torch.ops.t2i is asked for directly: arguments that a kernel would misread are refused, not read."""
    x, per_row, lib = torch.zeros(2, 3), torch.zeros(2), ops.lib
    step, numbers = lib.linear_step_backward, (1.0, 1.0, 1.0, 0.0, 0.1)
    for call in (lambda: step(None, per_row, x, x, None, None, None, *numbers, [1, 1, 0, 0]),
                 lambda: step(None, per_row.half(), x, x, None, None, x, *numbers, [1, 1, 0, 0]),
                 lambda: step(None, per_row[:1], x, x, None, None, x, *numbers, [1, 1, 0, 0]),
                 lambda: step(x, None, x, x, None, None, x, *numbers, [1]),
                 lambda: lib.linear_step(x, x, None, None, None, None, *numbers, (1, 2), False),
                 lambda: lib.prox_matching_loss_backward(per_row[:1], x, x, per_row, 1.0),
                 lambda: lib.prox_matching_loss_backward(per_row, x, x, per_row.double(), 1.0)):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("device", DEVICES)
def test_every_seed_of_64_bits(device):
    x, keys = torch.zeros(2, 8, device=device), [(seed, 3, 5) for seed in (0, 2**63 - 1, 2**63, 2**64 - 1)]
    drawn = [ops.linear_step(x, std=1.0, key=key)[0] for key in keys]
    assert all(torch.equal(z.cpu(), ops.noise(x.shape, *key)) for z, key in zip(drawn, keys))
    assert not torch.equal(drawn[1], drawn[2])


# == Autograd and torch.compile ==

def test_transforms_take_the_twins():
    """torch.func's, and forward mode: the compiled ops have gradients in backward mode alone."""
    x, y = randn(4, 6), randn(4, 6, seed=1)
    for f, twin in ((lambda x: ops.cfg_combine(x, y, 2.0), lambda x: ops.cfg_combine_ref(x, y, 2.0)),
                    (lambda x: ops.linear_step(x, y, a=3.0)[0], lambda x: ops.linear_step_ref(x, y, a=3.0)[0]),
                    (lambda x: ops.prox_matching_loss(x, y, 1.0), lambda x: ops.prox_matching_loss_ref(x, y, 1.0)),
                    (lambda x: ops.dgpo_loss(x[0], y[0], y[1], 3, 1.0),
                     lambda x: ops.dgpo_loss_ref(x[0], y[0], y[1], 3, 1.0))):
        some = (torch.func.jvp(g, (x,), (torch.ones_like(x),)) for g in (f, twin))
        torch.testing.assert_close(*some)
        some = (torch.func.grad(lambda x: g(x).square().sum())(x) for g in (f, twin))
        torch.testing.assert_close(*some)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(f(dual)).tangent is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_dgpo_loss_with_create_graph(dtype):
    """The gradient is that without it, in half precision, too; an empty batch has one."""
    dsm, dsm_ref, adv = (randn(12, dtype=dtype, seed=i, grad=i == 0) for i in range(3))
    (plain,), (graph,) = (torch.autograd.grad(ops.dgpo_loss(dsm, dsm_ref, adv, 4, 3.0), dsm, create_graph=create)
                          for create in (False, True))
    torch.testing.assert_close(graph, plain, rtol=2 * torch.finfo(dtype).eps, atol=0)
    empty = dsm[:0]
    assert torch.autograd.grad(ops.dgpo_loss(empty, empty, empty, 4, 3.0), empty, create_graph=True)[0].shape == (0,)



@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    a, b = (randn(3, 11, dtype=torch.float64, device=device, seed=i, grad=True) for i in range(2))
    assert torch.autograd.gradcheck(lambda x, y: ops.prox_matching_loss(x, y, 1.3), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: ops.cfg_combine(x, y, 4.5), (a, b))
    assert torch.autograd.gradgradcheck(lambda x, y: ops.cfg_combine(x, y, 4.5), (a, b))
    [grad] = torch.autograd.grad(ops.prox_matching_loss(a, b, 1.3).sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    a, b = (randn(4, 5, dtype=dtype, device=device, seed=i, grad=True) for i in range(2))
    wide, numbers = ops.prox_matching_loss(a, b, 1.0).detach(), STEP.values()
    for op, args in ((ops.lib.prox_matching_loss, (a, b, 1.3)), (ops.lib.cfg_combine, (a, b.detach(), 4.5)),
                     (ops.lib.prox_matching_loss, (a.transpose(0, 1), b.transpose(0, 1), 1.3)),
                     (ops.lib.prox_matching_loss_backward, (wide, a.detach(), b.detach(), wide, 1.3)),
                     (ops.lib.cfg_combine_backward, (a, 4.5)),
                     (ops.lib.group_advantage, (a.detach()[0, :4], 2, 3, 0.7, True, True, 0.5)),
                     (ops.lib.dgpo_loss, (a[0, :4], b[0, :4], a.detach()[0, :4], 2, 3.0)),
                     (ops.lib.linear_step, (a, b, None, None, None, None, 0.9, -0.2, 1.0, 0.0, 0.0, (), False)),
                     (ops.lib.linear_step, (a, b, a, b, a.detach(), None, *numbers, (), False)),
                     (ops.lib.linear_step, (a, b, a, b, None, a.detach(), *numbers, (), True)),
                     (ops.lib.linear_step, (a, b, a, b, None, a.detach(), *numbers, (), False)),
                     (ops.lib.linear_step, (a, b, None, None, None, None, *numbers, (1, 2, 3), False)),
                     (ops.lib.linear_step_backward, (a.detach(), wide, *[a.detach()] * 5, *numbers, (1, 0, 1, 1)))):
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
def test_the_ops_stay_whole_under_torch_compile(device):
    def step(pred, uncond, cond, reward):
        adv = ops.group_advantage(reward, 2) + ops.slas_advantage(reward, 2, 0.7, clip=2.0)
        x_next, taken = ops.linear_step(uncond, cond, 0.9, -0.2, 0.3, key=(1, 2, 3))
        mean, logp = ops.linear_step(uncond, pred, 0.9, -0.2, 0.3, uncond=cond, scale=3.0, x_next=x_next, mean=True)
        prox = ops.prox_matching_loss(pred, ops.cfg_combine(uncond, cond, 3.0), 1.0)
        return (adv * (prox + logp - taken)).sum() + mean.sum() + ops.dgpo_loss(prox, adv, adv, 2, 3.0)

    pred, uncond, cond = (randn(4, 70, seed=i).to(device) for i in range(3))
    reward, grads = randn(4, seed=3).to(device), []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = pred.clone().requires_grad_()
        f(x, uncond, cond, reward).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_one_graph_for_all_shapes_and_steps():
    """A sampler's loop around a compiled step: its std changes, and the last is 0."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    guide = torch.compile(lambda u, c: ops.cfg_combine(u, c, 3.0), backend=backend, dynamic=True, fullgraph=True)
    for n in (3, 40, 70, 333):
        u, c = randn(2, n), randn(2, n, seed=1)
        assert torch.equal(guide(u, c), ops.cfg_combine(u, c, 3.0))
    assert len(graphs) == 1
    step = torch.compile(lambda x, std: ops.linear_step(x, x, .9, .1, std, eps=x)[0], backend="aot_eager")
    for std in (.5, .3, .25, 0.0):
        torch.testing.assert_close(step(u, std), ops.linear_step(u, u, .9, .1, std, eps=u)[0], rtol=1e-6, atol=1e-6)


# == Which one runs, and the build ==

def test_use_and_status():
    x, y = randn(2, 40), randn(2, 40, seed=1)
    try:
        ops.use(False)
        assert ops.status() == "fused ops: PyTorch twins (as asked)"
        assert torch.equal(ops.prox_matching_loss(x, y, 1.0), ops.prox_matching_loss_ref(x, y, 1.0))
    finally:
        ops.use(True)
    assert ops.status().startswith("fused ops: compiled (cpu")


def run(code, **env):
    env = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def test_without_a_library_or_a_compiler_everything_runs_on_the_twins(tmp_path):
    code = """
import torch
from csrc import ops
print(ops.status())
print(ops.group_advantage(torch.tensor([1.0, 3.0]), 2, "none").tolist())
try: ops.build()
except RuntimeError as error: print(error)
"""
    done = run(code, T2I_OPS_CACHE=str(tmp_path), PATH="", CXX="", CUDA_HOME=str(tmp_path))
    status, adv, words = done.stdout.splitlines()
    assert status == "fused ops: PyTorch twins (build them with: python csrc/ops.py build)"
    assert adv == "[-1.0, 1.0]" and "apt install g++" in words


def test_a_stale_or_broken_library_is_not_loaded(tmp_path, monkeypatch):
    """Another source, another name; and a file that is no library leaves the twins, with the reason."""
    before = ops.library("cpu")
    changed = tmp_path / "changed.cpp"
    changed.write_text("// one more")
    found = ops.sources()
    monkeypatch.setattr(ops, "sources", lambda: found + [changed])
    assert ops.library("cpu") != before
    (tmp_path / before.name).write_text("not a library")
    done = run("from csrc import ops; print(ops.status())", T2I_OPS_CACHE=str(tmp_path))
    assert done.stdout.startswith("fused ops: PyTorch twins (the cached library could not be loaded: ")


def test_a_broken_library_is_built_anew(tmp_path, monkeypatch):
    """And where what is built does not load either, it says so; the command then fails."""
    monkeypatch.setattr(ops, "CACHE", tmp_path)
    monkeypatch.setattr(ops, "lib", None)
    monkeypatch.setattr(ops, "find_nvcc", lambda: None)
    target, made = ops.library("cpu"), []
    target.write_text("not a library")

    def compile_into(tmp, nvcc, verbose):
        made.append(tmp)
        (tmp / "t2i.so").write_text("nor this")
        return tmp / "t2i.so"
    monkeypatch.setattr(ops, "compile_into", compile_into)
    assert "could not be loaded" in ops.build() and len(made) == 1 and target.read_text() == "nor this"
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nwhile [ $# -gt 1 ]; do [ $1 = -o ] && echo rubbish > $2; shift; done\n")
    compiler.chmod(0o755)
    path = os.pathsep.join(f for f in os.environ["PATH"].split(os.pathsep) if not Path(f, "nvcc").exists())
    env = os.environ | {"CXX": str(compiler), "T2I_OPS_CACHE": str(tmp_path / "other"), "CUDA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "csrc/ops.py", "build"], cwd=ROOT, capture_output=True, text=True,
                          env=env | {"PATH": path})
    assert done.returncode == 1 and "could not be loaded" in done.stdout, done.stderr


def test_importing_brings_in_nothing_else():
    """But the standard library: neither torch's builders nor its compiler, which take seconds."""
    done = run("import sys, torch; had = set(sys.modules); from csrc import ops; print(*sys.modules.keys() - had)")
    assert {name.split(".")[0] for name in done.stdout.split() if name[0] != "_"} - sys.stdlib_module_names == {"csrc"}


@pytest.mark.skipif(not ops.find_nvcc(), reason="no nvcc, so the cuda kernels cannot be compiled")
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "csrc").glob("*.cu")))
def test_nvcc_compiles_the_kernels_for_sm_90_without_torch(name, tmp_path):
    out = tmp_path / "kernel.o"
    command = [ops.find_nvcc(), "-arch=sm_90", "-Werror", "all-warnings", "-c", f"csrc/{name}.cu", "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and out.stat().st_size > 0, done.stderr


@pytest.mark.skipif(not ops.find_nvcc(), reason="no nvcc, so the cuda kernels cannot be compiled")
@pytest.mark.parametrize("name, kernels, entries", [
    ("prox_matching_loss", ("backward",), 4), ("cfg_combine", ("combine", "split"), 8),
    ("linear_step", ("step", "step_backward"), 12)])
def test_every_kernel_that_writes_tensors_writes_16_bytes_at_once(name, kernels, entries, tmp_path):
    """An assignment of 16 bytes was four of 4 in prox_matching_loss's backward: what nvcc makes of it is looked at."""
    command = [ops.find_nvcc(), "-std=c++20", "-arch=sm_90", "-ptx", f"csrc/{name}.cu", "-o", str(tmp_path / "ptx")]
    subprocess.run(command, cwd=ROOT, check=True)
    found = re.split(r"\.entry _Z\d+", (tmp_path / "ptx").read_text())[1:]
    found = [text for text in found if re.match(r"[a-z_]+", text).group() in kernels]
    assert len(found) == entries and all("st.global.cg.v4" in text for text in found)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "csrc").glob("*.cu")))
def test_kernels_include_nothing_of_torch(name):
    text = "".join((ROOT / "csrc" / file).read_text() for file in (f"{name}.cu", *HEADERS))
    assert "#include <torch" not in text and "#include <ATen" not in text and "#include <c10" not in text


@needs_cuda
def test_gpu_takes_the_compiled_ops_on_the_current_stream():
    assert "cuda" in ops.devices
    stream, x = torch.cuda.Stream(), torch.randn(1 << 24, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = ops.cfg_combine(x, x.sin(), 2.0)                                   # right only if it waits for sin
    stream.synchronize()
    torch.testing.assert_close(y, x + 2.0 * (x.sin() - x))
    graph, a, b = torch.cuda.CUDAGraph(), torch.randn(4, 999, device="cuda"), torch.randn(4, 999, device="cuda")
    with torch.cuda.graph(graph):                                              # fails on any wait for the host
        loss, adv = ops.prox_matching_loss(a, b, 1.0), ops.group_advantage(a[:, 0], 2, "batch")
    graph.replay()
    torch.testing.assert_close(loss, ops.prox_matching_loss_ref(a, b, 1.0))
    torch.testing.assert_close(adv, ops.group_advantage_ref(a[:, 0], 2, "batch"))
