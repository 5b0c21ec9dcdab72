"""proxt2i.py: samplers and losses against closed forms, its chain against torch.distributions, its stages."""
import contextlib
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import data
import mixture
import models
import proxt2i
import test_loop

ROOT = Path(__file__).resolve().parent.parent


def gaussian(m, s2):
    """The exact proximal operator and score of the diffusion of N(m, s2): X_t ~ N(sqrt(a) m, a s2 + 1 - a)."""
    def moments(t):
        a = proxt2i.alpha_bar(t)
        return math.sqrt(a) * m, a * s2 + 1 - a

    def prox(y, t, lam):
        mean, var = moments(t)
        return (var * y + lam * mean) / (var + lam)

    def score(x, t):
        mean, var = moments(t)
        return (mean - x) / var
    return {"prox": prox, "score": score}


def distance(name, m, s2, n, start=(0.0, 1.0)):
    """W2 between N(m, s2) and what n steps of a sampler make of N(0, 1), exact: every step is affine in x and noise."""
    answer = gaussian(m, s2)[proxt2i.SAMPLERS[name]]

    def end(x, noise):
        value = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
        return proxt2i.run_chain(name, answer, value, n, lambda k: torch.full_like(value, noise.get(k, 0.0))).item()
    mean = end(start[0], {})
    var = (end(start[0] + 1, {}) - mean) ** 2 * start[1] + sum((end(start[0], {k: 1.0}) - mean) ** 2
                                                              for k in range(1, n + 1))
    return math.hypot(mean - m, math.sqrt(var) - math.sqrt(s2))


# ============================================================================================================ samplers

def test_beta_integral():
    t = torch.linspace(0, 1, 100001, dtype=torch.float64)
    beta = 0.1 + 19.9 * t
    assert proxt2i.beta_integral(0.0, 1.0) == pytest.approx(torch.trapezoid(beta, t).item(), rel=1e-9)
    part = (t >= 0.25) & (t <= 0.75)
    assert proxt2i.beta_integral(0.25, 0.75) == pytest.approx(torch.trapezoid(beta[part], t[part]).item(), rel=1e-9)
    assert proxt2i.alpha_bar(0.5) == pytest.approx(math.exp(-proxt2i.beta_integral(0.0, 0.5)))
    assert proxt2i.alpha_bar(torch.tensor(0.5)).item() == pytest.approx(proxt2i.alpha_bar(0.5))


@pytest.mark.parametrize("m, s2, n, expected", (
    (2.0, 0.01, 4, dict(hybrid=.086, sde=.709, ode=.722)), (2.0, 0.01, 10, dict(hybrid=.067, sde=.235, ode=.229)),
    (1.0, 1.0, 4, dict(hybrid=.312, sde=.286))), ids=str)
def test_distances_of_gaussians(m, s2, n, expected):
    """Narrow data: the backward step is far ahead of both Euler samplers. Broad data: it is not."""
    for name, value in expected.items():
        assert distance(name, m, s2, n) == pytest.approx(value, abs=1.5e-3), name


def test_the_last_steps_noise_is_most_of_eulers_error():
    """Without it Euler-Maruyama is near the hybrid at 4 steps and ahead of it at 10: what the comparison rests on."""
    assert distance("sde", 2.0, 0.01, 4) > 5 * distance("sde-mean", 2.0, 0.01, 4)
    assert distance("hybrid", 2.0, 0.01, 4) < distance("sde-mean", 2.0, 0.01, 4)
    assert distance("sde-mean", 2.0, 0.01, 10) < distance("hybrid", 2.0, 0.01, 10)


@pytest.mark.parametrize("name", tuple(proxt2i.SAMPLERS))
def test_samplers_converge(name):
    """Each one's error falls towards 0 as steps grow; the second-order one's faster than 1/n."""
    errors = [distance(name, 1.0, 0.25, n) for n in (20, 40, 80, 200)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02
    if name == "dpm":
        assert errors[1] < errors[0] / 2.5


@pytest.mark.parametrize("steps", (4, 10, 25))
def test_dpm_step_is_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler
    theirs = DPMSolverMultistepScheduler(solver_order=2, solver_type="midpoint", prediction_type="sample",
                                         algorithm_type="dpmsolver++", final_sigmas_type="zero")
    theirs.set_timesteps(steps)
    ts = [k / steps for k in range(steps, -1, -1)]
    theirs.sigmas = torch.tensor([(1 / proxt2i.alpha_bar(t) - 1) ** .5 for t in ts], dtype=torch.float64)
    x = y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    last = t_last = None
    for i, (t, t_next) in enumerate(zip(ts, ts[1:])):
        clean = torch.randn(x.shape, dtype=torch.float64)
        y = theirs.step(clean, theirs.timesteps[i], y).prev_sample
        x, last, t_last = proxt2i.dpm_step(clean, last, x, t_last, t, t_next), clean, t
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_many_samples_follow_the_recursion():
    """200,000 samples of the hybrid: mean and standard deviation of the exact affine recursion."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((200_000, 1, 1, 1), generator=draw, dtype=torch.float64)
    x = proxt2i.run_chain("hybrid", gaussian(2.0, 0.01)["prox"], x, 6,
                          lambda k: torch.randn(x.shape, generator=draw, dtype=torch.float64))
    sampled = math.hypot(x.mean().item() - 2.0, x.std().item() - 0.1)
    assert sampled == pytest.approx(distance("hybrid", 2.0, 0.01, 6), abs=2e-3)


def test_samplers_on_a_mixture_in_the_plane():
    """Narrow modes: the backward step lands in one, where the others land between them. Broad ones: it is not ahead."""
    def far(name, std, steps):
        return mixture.w2(mixture.cloud(name, std, steps, n=600), mixture.data_samples(std, 600, 1))
    narrow = {(name, n): far(name, .1, n) for n in (4, 10) for name in ("hybrid", "sde", "ode", "sde-mean", "dpm")}
    for n in (4, 10):
        assert all(narrow["hybrid", n] < .75 * narrow[name, n] for name in ("sde", "ode", "sde-mean", "dpm")), narrow
    assert narrow["hybrid", 4] < .16 and narrow["sde", 4] > .5
    assert far("pda", .1, 10) == pytest.approx(narrow["hybrid", 10], abs=.03)
    assert far("sde", .6, 4) < far("hybrid", .6, 4)
    floor = mixture.w2(mixture.data_samples(.1, 600, 2), mixture.data_samples(.1, 600, 1))
    assert floor < far("hybrid", .1, 100) < floor + .03                # and it converges


def test_the_mixtures_proximal_operator_is_the_minimum():
    """Against a search of the whole plane on a grid, for points near and between the modes."""
    prox, t, lam = mixture.answers(.1)["prox"], .1, .3
    a = proxt2i.alpha_bar(t)
    means, var = math.sqrt(a) * mixture.MODES, a * .01 + 1 - a
    axis = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)                            # (N, 2)
    log_p = (-torch.cdist(grid, means).square() / (2 * var)).logsumexp(1)
    for y in torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5:
        found = prox(y.view(1, 2, 1, 1), t, lam).view(1, 2)
        best = (grid - y).square().sum(1) / (2 * lam) - log_p
        mine = (found - y).square().sum() / (2 * lam) - (-torch.cdist(found, means).square() / (2 * var)).logsumexp(1)
        assert mine.item() <= best.min().item() + 1e-9
        assert (found - grid[best.argmin()]).norm() < .02


def test_euler_with_the_papers_gamma():
    """--score-gamma start: X' = X + gamma (X/2 + score) + sqrt(gamma) xi, gamma = beta(t) dt, as [2]; half of it."""
    score, n = gaussian(0.7, 0.3)["score"], 5
    noise = {k: torch.randn(4, 1, 2, 2, dtype=torch.float64) for k in range(n + 1)}
    x = {"sde": noise[0], "ode": noise[0]}
    for k in range(n, 0, -1):
        gamma = torch.linspace(.1, 20, n + 1, dtype=torch.float64)[k] / n
        x["sde"] = x["sde"] + gamma * (x["sde"] / 2 + score(x["sde"], k / n)) + gamma.sqrt() * noise[k]
        x["ode"] = x["ode"] + gamma / 2 * (x["ode"] + score(x["ode"], k / n))
    for name, want in x.items():
        torch.testing.assert_close(proxt2i.run_chain(name, score, noise[0], n, noise.__getitem__, "start"), want)


def test_pda_refuses_steps_that_are_too_long():
    prox, x = gaussian(0.0, 1.0)["prox"], torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="gamma=2.10.*hybrid"):
        proxt2i.pda_step(prox, x, 0.5, 2.1, x)
    with pytest.raises(ValueError, match="10 steps or more"):
        proxt2i.pda_lambdas(9)
    assert max(proxt2i.pda_lambdas(10)) == pytest.approx(38.2, abs=.1)
    with pytest.raises(ValueError, match="4 steps of PDA"):
        proxt2i.Config(scheme="pda", stage="train")
    with pytest.raises(ValueError, match="rl wants --scheme hybrid"):
        proxt2i.Config(scheme="pda")
    assert proxt2i.Config(scheme="pda", stage="sample").candidates     # training's own: what it was trained on is known


