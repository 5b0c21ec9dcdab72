"""The pure functions of dgpo.py and grpo.py against closed forms, float64 loops, torch.distributions and diffusers."""
import math
from functools import partial

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import dgpo
import grpo
import models
from csrc import ops

KINDS = ("flow", "dance", "cps")
MEAN, STD = 0.7, 0.4                                                   # the one-dimensional data of the closed forms


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64),
                               rtol=tolerance, atol=tolerance)


# ========================================================================================================= advantages

def naive_advantage(reward, group_size, std):
    def moments(values):
        values = [v for v in values if not math.isnan(v)]
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))     # the population's
    out = []
    for i in range(0, len(reward), group_size):
        group = reward[i:i + group_size]
        mean, own = moments(group)
        by = {"group": own + 1e-4, "batch": moments(reward)[1] + 1e-4, "none": 1}[std]
        out += [0.0 if math.isnan(v) else (v - mean) / by for v in group]
    return out


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("module", (dgpo, grpo))
@pytest.mark.parametrize("std", ("group", "batch", "none"))
def test_group_advantage(module, std, fused, monkeypatch):
    """In one kernel, where it is built, and by the script's own lines, which ops has a twin of."""
    monkeypatch.setattr(ops, "wanted", fused)
    reward = randn(24, seed=1)
    reward[[2, 9, 10]] = math.nan
    close(module.group_advantage(reward, 6, std), naive_advantage(reward.tolist(), 6, std))
    constant = torch.tensor([.1] * 3 + [.3, .5, math.nan], dtype=torch.float32)
    adv = module.group_advantage(constant, 3, std)
    assert adv[:3].tolist() == [0, 0, 0] and adv[5] == 0 and adv.isfinite().all() and adv.dtype == torch.float32
    for size, by in (7, std), (1, std), (6, "sum"):
        with pytest.raises(ValueError):
            module.group_advantage(reward, size, by)
    nothing = torch.full((4,), math.nan)
    assert module.group_advantage(nothing, 2, std).tolist() == [0] * 4
    wide = 1e3 * randn(96, seed=2).float()                             # tens of groups, one of them failed as a whole
    wide[:8] = math.nan
    twin = ops.group_advantage_ref(wide, 8, std)
    torch.testing.assert_close(module.group_advantage(wide, 8, std), twin, rtol=1e-5, atol=1e-6)


# =============================================================================================================== DGPO

def test_dsm_loss_weights_and_the_identity_behind_them():
    """x_0hat - x_0 = t (v* - v), so weight v is the velocity error and x0 the error of the clean estimate."""
    v, x_0, eps = (randn(5, 3, 4, 4, seed=i) for i in range(3))
    t = torch.tensor([1e-3, .2, .5, .9, 1.0], dtype=torch.float64)
    wide = t[:, None, None, None]
    x_t = (1 - wide) * x_0 + wide * eps
    close(x_t - wide * v - x_0, wide * (eps - x_0 - v))
    clean = ((x_t - wide * v - x_0) ** 2).flatten(1).mean(1)           # |x_0hat - x_0|^2
    close(dgpo.dsm_loss(v, x_0, eps, t, "v"), clean / t ** 2, 1e-10)
    close(dgpo.dsm_loss(v, x_0, eps, t, "x0"), clean)
    s = t.clone().requires_grad_()                                     # the ELBO's weight: -1/2 d SNR / dt
    slope, = torch.autograd.grad((((1 - s) / s) ** 2).sum(), s)
    close(dgpo.dsm_loss(v, x_0, eps, t, "elbo"), -slope / 2 * clean, 1e-9)