def test_a_step_solves_its_implicit_equation():
    """Hybrid: x' = x + gamma (x/2 + score(x')) + noise. PDA: x' = x + gamma (x'/2 + score(x')) + noise. Both at x'."""
    exact, gamma, t = gaussian(0.7, 0.3), 0.4, 0.3
    x, eps = torch.randn(2, 5, 1, 1, 1, dtype=torch.float64)
    after, _ = proxt2i.pda_hybrid_step(exact["prox"], x, t, gamma, eps)
    slope = gamma * exact["score"](after, t) + math.sqrt(gamma) * eps
    torch.testing.assert_close(after, x + gamma / 2 * x + slope)
    after, _ = proxt2i.pda_step(exact["prox"], x, t, gamma, eps)
    slope = gamma * exact["score"](after, t) + math.sqrt(gamma) * eps
    torch.testing.assert_close(after, x + gamma / 2 * after + slope)


# ============================================================================================================ matching

@pytest.mark.parametrize("fused", (True, False))
def test_matching_loss(fused, monkeypatch):
    monkeypatch.setattr(proxt2i.ops, "wanted", fused)
    pred, target = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = [1 - math.exp(-((a - b) ** 2).mean().item() / .49) for a, b in zip(pred, target)]
    assert proxt2i.prox_matching_loss(pred, target, .7).tolist() == pytest.approx(want)
    with pytest.raises(ValueError, match="same shape"):
        proxt2i.prox_matching_loss(pred, target[:1], .7)


def test_proximal_matching_finds_soft_thresholding():
    """A 1-D Laplace prior: the minimiser is the posterior mean for wide zeta and soft-thresholding as zeta falls."""
    draw = torch.Generator().manual_seed(0)
    n, lam = 400_000, 0.5
    x = torch.distributions.Exponential(1.0).icdf(torch.rand(n, generator=draw)) * torch.randn(n, generator=draw).sign()
    y = x + math.sqrt(lam) * torch.randn(n, generator=draw)
    places = torch.linspace(-3, 3, 61)                                 # the learned map: a value for each bin of y
    bins, inside = ((y + 3.05) / 0.1).long(), y.abs() < 3.05
    x, bins = x[inside], bins[inside]
    soft = places.sign() * (places.abs() - lam).clamp(min=0)

    def learn(zeta, table, rounds):
        table = table.clone().requires_grad_()
        opt = torch.optim.Adam([table], lr=0.02)
        for _ in range(rounds):
            loss = proxt2i.prox_matching_loss(table[bins][:, None], x[:, None], zeta).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        return table.detach()
    table, errors = learn(10.0, places * 0.5, 150), []
    count = torch.bincount(bins, minlength=61)
    mean = torch.zeros(61).index_add_(0, bins, x) / count
    assert (table - mean)[5:-5].abs().max() < 0.05                     # wide: the mean
    for zeta in (1.0, 0.5, 0.3):
        table = learn(zeta, table, 80)
        errors.append((table - soft)[10:-10].abs().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.08 < (mean - soft)[10:-10].abs().mean()


def test_pairs_are_those_that_the_sampler_meets():
    u = torch.rand(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scheme in ("hybrid", "pda"):
        candidates = (10, 25)
        t, lam = proxt2i.draw_pairs(u, candidates, scheme)
        met = {(round(k / n, 9), round(lam_k, 6)) for n in candidates for k, lam_k in enumerate(reversed(
            proxt2i.pda_lambdas(n) if scheme == "pda" else [proxt2i.beta_integral(k / n, (k + 1) / n)
                                                            for k in reversed(range(n))]))}
        drawn = {(round(a, 9), round(b, 6)) for a, b in zip(t.tolist(), lam.tolist())}
        assert drawn == met
        assert (t < 0.1).double().mean() == pytest.approx(0.5 * 0.1 + 0.5 * 0.12, abs=.01)


@pytest.mark.parametrize("settings, share, expected", (
    (dict(warmup=.2), .1, "l1"), (dict(warmup=.2, zeta_start=2.0), .6, 1.5), (dict(), .5, 1.0),
    (dict(zeta_space="x"), .5, "x"), (dict(method="score", sampler=""), .5, "l2")), ids=str)
def test_matching_loss_follows_its_schedule(settings, share, expected):
    pred, target = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    lam = torch.rand(6, dtype=torch.float64) + .1
    got = proxt2i.matching_loss(proxt2i.Config(**settings), share, pred, target, lam.sqrt())
    square = (pred - target).square().flatten(1).mean(1)
    if expected == "l1":
        want = (pred - target).abs().mean()
    elif expected == "l2":
        want = square.mean()
    elif expected == "x":                                              # |x - y|^2 = lam |r - eps|^2 against zeta
        want = (1 - (-lam * square).exp()).mean()
    else:
        want = (1 - (-square / expected ** 2).exp()).mean()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lam", (None, .3, 4.0))
def test_both_kinds_of_answer_are_one_operator(lam):
    """Networks that know the best v, or the best noise, for Gaussian data give the closed form's prox and score."""
    m, s2, t = .7, .04, .35
    method, exact = ("score", "prox")[lam is not None], gaussian(m, s2)
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64) * 1.5
    want = exact[method](x, t, lam) if lam else exact[method](x, t)
    for predict in ("noise", "v"):
        class Net(torch.nn.Module):
            config = {"predict": predict}

            def forward(self, x, t, lam):
                a, s = (level[:, None, None, None] for level in proxt2i.levels(t, 0.0 if lam is None else lam))
                x_0 = m + a * s2 / (a ** 2 * s2 + s ** 2) * (x - a * m)                    # the posterior's mean
                noise = (x - a * x_0) / s
                if predict == "v":
                    return a * noise - s * x_0
                return noise if lam is None else noise * (lam / (1 + lam)).sqrt()[:, None, None, None] / s
        net = Net().double()
        net.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        answer = proxt2i.answer_of(method, net, [], [], 1.0)
        torch.testing.assert_close(answer(x, t, lam) if lam else answer(x, t), want)


# ================================================================================================================== RL

def test_log_probs_are_those_of_torch():
    y, prox = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    want = torch.distributions.Normal(1.2 * prox, math.sqrt(.4)).log_prob(y).flatten(1).mean(1)
    torch.testing.assert_close(proxt2i.prox_logp(y, prox, .4), want)


def test_kl_is_that_of_torch():
    mean, mean_ref = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    one, two = (torch.distributions.Normal(m, math.sqrt(.4)) for m in (mean, mean_ref))
    torch.testing.assert_close(proxt2i.gaussian_kl(mean, mean_ref, math.sqrt(.4)),
                               torch.distributions.kl_divergence(one, two).mean())


@pytest.mark.parametrize("method", ("prox", "score"))
def test_gradient_of_the_objective(method):
    """Clipped objective and KL of one step of a real network's chain, guided: autograd against central differences."""
    config = models.UVITS["tiny"] | {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 8, "predict": "v",
                                     "lam": method == "prox"}
    torch.manual_seed(0)
    net = models.UViT(**config).init_weights().double()
    ctx, null = [torch.randn(3, 16, 128, dtype=torch.float64)], [torch.randn(1, 16, 128, dtype=torch.float64)]
    state, after = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    adv, k, n = torch.tensor([1.0, -.5, .3], dtype=torch.float64), 3, 4

    def step():
        mean, std = proxt2i.kernel(method, proxt2i.answer_of(method, net, ctx, null, 2.0), state, k, n)
        return proxt2i.gaussian_logp(after, mean, std), mean, std
    with torch.no_grad():
        logp_old, mean_ref, _ = step()
    weights = [p.detach().clone() for p in net.parameters()]
    ways = [torch.randn_like(p) for p in weights]

    def objective(size):
        """At the weights moved by `size`, with ratios inside and outside the clip's range."""
        with torch.no_grad():
            for p, w, d in zip(net.parameters(), weights, ways):
                p.copy_(w + size * d)
        logp, mean, std = step()
        loss, _ = proxt2i.policy_loss(logp, logp_old + torch.tensor([0, .3, -.3]), adv, .1)
        return loss + .5 * proxt2i.gaussian_kl(mean, mean_ref, std)
    loss = objective(.1)
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss, list(net.parameters())), ways))
    with torch.no_grad():
        want = (objective(.1 + 1e-5) - objective(.1 - 1e-5)) / 2e-5
    assert abs(want) > 1e-2
    torch.testing.assert_close(slope, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method, how", (("prox", "integral"), ("prox", "start"), ("score", "integral"),
                                         ("score", "start")))
def test_kernel_is_the_sampler(method, how):
    """The chain of means and noises gives the very image that run_chain gives from the same draws."""
    answer, n = gaussian(0.7, 0.3)[method], 5
    draws = {k: torch.randn(4, 1, 2, 2, dtype=torch.float64) for k in (*range(1, n + 1), "start")}
    name = {"prox": "hybrid", "score": "sde-mean"}[method]
    want = proxt2i.run_chain(name, answer, draws["start"], n, draws.__getitem__, how)
    same = torch.equal(want, proxt2i.run_chain(name, answer, draws["start"], n, draws.__getitem__))
    assert same == (method == "prox" or how == "integral")             # the proximal samplers have the integral always
    state = draws["start"]
    if method == "prox":
        gamma = proxt2i.beta_integral(1 - 1 / n, 1.0)
        state = (1 + gamma / 2) * state + math.sqrt(gamma) * draws[n]
    for k in range(n, 0, -1):
        mean, std = proxt2i.kernel(method, answer, state, k, n, how)
        state = mean + std * draws[k - (method == "prox")] if std else mean
    torch.testing.assert_close(state, want)