def test_dgpo_loss_against_loops_and_finite_differences():
    dsm, ref, adv, G, beta = randn(12, seed=1).exp(), randn(12, seed=2).exp(), randn(12, seed=3), 4, 2.5
    naive = 0.0
    for g in range(3):
        z = beta / G * sum(adv[i].item() * (dsm[i].item() - ref[i].item()) for i in range(g * G, g * G + G))
        naive -= math.log(1 / (1 + math.exp(z))) / 3                   # -log sigmoid(-z)
    close(dgpo.dgpo_loss(dsm, ref, adv, G, beta), naive)
    assert dgpo.dgpo_loss(dsm, ref, adv.float(), G, beta).item() == pytest.approx(naive, rel=1e-6)
    assert torch.autograd.gradcheck(lambda a, b: dgpo.dgpo_loss(a, b, adv, G, beta),
                                    (dsm.requires_grad_(), ref.requires_grad_()))
    close(dgpo.dgpo_loss(dsm, dsm, adv, G, beta), math.log(2))         # where theta is theta_ref


def test_dgpo_gradient_is_that_of_the_released_codes_detached_weights():
    """grad L = mean_g sigmoid(z_g) beta/G sum_i A_i grad l_i: the weight detached, the denoising losses weighed."""
    theta = randn(6, seed=4).requires_grad_()
    features, target, adv, G, beta = randn(12, 6, seed=5), randn(12, seed=6), randn(12, seed=7), 4, 3.0
    ref = ((features @ randn(6, seed=8)) - target) ** 2
    dsm = ((features @ theta) - target) ** 2
    grad, = torch.autograd.grad(dgpo.dgpo_loss(dsm, ref, adv, G, beta), theta, retain_graph=True)
    z = beta / G * (adv * (dsm - ref).detach()).view(3, G).sum(1)      # (P,)
    other, = torch.autograd.grad((z.sigmoid() * beta / G * (adv * dsm).view(3, G).sum(1)).mean(), theta)
    close(grad, other)