@pytest.mark.parametrize("method, scale", (("prox", 1.0), ("prox", 3.0), ("score", 3.0)))
def test_rollout_is_the_samplers_chain(method, scale, fresh):
    """Its states: the sampler's start, steps and image, from the groups' own noise; its log-probs: those of torch."""
    pipe, names = models.load(fresh / method, dtype=torch.float64), ("start", "first", "step 3", "step 2", "step 1")
    cfg = proxt2i.Config(method=method, sample_steps=3, group_size=2, micro_batch=3, cfg_rollout=scale, dtype="float64")
    ctx, null = pipe.encode_text(["a red ring"] * 2 + ["a blue star"] * 2), pipe.encode_text([""])
    states, logp = proxt2i.rollout(pipe, ctx, null, cfg, 7, [4, 9])
    start, first, *steps = (torch.cat([data.noise((2, 3, 28, 28), 0, 7, g, name) for g in (4, 9)]).double()
                            for name in names)
    draws = dict(zip((3, 2, 1), [first, *steps] if method == "prox" else steps))       # hybrid's are a step earlier
    answer = proxt2i.answer_of(method, pipe.net, ctx, null, scale)
    sampler = {"prox": "hybrid", "score": "sde-mean"}[method]
    with torch.no_grad():
        want = proxt2i.run_chain(sampler, answer, start, 3, draws.__getitem__, cfg.score_gamma)
        torch.testing.assert_close(states[-1], want)
        assert sorted(logp) == [2, 3] and len(states) == 4
        for k in logp:
            mean, std = proxt2i.kernel(method, answer, states[3 - k], k, 3, cfg.score_gamma)
            torch.testing.assert_close(states[4 - k], mean + std * dict(zip((3, 2, 1), steps))[k])
            likely = torch.distributions.Normal(mean, std).log_prob(states[4 - k]).flatten(1).mean(1)
            torch.testing.assert_close(logp[k], likely)


@pytest.mark.parametrize("n", (4, 10))
@pytest.mark.parametrize("method", ("prox", "score"))
def test_what_holds_the_last_landing(method, n):
    """hold_error is 0 for the reference, (shift)^2 for an operator that lands a shift away, at any number of steps; it
    asks at the noise of the chain's last step, and has a gradient to the policy alone."""
    x_0, eps = torch.randn(2, 500, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen, shift = [], torch.tensor(.1, dtype=torch.float64, requires_grad=True)
    gamma = proxt2i.beta_integral(0.0, 1 / n)

    @contextlib.contextmanager
    def reference():                                                   # while it lasts, the policy has other weights
        weights["by"] = 0
        yield
        weights["by"] = by

    def policy(y, t, lam=None):
        seen.append((y, t, lam))
        return y / 2 + weights["by"]
    by = shift if method == "prox" else shift / gamma                  # the score's step is gamma long
    weights = {"by": by}
    assert proxt2i.hold_error(method, policy, contextlib.nullcontext(), x_0, n, eps) == 0
    error = proxt2i.hold_error(method, policy, reference(), x_0, n, eps)
    error.backward()
    assert error.item() == pytest.approx(.01) and shift.grad.item() == pytest.approx(.2)
    y, t, lam = seen[-1]
    assert (t, lam) == ((0, gamma) if method == "prox" else (1 / n, None))
    signal = 1 if method == "prox" else proxt2i.alpha_bar(1 / n)
    noise = gamma if method == "prox" else 1 - proxt2i.alpha_bar(1 / n)
    assert torch.allclose(y, signal ** .5 * x_0 + noise ** .5 * eps)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Untrained tiny models of both kinds, whose head is not zero."""
    out = tmp_path_factory.mktemp("uvit")
    for name, lam in (("prox", True), ("score", False)):
        pipe = models.fresh_uvit(f"tiny-{name}", None, lam, torch.float32, "cpu", 0)
        models.save_uvit(pipe, out / name, None)
    return out


def run(argv, capsys):
    proxt2i.main([str(word) for word in argv])
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


FEW = ["--eval-images", 2, "--val-images", 2, "--cfg-also", 0, "--eval-every", 0]     # compare has steps of its own
SMALL = [*FEW, "--eval-steps", 2]


@pytest.mark.parametrize("method", ("prox", "score"))
def test_rl_runs_and_its_first_ratio_is_one(method, fresh, tmp_path, capsys, monkeypatch, reward_file):
    monkeypatch.chdir(tmp_path)
    line = ["rl", "--method", method, "--model", fresh / method, "--steps", 1, "--groups", 2, "--group-size", 2,
            "--updates", 1, "--sample-steps", 3, "--reward", f"{reward_file}:red",
            "--eval-reward", f"{reward_file}:red", "--dtype", "float64", "--lr", 1e-3, "--out", "out", *SMALL]
    backwards = test_loop.no_swap_before_backward(models.UViT, monkeypatch)
    last = run(line, capsys)
    assert backwards == [1, 1, 1]                                      # two steps of the chain, the last landing
    assert last["method"] == method and last["images"] == 4 and last["eval_after"] != last["eval_before"]
    rows = [json.loads(row) for row in Path("out/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-12) and rows[0]["backwards"] == 4 * 2 + 2
    assert rows[0]["hold"] < 1e-12                                     # nothing had moved yet
    again = models.load("out/model").net
    assert not torch.equal(again.pos_embed, models.UViT.from_pretrained(fresh / method / "transformer").pos_embed)


def watched(monkeypatch, *calls):
    """What a run's calls of (owner, name) answer, or what `kept` makes of it, by name; "update": its gradients; and the
    weights before it, after it and their average. Nothing is evaluated or saved."""
    seen, update = {"update": []}, data.Run.update

    def watch(owner, name, kept=lambda args, out: out):
        honest = getattr(owner, name)

        def call(*args, **named):
            out = honest(*args, **named)
            seen.setdefault(name, []).append(kept(args, out))
            return out
        monkeypatch.setattr(owner, name, call)
    for call in calls:
        watch(*call)
    monkeypatch.setattr(data.Run, "update", lambda self, opt, params, *rest: (
        seen["update"].append([p.grad.clone() for p in params]), update(self, opt, params, *rest))[1])
    monkeypatch.setattr(data, "finish", lambda run, start: seen.update(start=start, params=run.params, ema=run.ema))
    return seen


@pytest.mark.parametrize("method", ("prox", "score"))
def test_an_update_of_rl_by_hand(method, fresh, tmp_path, capsys, monkeypatch, reward_file):
    """Gradients of the whole objective, Gaussians by torch.distributions; then clipping, AdamW and the average."""
    seen = watched(monkeypatch, (data.Run, "groups", lambda args, out: out[0]), (proxt2i, "rollout"),
                   (proxt2i, "group_advantage"))
    monkeypatch.chdir(tmp_path)
    line = ["rl", "--method", method, "--model", fresh / method, "--steps", 1, "--groups", 2, "--group-size", 5,
            "--updates", 2, "--micro-batch", 3, "--sample-steps", 4, "--candidates", 6, "--train-last", 0,
            "--train-steps", 0, "--kl-beta", 50, "--hold", 7, "--clip-range", .002, "--cfg-rollout", 2, "--cfg-train",
            2, "--cfg-ref", 2, "--ema", .6, "--lr", 1e-3, "--weight-decay", .1, "--max-grad-norm", .01, "--reward",
            f"{reward_file}:red", "--eval-reward", f"{reward_file}:red", "--dtype", "float64", "--out", "out", *SMALL]
    proxt2i.main([*map(str, line)])
    states, logp_old = (torch.cat([out[0] for out in seen["rollout"]], 1),
                        {k: torch.cat([out[1][k] for out in seen["rollout"]]) for k in (4, 3, 2)})
    (prompts,), (adv, *_) = seen["groups"], seen["group_advantage"]
    policy, reference = (models.load(fresh / method, dtype=torch.float64) for _ in range(2))
    weights, null = list(policy.net.parameters()), policy.encode_text([""])
    hand, average = [p.clone().requires_grad_() for p in seen["start"]], [p.clone() for p in seen["start"]]
    opt = torch.optim.AdamW(hand, lr=1e-3, weight_decay=.1)
    sums = dict(loss=0, kl=0, hold=0)
    for u in range(2):                                                 # each trains on one of the two groups
        own = slice(5 * u, 5 * u + 5)
        with torch.no_grad():
            for p, value in zip(weights, hand):
                p.copy_(value)
        for p in weights:
            p.requires_grad_()
        ask, ask_ref = (proxt2i.answer_of(method, pipe.net, pipe.encode_text(prompts[own]), null, 2.0)
                        for pipe in (policy, reference))
        loss, kl = [], []
        for k in (4, 3, 2):
            state, after = states[4 - k, own], states[5 - k, own]
            ours, theirs = (torch.distributions.Normal(*proxt2i.kernel(method, f, state, k, 4)) for f in (ask, ask_ref))
            ratio = (ours.log_prob(after).flatten(1).mean(1) - logp_old[k][own]).exp()
            loss.append(-torch.minimum(ratio * adv[own], ratio.clamp(.998, 1.002) * adv[own]).mean())
            kl.append(torch.distributions.kl_divergence(ours, theirs).mean())
        few = [5 * u, 5 * u + 4]                                       # a quarter of five images
        ask, ask_ref = (proxt2i.answer_of(method, pipe.net, pipe.encode_text([prompts[j] for j in few]), null, 2.0)
                        for pipe in (policy, reference))
        eps = data.noises((3, 28, 28), [(0, 0, j, "hold") for j in few], "cpu", torch.float64)
        gamma, a = proxt2i.beta_integral(0, 1 / 6), proxt2i.alpha_bar(1 / 6)
        y = states[-1, few] + gamma ** .5 * eps if method == "prox" else a ** .5 * states[-1, few] + (1 - a) ** .5 * eps
        landed, landed_ref = (f(y, 0, gamma) if method == "prox" else y + gamma * (y / 2 + f(y, 1 / 6))
                              for f in (ask, ask_ref))
        hold = (landed - landed_ref.detach()).square().mean()
        loss, kl = sum(loss) / 3, sum(kl) / 3
        assert u == 0 or (kl > 1e-6 and hold > 1e-6)
        for p, want, g in zip(hand, torch.autograd.grad(loss + 50 * kl + 7 * hold, weights), seen["update"][u]):
            torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-9)
            p.grad = want
        for key, value in dict(loss=loss, kl=kl, hold=hold).items():
            sums[key] += value.item() / 2
        norm = torch.nn.utils.clip_grad_norm_(hand, .01).item()
        opt.step()
        for m, p in zip(average, hand):
            m += .4 * (p.detach() - m)
    row = json.loads(Path("out/metrics.jsonl").read_text())
    assert {key: row[key] for key in sums} == pytest.approx(sums, rel=1e-6) and row["grad_norm"] == pytest.approx(norm)
    for p, q, m, e in zip(hand, seen["params"], average, seen["ema"], strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(m, e)


def test_other_log_probs_than_the_rollouts_are_refused(fresh, tmp_path, capsys, monkeypatch, reward_file):
    """Before the first update: beyond a tenth of the clip range the same weights have to give the same."""
    monkeypatch.chdir(tmp_path)
    honest, more = proxt2i.ops.linear_step, []

    def other(*args, x_next=None, **named):
        x, logp = honest(*args, x_next=x_next, **named)
        return x, logp if x_next is None or logp is None else logp + more[0]
    monkeypatch.setattr(proxt2i.ops, "linear_step", other)
    line = ["rl", "--model", fresh / "prox", "--steps", 1, "--groups", 1, "--group-size", 2, "--updates", 1,
            "--sample-steps", 3, "--clip-range", .1, "--reward", f"{reward_file}:red", "--eval-reward",
            f"{reward_file}:red", "--dtype", "float64", "--hold", 0, *SMALL]
    more[:] = [.009]
    run([*line, "--out", "near"], capsys)
    more[:] = [-.011]
    with pytest.raises(SystemExit) as end:
        run([*line, "--out", "far"], capsys)
    assert end.value.code == 2 and "|ratio - 1| = 1.1e-02, over a tenth of --clip-range 0.1" in capsys.readouterr().err


def test_overlap_changes_no_number(fresh, tmp_path, capsys, monkeypatch, reward_file):
    """Three chunks of a group each, scored beside the next one's rollout and after it: equal, bit for bit."""
    monkeypatch.chdir(tmp_path)
    states = []
    for flag in ("--overlap", "--no-overlap"):
        run(["rl", "--model", fresh / "prox", "--steps", 2, "--groups", 3, "--group-size", 2, "--micro-batch", 2,
             "--updates", 1, "--sample-steps", 3, "--reward", f"{reward_file}:slow", "--eval-reward",
             f"{reward_file}:red", "--lr", 1e-3, "--out", flag[2:], flag, *SMALL], capsys)
        rows = [json.loads(row) for row in Path(flag[2:], "metrics.jsonl").read_text().splitlines()]
        states.append(([row | {"seconds": 0} for row in rows],
                       torch.load(f"{flag[2:]}/last/state.pt", weights_only=True)["params"]))
    (rows, params), (plain, others) = states
    assert rows == plain and rows[0]["reward"] != 0 and all(map(torch.equal, params, others))


@pytest.mark.parametrize("line, keys", (
    (("rl", "--steps", 2, "--groups", 4, "--group-size", 5, "--updates", 2, "--sample-steps", 3, "--lr", 1e-3),
     ("hold", "loss", "kl", "forwards", "backwards")),
    (("train", "--steps", 3, "--batch", 8, "--drop", .5, "--optimizer", "adamw"), ("loss", "grad_norm", "forwards"))),
    ids=("rl", "train"))
def test_two_processes_train_the_same_weights(line, keys, fresh, tmp_path, capsys, monkeypatch, reward_file):
    """torchrun with 2 processes and one, in other portions; RL holds the last landing; float64, equal to 1e-9."""
    monkeypatch.chdir(tmp_path)
    reward = f"{reward_file}:red"
    model = fresh / "prox" if line[0] == "rl" else "tiny-prox"         # as large as it is: made anew
    line = [*line, "--model", model, "--reward", reward, "--eval-reward", reward, "--dtype", "float64", *SMALL]
    two = test_loop.process(ROOT / "proxt2i.py", [*map(str, line), "--out", "two", "--micro-batch", "3"], torchrun=True)
    run([*line, "--out", "one"], capsys)
    _, err = two.communicate(timeout=600)
    assert two.returncode == 0, err
    for name in ("one", "two") if line[0] == "train" else ():          # the tiny world needs no number of processes
        run(["train", "--resume", "--out", name, "--steps", 4], capsys)
    one, two = (torch.load(f"{name}/last/state.pt", weights_only=True) for name in ("one", "two"))
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(one["params"], two["params"]))
    rows, others = ([json.loads(row) for row in Path(name, "metrics.jsonl").read_text().splitlines()]
                    for name in ("one", "two"))
    for key in keys:
        assert rows[1][key] == pytest.approx(others[1][key], rel=1e-6), key