def test_dgpo_loss_pulls_the_better_image_towards_the_network():
    dsm = torch.full((4,), .5, dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([1.5, .5, -.5, -1.5], dtype=torch.float64)
    dgpo.dgpo_loss(dsm, dsm.detach(), adv, 4, 100.0).backward()
    assert torch.equal(dsm.grad.sign(), adv.sign())                    # descent: l falls where A > 0


def test_clip_dsm():
    dsm = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    old = dsm.detach() + torch.tensor([.2, .05, -.2, .2, -.05, -.2], dtype=torch.float64)      # r = exp(l_old - l)
    adv = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    out = dgpo.clip_dsm(dsm, old, adv, .1)
    assert torch.equal(out, dsm)
    out.sum().backward()
    assert dsm.grad.tolist() == [0, 1, 1, 1, 1, 0]                     # far enough, in the direction of the advantage


def test_best_and_worst():
    adv = torch.tensor([.1, 2., -1., .3, 1., 1., 1., 1., -3., 0., 2., .5])
    keep, sign = dgpo.best_and_worst(adv, 4)
    assert keep.tolist()[:2] == [1, 2] and keep.tolist()[4:] == [10, 8]
    assert sign.tolist() == [1, -1, 0, 0, 1, -1]                       # the constant group teaches nothing


# =============================================================================================================== GRPO

def test_policy_loss_of_ratios_that_overflow():
    """exp(200) is infinite in float32: times an advantage of 0 it would be NaN, and so a clipped one's gradient."""
    logp = torch.tensor([200., 200., 0.], requires_grad=True)
    loss, _ = grpo.policy_loss(logp, torch.zeros(3), torch.tensor([0., 1., 1.]), .2)
    loss.backward()
    assert loss.item() == pytest.approx(-2.2 / 3) and logp.grad.tolist() == pytest.approx([0, 0, -1 / 3])


def test_policy_loss_against_loops_and_finite_differences():
    logp_old, adv, c = randn(64, seed=1), randn(64, seed=2), .1
    logp = logp_old + .15 * randn(64, seed=3)
    naive, clipped = 0.0, 0
    for a, b, A in zip(logp.tolist(), logp_old.tolist(), adv.tolist()):
        r = math.exp(a - b)
        cut = min(max(r, 1 - c), 1 + c)
        naive, clipped = naive - min(r * A, cut * A) / 64, clipped + (r != cut)
    loss, stats = grpo.policy_loss(logp, logp_old, adv, c)
    close(loss, naive)
    close(stats["clip_frac"], clipped / 64, 1e-6)
    close(stats["ratio"], (logp - logp_old).exp().mean())
    close(stats["approx_kl"], ((logp - logp_old) ** 2).mean() / 2)
    assert 0 < clipped < 64
    assert torch.autograd.gradcheck(lambda x: grpo.policy_loss(x, logp_old, adv, c)[0], logp.requires_grad_())


def test_policy_gradient_at_the_old_policy_is_reinforce():
    """At logp == logp_old the gradient is that of -mean A log p(x_next | x_t), the density torch.distributions'."""
    x, x_next, adv = randn(6, 3, 4, 4, seed=1), randn(6, 3, 4, 4, seed=2), randn(6, seed=3)
    theta = torch.tensor([.3, -.2], dtype=torch.float64, requires_grad=True)

    def velocity():
        return theta[0] * x + theta[1] * x.sin()
    _, logp, *_ = grpo.sde_step(velocity(), x, .6, .5, .7, x_next=x_next)
    loss, stats = grpo.policy_loss(logp, logp.detach(), adv, 1e-4)
    grad, = torch.autograd.grad(loss, theta)
    s = .7 * math.sqrt(.6 / .4)
    mean = x + (velocity() + s ** 2 / 1.2 * (x + .4 * velocity())) * -.1
    density = Normal(mean, s * math.sqrt(.1)).log_prob(x_next).flatten(1).mean(1)
    other, = torch.autograd.grad(-(adv * density).mean(), theta)
    close(grad, other, 1e-10)
    assert stats["ratio"] == 1 and stats["clip_frac"] == 0 and grad.abs().min() > 1e-3


def test_kl_loss_forms():
    mean, ref, v, v_ref = (randn(4, 3, 5, 5, seed=i) for i in range(4))
    s, dt = .9, -.07
    std = s * math.sqrt(-dt)
    exact = kl_divergence(Normal(mean, std), Normal(ref, std)).mean()
    close(grpo.kl_loss(mean, ref, v, v_ref, std, dt, "gaussian"), exact)
    close(grpo.kl_loss(mean, ref, v, v_ref, std, dt, "flow-grpo"), ((mean - ref) ** 2).mean() / (2 * s ** 2))
    close(grpo.kl_loss(mean, ref, v, v_ref, std, dt, "flow-grpo"), exact * -dt)
    close(grpo.kl_loss(mean, ref, v, v_ref, std, dt, "velocity"), ((v - v_ref) ** 2).mean())
    assert torch.autograd.gradcheck(lambda m: grpo.kl_loss(m, ref, v, v_ref, std, dt, "gaussian"),
                                    mean.requires_grad_())


# ============================================================================================== samplers, closed forms

def marginal(t):
    """Mean and variance of x_t = (1 - t) x_0 + t eps for x_0 ~ N(MEAN, STD^2)."""
    return (1 - t) * MEAN, ((1 - t) * STD) ** 2 + t ** 2


def velocity(x, t):
    """E[eps - x_0 | x_t] of that data, exactly."""
    mean, var = marginal(t)
    return (t / var - (1 - t) * STD ** 2 / var) * (x - mean) - MEAN


def noise_of(kind, steps):
    """Noise that makes an SDE of many steps; cps adds a fixed share a step, so there the share must fall with them."""
    return {"flow": .7, "dance": .7, "cps": 1.5 / math.sqrt(steps)}[kind]


def propagate(kind, steps, start=1.0):
    """The exact mean and std of x_0 from x_start's: a step's mean is affine in x_t, so the moments can be followed."""
    ts, (mean, var) = [start * t for t in models.schedule(steps)], marginal(start)
    probe = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    for t, t_next in zip(ts, ts[1:]):
        _, _, out, std = grpo.sde_step(velocity(probe, t), probe, t, t_next, noise_of(kind, steps), eps=probe,
                                       kind=kind,
                                       t_cap=ts[1])
        b, a = out[0].item(), (out[1] - out[0]).item()
        mean, var = a * mean + b, a ** 2 * var + std ** 2
    return mean, math.sqrt(var)


@pytest.mark.parametrize("kind", KINDS)
def test_sde_keeps_the_marginals_of_a_gaussian(kind):
    """From t = .9 the errors of the mean and of the std of x_0 fall as 1/steps. From noise they are small, too.

    (Near t = 1 the noise of kind flow grows as the steps shrink, s^2 dt = a^2/k in step k: no order to be seen there.)
    """
    errors = [[abs(a - b) for a, b in zip(propagate(kind, n, .9), (MEAN, STD))] for n in (400, 800, 1600)]
    for a, b in zip(errors, errors[1:]):
        assert all(1.8 < x / y < 2.2 or max(x, y) < 1e-6 for x, y in zip(a, b)), errors
    mean, std = propagate(kind, 1600)
    assert abs(mean - MEAN) < 1e-3 and abs(std - STD) < 1e-3


@pytest.mark.parametrize("schedule", ("linear", "sd3", "dpm"))
def test_the_first_step_of_flow_is_tame_on_every_schedule(schedule):
    """Ten steps, of which the dpm schedule's first is at .9997: there, too, the second time stands in 1 - t."""
    ts, probe = models.schedule(10, 3.0, schedule), torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    mean, var = marginal(ts[0])
    for t, t_next in zip(ts, ts[1:]):
        _, _, out, std = grpo.sde_step(velocity(probe, t), probe, t, t_next, .7, eps=probe, t_cap=ts[1])
        b, a = out[0].item(), (out[1] - out[0]).item()
        mean, var = a * mean + b, a ** 2 * var + std ** 2
        assert .4 < math.sqrt(var / marginal(t_next)[1]) < 2, t


@pytest.mark.parametrize("kind", KINDS)
def test_sde_samples_have_the_datas_mean_and_std(kind):
    """Drawn with eps, within four standard errors of what the moments above say."""
    n, steps, g = 20000, 100, torch.Generator().manual_seed(1)
    ts, x = models.schedule(steps), torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)
    for t, t_next in zip(ts, ts[1:]):
        eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
        x, *_ = grpo.sde_step(velocity(x, t), x, t, t_next, noise_of(kind, steps), eps, kind=kind, t_cap=ts[1])
    mean, std = propagate(kind, steps)
    assert abs(x.mean().item() - mean) < 4 * std / math.sqrt(n)
    assert abs(x.std().item() - std) < 4 * std / math.sqrt(2 * n)