def test_rl_holds_the_landings_of_all_candidates(fresh, tmp_path, capsys, monkeypatch, reward_file):
    """Not those of the rollout's own number of steps alone: a draw for every update; none with --hold 0."""
    monkeypatch.chdir(tmp_path)
    seen, honest = [], proxt2i.hold_error
    monkeypatch.setattr(proxt2i, "hold_error", lambda *args: seen.append(args[4]) or honest(*args))
    line = ["rl", "--model", fresh / "prox", "--steps", 4, "--groups", 2, "--group-size", 2, "--updates", 2,
            "--sample-steps", 3, "--candidates", "4,6,25", "--reward", f"{reward_file}:red", "--eval-reward",
            f"{reward_file}:red", *SMALL]
    run([*line, "--out", "held"], capsys)
    assert len(seen) == 8 and set(seen) == {4, 6, 25}
    run([*line, "--hold", 0, "--out", "free"], capsys)
    assert len(seen) == 8


def test_latents_of_another_size_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cache").mkdir()
    samples = json.dumps([["0", "a ring"], ["1", "a star"]])
    save_file({"0": torch.zeros(2, 3, 8, 8), "1": torch.zeros(2, 16, 32)}, "cache/0-of-1-00000.safetensors",
              {"samples": samples})
    Path("cache/index.json").write_text('{"files": ["0-of-1-00000.safetensors"], "skipped": {}}')
    with pytest.raises(SystemExit) as end:
        run(["train", "--images", "cache", "--batch", 2, "--steps", 1, "--out", "out", *SMALL], capsys)
    assert end.value.code == 2 and "--images cache holds latents" in capsys.readouterr().err


def saved_as(out):
    """The dtypes of a run's network on disk, as safetensors calls them."""
    with safe_open(f"{out}/model/transformer/diffusion_pytorch_model.safetensors", "pt") as f:
        return {f.get_slice(name).get_dtype() for name in f.keys()}


@pytest.mark.parametrize("method, predict, first", (
    ("prox", "noise", 0), ("prox", "v", 298), ("score", "noise", 0), ("score", "v", 0)))
def test_what_training_asks_of_the_network_and_how_it_follows(method, predict, first, tmp_path, monkeypatch):
    """Inputs and targets against closed forms; then clipping, rate, AdamW and average by hand, from its gradients."""
    begin, seen = data.Run.begin, watched(
        monkeypatch, (data, "encoded", lambda args, out: out[0]), (data, "noises"),
        (proxt2i, "guided", lambda args, out: args[1:4]),
        (proxt2i, "matching_loss", lambda args, out: (*args[2:], out.detach())))
    monkeypatch.setattr(data.Run, "begin", lambda self, *args, **named: (
        begin(self, *args, **named), self.count.update(step=first)))
    monkeypatch.chdir(tmp_path)
    length = 3 / (first + 4)                                           # it falls in the last three steps of the four
    line = ["train", "--method", method, "--model", f"tiny-{method}", "--predict", predict, "--steps", first + 4,
            "--batch", 5, "--micro-batch", 3, "--lr", .03, "--cooldown", length, "--ema", .6, "--weight-decay", .1,
            "--max-grad-norm", .02, "--optimizer", "adamw", "--dtype", "float64", "--out", "out", *SMALL]
    proxt2i.main([*map(str, line)])
    hand = [p.clone().requires_grad_() for p in seen["start"]]
    opt, average = torch.optim.AdamW(hand, weight_decay=.1), [p.clone() for p in seen["start"]]
    for step, x_0, grads in zip(range(4), seen["encoded"], seen["update"], strict=True):
        noise, eps = seen["noises"][2 * step:2 * step + 2]
        scaled, t, lam = (None if parts[0] is None else torch.cat(parts)
                          for parts in zip(*seen["guided"][2 * step:2 * step + 2]))
        asked = seen["matching_loss"][2 * step:2 * step + 2]
        target, width = (torch.cat([one[i] for one in asked]) for i in (1, 2))
        a = proxt2i.alpha_bar(t)[:, None, None, None]
        x = a.sqrt() * x_0 + (1 - a).sqrt() * noise

        class Net(torch.nn.Module):
            config = {"predict": predict}

            def forward(self, x, t, lam, target):
                return target
        net = Net()
        net.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        for i in range(5):                                             # a network that answers what is asked for
            one = x[i:i + 1]
            if method == "score":
                answer = proxt2i.answer_of(method, net, [target[i:i + 1]], [], 1.0)(one, t[i].item())
                torch.testing.assert_close(scaled[i:i + 1], one)
                torch.testing.assert_close(answer, (a[i].sqrt() * x_0[i:i + 1] - one) / (1 - a[i]))
                continue
            strength = lam[i].item()
            y = one + math.sqrt(strength) * eps[i:i + 1]
            torch.testing.assert_close(scaled[i:i + 1], y / math.sqrt(1 + strength))
            answer, other = (proxt2i.answer_of(method, net, [target[i:i + 1] + more], [], 1.0)(y, t[i].item(), strength)
                             for more in (0, 1))
            if predict == "v":                                         # E[X_t | y, x_0]
                one = ((1 - a[i]) * y + strength * a[i].sqrt() * x_0[i:i + 1]) / (1 - a[i] + strength)
            torch.testing.assert_close(answer, one)
            torch.testing.assert_close((other - answer).abs(), width[i].expand_as(answer))
        assert [len(one[0]) for one in asked] == [3, 2]
        row = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[step])
        assert row["loss"] == pytest.approx((3 * asked[0][-1] + 2 * asked[1][-1]).item() / 5, rel=1e-6)
        for p, g in zip(hand, grads):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(hand, .02).item()
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-6) and norm > .02
        opt.param_groups[0]["lr"] = .03 * ((1, 1, 1, 2 / 3)[step] if first else (step + 1) / 200)
        opt.step()
        for m, p in zip(average, hand):
            m += max(.4, 1 / (first + step + 1)) * (p.detach() - m)
    for p, q, m, e in zip(hand, seen["params"], average, seen["ema"], strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(m, e)


@pytest.mark.parametrize("method", ("prox", "score"))
def test_training_resumes_bit_for_bit_and_can_be_loaded(method, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["train", "--method", method, "--model", f"tiny-{method}", "--batch", 4, "--save-every", 1, *SMALL]
    run([*line, "--steps", 3, "--out", "whole"], capsys)
    monkeypatch.setattr(data.Run, "done", lambda self: self.count["step"] >= 2)
    run([*line, "--steps", 3, "--out", "parts"], capsys)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run([*line, "--steps", 3, "--out", "parts", "--resume"], capsys)
    one, two = (torch.load(f"{name}/last/state.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one["params"] + one["ema"], two["params"] + two["ema"]))
    pipe = models.load("whole/model")
    assert pipe.family == "uvit" and pipe.latent_shape() == (3, 28, 28)
    assert pipe.net.config["lam"] == (method == "prox")
    written = json.loads(Path("whole/model/transformer/config.json").read_text())       # what it was trained for
    assert saved_as("whole") == {"F16"}                                # the tiny ones; in bfloat16, too
    assert written.get("candidates") == (proxt2i.Config.candidates if method == "prox" else None)
    if method == "prox":
        with pytest.raises(SystemExit):
            proxt2i.main(["sample", "--model", "whole/model", "--out", "no", "--scheme", "pda", "--candidates", "10",
                          *map(str, SMALL)])
        assert "trained for the lambdas of --scheme hybrid" in capsys.readouterr().err


def test_compare_writes_a_table(fresh, tmp_path, capsys, monkeypatch):
    """Two kinds of models, a second proximal one, a sweep of guidance, two rewards; a number of steps that is new."""
    monkeypatch.chdir(tmp_path)
    proxt2i.main([str(word) for word in (
        "compare", "--model", fresh / "prox", "--compare-with", f"{fresh / 'score'},{fresh / 'prox'}",
        "--compare-steps", "2,4", "--compare-cfg", "1,3", "--compare-rewards", "shapes-soft", "--out", "out", *FEW)])
    assert "--compare-steps 2: the proximal model was trained for 4,5,6,7,8,9,10,25 steps" in capsys.readouterr().out
    lines = [line.split(",") for line in Path("out/compare.csv").read_text().splitlines()]
    names = ["hybrid", "hybrid at guidance 1", "hybrid at guidance 3", "sde", "sde-mean", "ode", "dpm",
             "dpm at guidance 1", "dpm at guidance 3", "hybrid prox", "hybrid prox at guidance 1",
             "hybrid prox at guidance 3"]
    assert [line[0] for line in lines] == ["shapes-strict", *names, "shapes-soft", *names]
    assert lines[0][1:] == lines[13][1:] == ["2", "4"]
    assert lines[14][1:] == lines[15][1:] == lines[23][1:] and all(0 <= float(w) <= 1 for w in lines[14][1:])
    for name in ("compare", "curves"):
        assert Image.open(f"out/samples/{name}.png").size[0] > 200


def test_compare_tells_a_models_weights_from_another_of_its_name(fresh, tmp_path, capsys, monkeypatch):
    """--weights are the first model's alone: beside it the same name stands for what ships. In a group, it is left."""
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    proxt2i.main([str(word) for word in (
        "compare", "--model", "tiny-prox", "--weights", fresh / "prox", "--compare-with", "tiny-prox,tiny-prox",
        "--compare-steps", "4", "--compare-rewards", "shapes-soft", "--out", "out", *FEW)])
    lines = [line.split(",") for line in Path("out/compare.csv").read_text().splitlines()]
    assert [line[0] for line in lines[4:]] == ["shapes-soft", "hybrid", "hybrid tiny-prox", "hybrid tiny-prox 3"]
    assert float(lines[5][1]) < .1 < float(lines[6][1]) == float(lines[7][1])              # untrained, and trained
    assert not dist.is_initialized()


def test_quick_start(fresh, tmp_path, capsys, monkeypatch, reward_file):
    """Both stages; bad input is refused before either, what is RL's alone is not, and nothing is compared twice."""
    monkeypatch.chdir(tmp_path)
    line = ["--model", fresh / "prox", "--compare-with", fresh / "score", "--compare-steps", "4", "--groups", 2,
            "--group-size", 2, "--out", "out", *SMALL]
    honest, seen = proxt2i.compare, []
    monkeypatch.setattr(proxt2i, "compare", lambda cfg: seen.append(cfg.resume) or honest(cfg))
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    for bad in (["--reward", "nope"], ["--out", "taken"], ["--out", "taken/notes.txt"]):
        with pytest.raises(SystemExit):
            run([*line, *bad], capsys)
    assert not seen and not Path("out-compare").exists()
    line += ["--lora-rank", 2, "--reward", f"{reward_file}:red"]
    monkeypatch.setattr(data, "comparison", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(line, capsys)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(proxt2i, "compare", lambda cfg: seen.append(cfg.resume) or honest(cfg))
    monkeypatch.setattr(proxt2i, "train_rl", lambda cfg: None)         # killed between the two
    proxt2i.main(list(map(str, line)))
    assert Path("out-compare/compare.csv").exists() and not Path("out").exists()
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["out"] == "out-compare" and last["eval_after"] is None
    assert next(csv.reader(Path("out-compare/compare.csv").open()))[1:] == ["4"]          # as asked, not 4 and 10
    proxt2i.main(list(map(str, line)))
    assert seen == [False, True]
    for length in (["--steps", "1"], ["--minutes=1"]):                 # who says how long wants the RL alone
        proxt2i.main([*map(str, line), *length])
    assert len(seen) == 2


def test_finetuning_a_lora(fresh, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(["finetune", "--model", "tiny-prox", "--lora-rank", 2, "--optimizer", "adamw", "--batch", 4, "--steps", 1,
         "--out", "out", *SMALL], capsys)
    assert Path("out/lora.safetensors").is_file() and not Path("out/model").exists()


def test_sheets_on_the_way_become_a_strip(tmp_path, capsys, monkeypatch):
    """One row of pictures for each evaluation, the first before training: the strip is all of them under one header."""
    monkeypatch.chdir(tmp_path)
    run(["train", "--model", "tiny-prox", "--batch", 4, "--steps", 2, "--out", "out", *SMALL, "--eval-every", 1,
         "--dtype", "float32"], capsys)
    assert saved_as("out") == {"F32"}
    sheets = [Image.open(f"out/samples/00000{n}.png") for n in (1, 2)]
    strip = Image.open("out/samples/strip.png")
    header = 2 * sheets[0].height - strip.height
    assert strip.width == sheets[0].width and 0 < header < sheets[0].height / 2
    assert np.array_equal(np.asarray(strip)[:sheets[0].height], np.asarray(sheets[0]))
    assert np.array_equal(np.asarray(strip)[sheets[0].height:], np.asarray(sheets[1])[header:])


@pytest.mark.parametrize("line, words", (
    (["rl", "--sampler", "sde"], "wants a score model"), (["rl", "--sampler", "pda"], "--scheme hybrid"),
    (["dance"], "dance"), (["rl", "--candidates", "4,x"], "4,x"), (["rl", "--sample-steps", 1], "2 or more"),
    (["rl", "--zeta", 0], "--zeta"), (["train", "--scheme", "pda"], "10 steps or more"),
    (["train", "--model", "tiny-prox", "--scheme", "pda", "--candidates", "10,25"], "2 steps of PDA"),
    (["finetune", "--model", "tiny"], "is no U-ViT"),
    (["train", "--lora-rank", 4], "--lora-rank 4: train makes all weights anew"),
    (["finetune", "--lora-rank", 4], "--optimizer adamw"),
    (["--stage", "train"], "--stage is the command's first word"), (["rl", "--stage=sample"], "--stage is the"),
    (["compare", "--compile"], "--compile is for training"),
    (["sample", "--lora-rank", 2], "--lora-rank is for training"),
    (["sample", "--sample-steps", 4], "--eval-steps"), (["compare", "--sample-steps=4"], "--compare-steps"),
    (["compare", "--eval-steps", 4], "--eval-steps is not for compare"),
    (["compare", "--sampler", "sde"], "--sampler has no use in compare"),
    (["compare", "--compare-cfg", "1,x"], "--compare-cfg '1,x'"),
    (["rl", "--scheme", "halfway"], "--scheme 'halfway' is unknown: hybrid, pda"),
    (["rl", "--sampler", "halfway"], "--sampler 'halfway' is unknown: hybrid, pda, sde, sde-mean, ode, dpm"),
    (["rl", "--method", "prox", "--model", "SCORE"], "lambda")), ids=str)
def test_bad_input(line, words, fresh, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [str(fresh / "score") if word == "SCORE" else str(word) for word in line]
    if "--model" not in line:
        line += ["--model", str(fresh / "prox")] if line[0] in proxt2i.STAGES else []
    with pytest.raises(SystemExit) as end:
        proxt2i.main([*line, "--out", "out", *map(str, FEW if line[0] == "compare" else SMALL)])
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and err.startswith("error: ") and words in err, err
    assert not Path("out").exists()


def test_presets(monkeypatch):
    """Of the paper's sizes, without a word about the model, and for it without a word about the preset."""
    for line in (["--preset", "paper"], ["--model", "uvit"], ["--preset", "official"]):
        cfg = data.cli(proxt2i.Config, proxt2i.presets("rl"), line)
        assert (cfg.model, cfg.groups, cfg.group_size, cfg.hold) == ("uvit", 72, 24, 0)
        assert cfg.preset == ("official" if "official" in line else "paper")
        assert cfg.prompts == "data/prompts.txt" and not cfg.gold_reward
    monkeypatch.setenv("WORLD_SIZE", "8")
    cfg = data.cli(proxt2i.Config, proxt2i.presets("train"), ["--model", "uvit", "--stage", "train", "--groups", "9"])
    assert (cfg.batch, cfg.lr, cfg.optimizer) == (2048, 8e-5, "adamw")
    with pytest.raises(ValueError, match="--batch 63 cannot be shared out over 8 processes: try --batch 64"):
        data.cli(proxt2i.Config, proxt2i.presets("train"), ["--stage", "train", "--batch", "63"])


def test_training_on_files_resumes_inside_the_data(tmp_path, capsys, monkeypatch):
    """A folder of pictures with captions: a run in two parts sees the same batches as a whole one."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i, meta in enumerate(data.prompts("shapes", "train")[:10]):
        picture = data.render([meta], i, 40)[0]
        data.Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(f"pictures/{i}.png")
        Path(f"pictures/{i}.txt").write_text(meta["prompt"])
    line = ["train", "--images", "pictures", "--batch", 3, "--save-every", 1, *SMALL, "--steps", 4]
    run([*line, "--out", "whole"], capsys)
    monkeypatch.setattr(data.Run, "done", lambda self: self.count["step"] >= 2)
    run([*line, "--out", "parts"], capsys)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run([*line, "--out", "parts", "--resume"], capsys)
    one, two = (torch.load(f"{name}/last/state.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one["params"], two["params"])) and one["places"] == two["places"]


@pytest.mark.parametrize("method, most", (("prox", .3), ("score", .12)))
def test_the_shipped_models_know_what_training_asks(method, most, tmp_path, capsys, monkeypatch):
    """A step's loss of the shipped weights, .196 and .061 (untrained .93 and .91): target, noise, lambda, v."""
    monkeypatch.chdir(tmp_path)
    run(["finetune", "--method", method, "--model", f"tiny-{method}", "--batch", 64, "--steps", 1, "--zeta-start", 0,
         "--dtype", "float32", "--out", "out", *SMALL], capsys)
    assert .01 < json.loads(Path("out/metrics.jsonl").read_text())["loss"] < most


def test_sample_paints_and_scores_validation_prompts(fresh, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = run(["sample", "--model", fresh / "prox", "--out", "out", "--eval-reward", "shapes-soft", *SMALL], capsys)
    row, = (json.loads(line) for line in Path("out/evals.jsonl").read_text().splitlines())
    assert last["eval_after"] is None and last["steps"] == 0 and last["eval_before"] == round(row["eval"], 4)
    assert (row["split"], row["guidance"]) == ("val", 1) and Image.open("out/samples/sample.png").width > 56