@pytest.mark.parametrize("t, t_next", ((1.0, .8), (.8, .55), (.1, 0.0)))
@pytest.mark.parametrize("kind", KINDS)
def test_noise_zero_is_euler(kind, t, t_next):
    v, x, eps = (randn(2, 3, 4, 4, seed=i) for i in range(3))
    x_next, logp, mean, std = grpo.sde_step(v, x, t, t_next, 0.0, eps, kind=kind, t_cap=.8)
    close(x_next, x + (t_next - t) * v)
    close(grpo.euler_step(v, x, t, t_next), x + (t_next - t) * v)
    assert std == 0 and logp is None and torch.equal(mean, x_next)


@pytest.mark.parametrize("t, t_next", ((1.0, .8), (.8, .55), (.3, .1)))
@pytest.mark.parametrize("kind", KINDS)
def test_logp_is_the_normals_mean_over_dimensions(kind, t, t_next):
    v, x, eps = (randn(3, 2, 4, 4, seed=i) for i in range(3))
    x_next, logp, mean, std = grpo.sde_step(v, x, t, t_next, .7, eps, kind=kind, t_cap=.8)
    close(x_next, mean + std * eps)
    close(logp, Normal(mean, std).log_prob(x_next).flatten(1).mean(1))
    other = x_next + .1 * randn(3, 2, 4, 4, seed=9)                    # one that this step did not draw
    same, scored, *_ = grpo.sde_step(v, x, t, t_next, .7, x_next=other, kind=kind, t_cap=.8)
    close(scored, Normal(mean, std).log_prob(other).flatten(1).mean(1))
    assert same is other
    again = grpo.sde_step(v, x, t, t_next, .7, x_next=x_next, kind=kind, t_cap=.8)[1]
    assert torch.equal(again, logp)                                    # the ratio before the first update is exactly 1


def test_flow_std_at_t_1_is_the_released_codes():
    """There: sqrt(sigma / (1 - where(sigma == 1, sigmas[1], sigma))) * 0.7, and std = that * sqrt(-dt)."""
    ts = models.schedule(10, 3.0, "sd3")
    v, x, eps = (randn(2, 1, 2, 2, seed=i) for i in range(3))
    for t, t_next in zip(ts, ts[1:]):
        s = math.sqrt(t / (1 - (ts[1] if t == 1 else t))) * .7
        _, _, mean, std = grpo.sde_step(v, x, t, t_next, .7, eps, t_cap=ts[1])
        dt = t_next - t
        close(std, s * math.sqrt(-dt))
        close(mean, x * (1 + s ** 2 / (2 * t) * dt) + v * (1 + s ** 2 * (1 - t) / (2 * t)) * dt)
    for t in (.99, .5):                                                # and nowhere else, whatever t_cap
        assert grpo.sde_step(v, x, t, t - .1, .7, eps, t_cap=.3)[3] == grpo.sde_step(v, x, t, t - .1, .7, eps)[3]
    with pytest.raises(ValueError, match="t_cap"):
        grpo.sde_step(v, x, 1.0, .9, .7, eps)
    for step in (partial(grpo.sde_step, v, x, .9, .8, .7), partial(grpo.ddim_step, v, x, .3, .5, 1.0)):
        with pytest.raises(ValueError, match="give eps to take the step, or x_next to score one"):
            step()
        assert step(eps=eps)[1] is not None and step(x_next=x)[1] is not None
    assert grpo.sde_step(v, x, .9, .8, 0.0)[1] is None and grpo.ddim_step(v, x, .3, .5, 0.0)[1] is None
    with pytest.raises(ValueError, match="'flo'"):
        grpo.sde_step(v, x, .9, .8, .7, eps, kind="flo")


def test_cps_keeps_the_coefficients():
    """(1 - t_next) x_0hat + sqrt(t_next^2 - std^2) x_1hat + std eps: the noise's share stays t_next in all."""
    v, x, eps = (randn(2, 3, 2, 2, seed=i) for i in range(3))
    t, t_next, a = .7, .4, .6
    x_next, _, _, std = grpo.sde_step(v, x, t, t_next, a, eps, kind="cps")
    close(std, .4 * math.sin(.3 * math.pi))
    close(x_next, .6 * (x - .7 * v) + .4 * math.cos(.3 * math.pi) * (x + .3 * v) + std * eps)
    assert grpo.sde_step(v, x, .2, 0.0, a, eps, kind="cps")[1] is None     # the last step has no noise


def ode_error(steps, solver):
    """Distance from the exact solution of the probability-flow ODE, from t = .9 to .1."""
    ts = [.9 - .8 * i / steps for i in range(steps + 1)]
    x = torch.tensor([-1.5, .2, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    (m, var), (m_end, var_end) = marginal(ts[0]), marginal(ts[-1])
    truth, last, t_last = m_end + math.sqrt(var_end / var) * (x - m), None, None
    for t, t_next in zip(ts, ts[1:]):
        v = velocity(x, t)
        if solver == "euler":
            x = dgpo.euler_step(v, x, t, t_next)
        else:
            x, last, t_last = dgpo.dpm_step(x - t * v, last, x, t_last, t, t_next), x - t * v, t
    return (x - truth).abs().max().item()


@pytest.mark.parametrize("solver, order", (("euler", 1), ("dpm", 2)))
def test_order_of_convergence(solver, order):
    errors = [ode_error(n, solver) for n in (40, 80, 160, 320)]
    found = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(f - order) < .2 for f in found), found
    assert ode_error(20, "dpm") < ode_error(20, "euler") / 5


@pytest.mark.parametrize("steps", (5, 10, 28))
def test_dpm_step_is_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler
    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction",
                                         solver_order=2, solver_type="midpoint", algorithm_type="dpmsolver++")
    theirs.set_timesteps(steps)
    ts = models.schedule(steps, 3.0, "dpm")
    torch.testing.assert_close(torch.tensor(ts), theirs.sigmas, rtol=0, atol=2e-7)
    x = y = randn(2, 4, 6, 6, dtype=torch.float32)
    last = t_last = None
    for i, (t, t_next) in enumerate(zip(ts, ts[1:])):
        v = randn(2, 4, 6, 6, seed=i + 1, dtype=torch.float32)
        y = theirs.step(v, theirs.timesteps[i], y).prev_sample
        x, last, t_last = dgpo.dpm_step(x - t * v, last, x, t_last, t, t_next), x - t * v, t
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", (1, 10, 28, 40))
def test_euler_step_is_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    ts = models.schedule(steps, 3.0, "sd3")
    torch.testing.assert_close(torch.tensor(ts), theirs.sigmas, rtol=0, atol=2e-7)
    x = y = randn(2, 4, 6, 6, dtype=torch.float32)
    for i, (t, t_next) in enumerate(zip(ts, ts[1:])):
        v = randn(2, 4, 6, 6, seed=i + 1, dtype=torch.float32)
        y = theirs.step(v, theirs.timesteps[i], y).prev_sample
        x = dgpo.euler_step(v, x, t, t_next)
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


# ========================================================================================================== guidance

class Net(torch.nn.Module):
    """A network that says what it saw: x + t * context + pooled, and how many images went through."""

    def __init__(self, dtype):
        super().__init__()
        self.one, self.passes = torch.nn.Parameter(torch.ones((), dtype=dtype)), 0

    def forward(self, x, t, context, pooled):
        self.passes += len(x)
        assert x.dtype == self.one.dtype and t.dtype == torch.promote_types(x.dtype, torch.float32)
        return self.one * (x + t.to(x.dtype)[:, None, None, None] * context.mean((1, 2))[:, None, None, None]
                           + pooled.mean(1)[:, None, None, None])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_guided(dtype):
    net, x = Net(dtype), randn(4, 3, 2, 2, dtype=torch.promote_types(dtype, torch.float32))
    ctx, null = (randn(4, 5, 6, seed=1, dtype=dtype), randn(4, 7, seed=2, dtype=dtype)), \
        (randn(1, 5, 6, seed=3, dtype=dtype), randn(1, 7, seed=4, dtype=dtype))
    t = torch.full((4,), .5, dtype=x.dtype)
    cond, uncond = net(x.to(dtype), t, *ctx), net(x.to(dtype), t, *(n.expand_as(c) for n, c in zip(null, ctx)))
    net.passes = 0
    one = dgpo.guided(net, x, .5, ctx, null, 1)
    assert net.passes == 4 and one.dtype == x.dtype and torch.equal(one, cond.to(x.dtype))
    for when in (.5, t):                                               # a float, or one time an image
        net.passes = 0
        got = dgpo.guided(net, x, when, ctx, null, 4.5)
        assert net.passes == 8 and got.dtype == x.dtype
        close(got, uncond.double() + 4.5 * (cond.double() - uncond.double()), 1e-5)
    close(dgpo.guided(net, x, .5, ctx, null, 0.0), uncond, 1e-6)
    got.sum().backward()
    assert net.one.grad is not None                                    # both passes are trained
    both, net.one.grad = net.one.grad, None
    half = dgpo.guided(net, x, t, ctx, null, 4.5, detach=True)         # the conditional one alone: 4.5 times its own
    half.sum().backward()
    trained, net.one.grad = net.one.grad, None
    dgpo.guided(net, x, t, ctx, null, 1).sum().backward()
    close(half, got, 1e-5)
    close(trained, 4.5 * net.one.grad.double(), 1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert not torch.equal(trained, both)
