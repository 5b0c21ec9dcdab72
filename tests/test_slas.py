"""slas.py: the shaped advantage against loops and the theorem, the trust region against exact curvature, small runs."""
import contextlib
import io
import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import scipy.optimize
import torch

import data
import grpo
import models
import rewards
import slas
import spread
from test_command_line import refused, small                           # noqa: F401 (fixtures)
from test_loop import flags, process, run, same, without_seconds       # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("alone")
GAMMAS = (0.0, .5, 1.0, 2.0)


class Alone:
    """data.Run, as models.fisher needs it, for one process."""
    world, uncounted = 1, staticmethod(contextlib.nullcontext)

    @staticmethod
    def sum(x):
        return x


# ============================================================================================================== Eq. (6)

def by_loop(reward, group_size, gamma, recenter, std):
    """slas_advantage in Python floats. reward: a list, nan for a failed one."""
    def spread(x):
        x = [a for a, r in zip(x, reward) if not math.isnan(r)]
        m = sum(x) / len(x)
        return math.sqrt(sum((a - m) ** 2 for a in x) / len(x)) + 1e-4
    dr = []
    for g in range(0, len(reward), group_size):
        group = reward[g:g + group_size]
        good = [r for r in group if not math.isnan(r)]
        dr += [0.0 if math.isnan(r) else r - sum(good) / len(good) for r in group]
    if std in ("before", "batch"):
        scale = spread(dr)
        dr = [d / scale for d in dr]
    out = []
    for g in range(0, len(reward), group_size):
        group = [(d, r) for d, r in zip(dr, reward)][g:g + group_size]
        good = [d for d, r in group if not math.isnan(r)]
        lam = sum(abs(d) ** gamma * d for d in good) / sum(abs(d) ** gamma for d in good) if recenter else 0
        for d, r in group:
            if math.isnan(r):
                out.append(0.0)
            elif recenter:
                out.append(abs(d) ** gamma * (d - lam))
            else:
                out.append(math.copysign(abs(d) ** (1 + gamma), d))
    if std in ("after", "batch"):
        scale = spread(out)
        out = [a / scale for a in out]
    return out


@pytest.mark.parametrize("std", ("batch", "before", "after", "none"))
@pytest.mark.parametrize("recenter", (False, True))
@pytest.mark.parametrize("gamma", GAMMAS)
def test_slas_advantage_against_a_loop(gamma, recenter, std):
    reward = data.noise((24,), 1, dtype=torch.float64).exp()
    reward[5] = reward[6] = math.nan
    got = slas.slas_advantage(reward, 6, gamma, recenter, std)
    torch.testing.assert_close(got, torch.tensor(by_loop(reward.tolist(), 6, gamma, recenter, std),
                                                 dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert got[5] == got[6] == 0 and slas.slas_advantage(reward.float(), 6, gamma, recenter, std).dtype == torch.float32


@pytest.mark.parametrize("scale", (1.0, .02, 50.0))
def test_the_batch_std_is_1_for_every_gamma_and_gamma_0_is_linear(scale):
    reward = scale * data.noise((96,), 2).exp()
    for gamma in GAMMAS:
        assert slas.slas_advantage(reward, 8, gamma).std(correction=0).item() == pytest.approx(1, abs=1e-3)
    dr = reward - reward.view(-1, 8).mean(1, keepdim=True).expand(-1, 8).flatten()
    for recenter in (False, True):                                     # Eq. (15): pi A, in the scale of the batch
        got = slas.slas_advantage(reward, 8, 0.0, recenter)
        torch.testing.assert_close(got, dr / dr.std(correction=0), rtol=1.1e-2 if scale < 1 else 1e-3, atol=1e-5)
    if scale < 1:                                                      # |dr|^3 is lost beside 1e-4 without the first
        assert slas.slas_advantage(reward, 8, 2.0, std="after").std() < .8


def test_constant_rewards_give_0():
    for reward in (torch.full((8,), .3), torch.tensor([.3] * 4 + [math.nan] * 4)):
        for gamma in GAMMAS:
            for recenter in (False, True):
                assert torch.equal(slas.slas_advantage(reward, 4, gamma, recenter), torch.zeros(8))
    half = torch.tensor([.1, .1, .1, .1, 0, 0, 1, 1])                  # one of two groups
    assert slas.slas_advantage(half, 4, 1.0, True)[:4].eq(0).all() and slas.slas_advantage(half, 4, 1.0)[4:].ne(0).all()
    with pytest.raises(ValueError, match="std='group'"):
        slas.slas_advantage(half, 4, 1.0, std="group")
    with pytest.raises(ValueError, match="group_size=3"):
        slas.slas_advantage(half, 3, 1.0)


# ============================================================================================================ Theorem 3

def maximiser(pi, adv, gamma):
    """The step d of Eq. [18], found numerically: maximise <d, A> - int d^2 / (pi |A|^gamma) / 2 with int d = 0."""
    root = (pi * abs(adv) ** gamma) ** .5                              # d = root y: all directions of y cost the same
    best = scipy.optimize.minimize(
        lambda y: y @ y / 2 - y @ (root * adv), 0 * adv, jac=lambda y: y - root * adv, method="SLSQP",
        constraints={"type": "eq", "fun": lambda y: root @ y, "jac": lambda y: root}, options={"ftol": 1e-15})
    assert best.success, best.message
    return root * best.x


def test_the_constrained_maximiser_and_the_papers():
    """pi |A|^gamma (A - lam) is the maximiser; pi sign(A) |A|^(1+gamma) only where that has mean 0 under pi."""
    skewed = torch.tensor([[.1, .2, .3, .3, .1], [4, 1, -.5, -.2, .1]], dtype=torch.float64)
    skewed[1] -= skewed[0] @ skewed[1]                                 # E_pi A = 0, as an advantage's
    even = torch.tensor([[.2, .3, .3, .2], [1.5, .4, -.4, -1.5]], dtype=torch.float64)
    cosines = []
    for pi, adv in (skewed, even):
        for gamma in GAMMAS:
            d = torch.from_numpy(maximiser(pi.numpy(), adv.numpy(), gamma))
            lam = (pi @ (adv.abs() ** gamma * adv)) / (pi @ adv.abs() ** gamma)
            exact, paper = pi * adv.abs() ** gamma * (adv - lam), pi * adv.sign() * adv.abs() ** (1 + gamma)
            d, exact, mean, paper = d / d.norm(), exact / exact.norm(), paper.sum().abs(), paper / paper.norm()
            assert (d - exact).abs().max() < 1e-6
            assert ((d - paper).abs().max() < 1e-6) == (mean < 1e-9)
            cosines.append(round((d @ paper).item(), 2))
    assert cosines[0] == 1 and cosines[4:] == [1, 1, 1, 1]             # gamma 0; symmetric A
    assert 1 > cosines[1] > cosines[2] > cosines[3] > .5, cosines      # the gap grows with gamma


@pytest.mark.parametrize("gamma", GAMMAS)
def test_recenter_is_that_maximiser(gamma):
    """A group that holds outcome k pi_k G times: the advantage of its images is d / pi, and it has mean 0."""
    counts, values = torch.tensor([1, 2, 4, 3]), torch.tensor([5.0, 1.0, 0.0, -.7])
    reward = values.repeat_interleave(counts).double()
    adv = slas.slas_advantage(reward, 10, gamma, recenter=True, std="none")
    pi, first = counts.double() / 10, counts.cumsum(0) - counts
    d = torch.from_numpy(maximiser(pi.numpy(), (values.double() - reward.mean()).numpy(), gamma))
    mine = pi * adv[first]
    assert (mine / mine.norm() - d / d.norm()).abs().max() < 1e-6 and adv.sum().abs() < 1e-12
    plain = slas.slas_advantage(reward, 10, gamma, std="none").sum().abs()
    assert plain < 1e-12 if gamma == 0 else plain > .1


# ================================================================================================= Prop. 1, Lemmas 1, 2

def group_std(reward, group_size):
    """What group_advantage divided by, (B / G,)."""
    adv, dr = (slas.group_advantage(reward, group_size, std).view(-1, group_size) for std in ("group", "none"))
    return (dr.norm(dim=1) / adv.norm(dim=1)) - 1e-4


@pytest.mark.parametrize("group_size", (4, 12, 24))
def test_lemmas_1_and_2_the_bias_of_a_groups_std(group_size):
    """Gaussian: E s = sigma sqrt(2/G) Gamma(G/2) / Gamma((G-1)/2), s the population std (the paper's S is sqrt(G/(G-1))
    as large). Any law: E S = sigma - (mu_4 - sigma^4) / (8 sigma^3 G), to first order in 1/G."""
    n, sigma = 40000, .3
    s = group_std(sigma * data.noise((n * group_size,), 3, dtype=torch.float64), group_size)
    log = math.lgamma(group_size / 2) - math.lgamma((group_size - 1) / 2)
    truth = sigma * math.sqrt(2 / group_size) * math.exp(log)
    error = 4 * s.std().item() / math.sqrt(n)
    assert abs(s.mean().item() - truth) < error and sigma - truth > 10 * error
    uniform = torch.rand(n * group_size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sigma, mu_4 = math.sqrt(1 / 12), 1 / 80
    s = group_std(uniform, group_size) * math.sqrt(group_size / (group_size - 1))
    first, error = -(mu_4 - sigma ** 4) / (8 * sigma ** 3 * group_size), 4 * s.std().item() / math.sqrt(n)
    if group_size > 4:                                                 # at 4, 1/G is not small: the bias is twice that
        assert s.mean().item() - sigma == pytest.approx(first, rel=2 / group_size, abs=error)


def test_proposition_1_small_spreads_get_overestimated_advantages():
    """Eight prompts whose rewards differ by .2, eight by .002: the group's std gives both the same weight."""
    size, spread = 24, (.2, .002)
    reward = torch.cat([s * data.noise((8 * size,), 5, s, dtype=torch.float64) for s in spread])

    def share(adv):                                                    # of the noise, in sum |A|
        real, noise = adv.abs().chunk(2)
        return (noise.sum() / (real.sum() + noise.sum())).item()
    dr = slas.group_advantage(reward, size, "none")
    real, noise = (slas.group_advantage(reward, size) / dr).abs().chunk(2)
    assert noise.median() / real.median() == pytest.approx(spread[0] / spread[1], rel=.2)      # 1/std, a factor of 100
    assert share(slas.group_advantage(reward, size)) == pytest.approx(.5, abs=.03)
    shares = [share(slas.slas_advantage(reward, size, gamma)) for gamma in GAMMAS]
    assert shares[0] == pytest.approx(1 / 101, rel=.2) and shares[2] == pytest.approx(1e-4, rel=.4)
    assert shares == sorted(shares, reverse=True)


def test_the_figure_of_proposition_1():
    """tests/spread.png, closed forms: E|dr| = .798 sigma, E dr^2 = sigma^2, over the batch's moments; groups: flat."""
    sigma, seen = torch.tensor(spread.SPREADS), {name: torch.tensor(v) for name, v in spread.weights().items()}
    assert (seen["group std"] - seen["group std"].mean()).abs().max() < .02 * seen["group std"].mean()
    linear = math.sqrt(2 / math.pi) * sigma / sigma.square().mean().sqrt()
    square = sigma.square() / (3 * sigma.pow(4).mean()).sqrt()
    assert torch.allclose(seen["batch std"], linear, rtol=.03, atol=2e-3)
    assert torch.allclose(seen["SLAS, gamma 1"], square, rtol=.06, atol=1e-3)
    for size, (mean, scatter, exact) in spread.bias(20000).items():
        assert abs(mean - exact) < 4 * scatter / math.sqrt(20000)


# ============================================================================================================ Theorem 4

class Small(torch.nn.Module):
    """A Gaussian policy over 2 x 3 x 2 numbers with 45 parameters, and two that it does not use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(2, 3), torch.nn.Linear(3, 12, bias=False)
        self.idle = torch.nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x):
        return self.b(self.a(x).tanh()).view(-1, 2, 3, 2)


def exact_fisher(net, x, std):
    """J'J / std^2, averaged over images and dimensions, the Jacobian row by row."""
    params = dict(net.named_parameters())
    jac = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)).flatten())(params)
    jac = torch.cat([j.flatten(1) for j in jac.values()], 1)
    return jac.T @ jac / (len(jac) * std ** 2)


def test_fisher_products_and_the_power_iteration():
    net, x, std = Small(), data.noise((5, 2), 6, dtype=torch.float64), .4
    params, exact = list(net.parameters()), exact_fisher(net, x, .4)
    v = data.noise((len(exact),), 7, dtype=torch.float64)
    parts = [q.view_as(p) for q, p in zip(v.split([p.numel() for p in params]), params)]
    got = torch.cat([f.flatten() for f in models.fisher_product(net(x), std, params, parts)])
    torch.testing.assert_close(got, exact @ v, rtol=1e-9, atol=1e-12)
    top = torch.linalg.eigvalsh(exact)[-1].item()
    assert models.largest_eigenvalue(lambda v: exact @ v, v, 200) == pytest.approx(top, rel=1e-6)
    few = models.largest_eigenvalue(lambda v: exact @ v, v)
    assert .8 * top < few <= top * (1 + 1e-9)
    # models.fisher: two steps of unlike std; G2 against the squared gradients of the log-probs, one by one
    stds = (.4, .9)
    taken = [net(x).detach() + s * data.noise((5, 2, 3, 2), 8, s, dtype=torch.float64) for s in stds]

    def policy(i, j):
        mean = net(x[j])
        logp = torch.distributions.Normal(mean, stds[i]).log_prob(taken[i][j]).flatten(1).mean(1)
        return logp, mean, stds[i], None
    top, g2 = models.fisher(policy, [0, 1], list(range(5)), params, v, Alone)
    both = (exact + exact_fisher(net, x, .9)) / 2
    assert .8 * torch.linalg.eigvalsh(both)[-1] < top <= torch.linalg.eigvalsh(both)[-1] * (1 + 1e-9)
    each = []
    for j in range(5):
        net.zero_grad()
        ((policy(0, [j])[0] + policy(1, [j])[0]).sum() / 2).backward()
        each.append(sum(p.grad.square().sum() for p in params if p.grad is not None).item())
    assert g2 == pytest.approx(sum(each) / 5)


def test_attention_has_the_products_too(random_model):
    """The MMDiT, through the math attention, in the direction of a finite difference of the mean."""
    pipe = models.load("", random_model, torch.float64)
    net, ctx = pipe.net, pipe.encode_text(["a red circle", "a star"])
    params, x, t = models.trainable(net.requires_grad_(True)), data.noise((2, 3, 12, 12), 9, dtype=torch.float64), .5

    def mean():
        return slas.guided(net, x, t, ctx, None, 1)
    v = [data.noise(p.shape, 10, i, dtype=torch.float64) / 30 for i, p in enumerate(params)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got = models.fisher_product(mean(), .7, params, v)
    with torch.no_grad():
        ends = []
        for h in (1e-5, -1e-5):
            with models.using(params, [p + h * d for p, d in zip(params, v)]):
                ends.append(mean())
    jv = (ends[0] - ends[1]) / 2e-5
    quadratic = sum((g * d).sum() for g, d in zip(got, v)).item()      # v'F v = |J v|^2 / (n D std^2)
    assert quadratic == pytest.approx((jv.square().mean() / .49).item(), rel=1e-5) and quadratic > 1e-6


@pytest.mark.parametrize("budget", (1e-3, 1e-5))
def test_a_plain_gradient_step_stays_in_the_budget(budget):
    """theta + eta g with the gamma that max_gamma allows: measured KL <= delta. eta is such that gamma is about 1;
    one sample is enough to make Cauchy-Schwarz nearly an equality, so the bound is also near."""
    net, std, size = Small(), .4, 64
    params = list(net.parameters())
    x = data.noise((1, 2), 11, dtype=torch.float64).expand(size, 2)
    before = net(x).detach()
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(size // 2).view(-1, 1, 1, 1)
    taken = before + std * signs * data.noise((1, 2, 3, 2), 12, dtype=torch.float64)       # one direction, two ways
    reward = signs.flatten() * (1 + data.noise((size,), 13, dtype=torch.float64).abs())

    def policy(i, j):
        mean = net(x[j])
        return torch.distributions.Normal(mean, std).log_prob(taken[j]).flatten(1).mean(1), mean, std
    v = data.noise((sum(p.numel() for p in params),), 14, dtype=torch.float64)
    top, g2 = models.fisher(policy, [0], list(range(4)), params, v, Alone)
    z = slas.slas_advantage(reward, size, 0.0, std="before")
    eta = math.sqrt(2 * budget / (top * g2 * z.abs().pow(4).mean().item()))    # the limit is the moment at gamma 1
    gamma = slas.max_gamma(2 * budget / (eta ** 2 * top * g2), z)
    assert gamma == pytest.approx(1, abs=1e-6)
    kls = []
    for power in (gamma, gamma + 1):
        adv = slas.slas_advantage(reward, size, power, std="before")
        grads = torch.autograd.grad((adv * policy(0, list(range(size)))[0]).mean(), params, allow_unused=True)
        with models.using(params, [p + eta * g if g is not None else p for p, g in zip(params, grads)]), \
                torch.no_grad():
            kls.append(slas.kl_loss(net(x), before, None, None, std, 0, "gaussian").item())
    assert budget / 4 < kls[0] <= budget, kls                           # .37 of it
    assert kls[1] > 1.3 * kls[0]                                       # a larger gamma moves further


def test_max_gamma():
    z = data.noise((200,), 15, dtype=torch.float64)
    z = z / z.std(correction=0)
    for limit in (1.5, 10.0, 1e3):
        gamma = slas.max_gamma(limit, z)
        assert z.abs().pow(2 * (1 + gamma)).mean() <= limit * (1 + 1e-9) and 0 < gamma < 4
        assert z.abs().pow(2 * (1 + gamma + 1e-6)).mean() > limit
        R = z.abs().max().item()                                       # Cor. 1, closed form; stricter than the sample
        assert slas.max_gamma(limit, R=R) == pytest.approx(max(0, math.log(limit) / (2 * math.log(R)) - 1), abs=1e-9)
        assert slas.max_gamma(limit, R=R) <= gamma
    assert slas.max_gamma(.9, z) == 0 and slas.max_gamma(math.inf, z) == 4 and slas.max_gamma(1.0, 0 * z) == 4
    assert slas.max_gamma(.5, R=.02) == 4                              # R < 1, as HPS: no bound
    rare = torch.tensor([.3] * 99 + [1.5]).double()                    # allowed from 0.6 to 1.9: first less, then more
    gamma = slas.max_gamma(.1, rare)
    assert rare.pow(2).mean() > .1 and rare.pow(2 * (1 + gamma)).mean() == pytest.approx(.1, rel=1e-6) and gamma > 1
    # Cor. 2: K with E exp(z^2/K^2) = 2 bounds every moment, and gamma grows more slowly than the limit's logarithm
    K = scipy.optimize.brentq(lambda k: (z / k).square().exp().mean().item() - 2, 1, 10)
    gammas = [slas.max_gamma(10.0 ** n, K=K, most=50.0) for n in (2, 4, 8, 16)]
    for gamma, n in zip(gammas, (2, 4, 8, 16)):
        assert 2 * K ** (2 + 2 * gamma) * math.gamma(2 + gamma) == pytest.approx(10.0 ** n, rel=1e-6)
        assert z.abs().pow(2 * (1 + gamma)).mean() <= 10.0 ** n and gamma <= slas.max_gamma(10.0 ** n, z, most=1e3)
    steps = [b - a for a, b in zip(gammas, gammas[1:])]
    assert gammas == sorted(gammas) and steps[1] < 2 * steps[0] and steps[2] < 2 * steps[1]


# ================================================================================================================= runs

def test_two_steps_and_what_they_log(flags, random_model):
    _, rows, state = run(slas, flags(groups=4, fisher_every=1))
    start = models.load("", random_model).net.parameters()
    assert any((p - q).abs().max() > 1e-4 for p, q in zip(state["params"], start))
    for row in rows:
        assert set(row["trust"]) == {"lambda_max", "g2", "gamma", "eta", "kl", "bound"} and row["trust"]["gamma"] == 1
        assert all(math.isfinite(value) for value in row["trust"].values())
        assert 0 < row["trust"]["kl"] <= row["trust"]["bound"]
        low, *_, high = row["advantage"]["prompt_std"]
        assert .1 < row["advantage"]["top_decile"] <= 1 and 0 < low < high
        (name, term), = row["rewards"].items()
        assert name.endswith(":red") and term["weight"] == 1 and term["mean"] == pytest.approx(row["reward"], abs=1e-5)
    assert rows[0]["trust"]["lambda_max"] != rows[1]["trust"]["lambda_max"]
    _, other, _ = run(slas, flags(out="linear", groups=4, gamma="0", fisher_every=0, steps=1))
    assert "kl" not in other[0]["trust"] and other[0]["grad_norm"] != rows[0]["grad_norm"]


def test_eta_is_of_the_updates_that_were_made(flags, monkeypatch):
    """The second update meets a NaN, and so do the third rollout's both: what moved nothing is not in eta."""
    honest, theta, norms = data.Run.update, [], []

    def update(self, opt, params, *rest):
        theta.append([p.detach().clone() for p in params])
        if len(theta) in (2, 5, 6):
            params[0].grad.fill_(math.nan)
        norms.append(honest(self, opt, params, *rest))
        return norms[-1]
    monkeypatch.setattr(data.Run, "update", update)
    _, rows, _ = run(slas, flags(groups=4, updates=2, fisher_every=1, steps=3))
    moved = sum((p - q).square().sum() for p, q in zip(theta[2], theta[0])).sqrt().item()
    assert rows[0]["trust"]["eta"] == pytest.approx(moved / norms[0], rel=1e-5)
    assert [row["skipped"] for row in rows] == [1, 1, 3]
    assert rows[1]["trust"]["eta"] == rows[2]["trust"]["eta"] != rows[0]["trust"]["eta"]


def test_the_papers_other_network(flags, tmp_path):
    """Stable Diffusion's UNet, DDIM's Gaussians, guidance in both passes: curvature and KL as for the flow models."""
    import pipelines
    pipelines.save("sd14", tmp_path / "sd14")
    settings = dict(weights=tmp_path / "sd14", groups=1, updates=1, steps=1, noise_level=1.0, cfg_rollout=2.0,
                    cfg_train=2.0, train_steps=1, fisher_images=1, resolution=16, eval_images=1)
    _, rows, _ = run(slas, flags(**settings))
    assert 0 < rows[0]["trust"]["kl"] < rows[0]["trust"]["bound"] < math.inf


def test_auto_gamma_resumes_with_the_same_bits_and_follows_the_budget(flags):
    settings = dict(gamma="auto", steps=3, fisher_every=2, kl_budget=1e6)
    _, rows, state = run(slas, flags(out="whole", **settings))
    run(slas, flags(out="parts", **{**settings, "steps": 2}))
    _, again, other = run(slas, flags(out="parts", **settings) + ["--resume"])
    assert same(state, other) and without_seconds(again) == without_seconds(rows)
    assert [row["trust"]["gamma"] for row in rows] == [0, 4, 4]        # no step seen; a budget that allows anything
    _, rows, _ = run(slas, flags(out="tight", **{**settings, "steps": 2, "kl_budget": 1e-12}))
    assert rows[1]["trust"]["gamma"] == 0


def test_auto_gamma_takes_the_largest_that_eq_7_allows(flags, monkeypatch):
    """A budget that allows some gamma between none and the most, from the eta, lambda_max and G2 that are logged."""
    honest, seen = slas.max_gamma, []

    def max_gamma(limit, dr):
        seen.append((limit, dr, honest(limit, dr)))
        return seen[-1][-1]
    monkeypatch.setattr(slas, "max_gamma", max_gamma)
    settings = dict(gamma="auto", groups=4, fisher_every=2, dtype="float64", eval_images=2)
    _, [row], _ = run(slas, flags(out="first", steps=1, **settings))
    trust = row["trust"]
    scale = trust["eta"] ** 2 / 2 * trust["lambda_max"] * trust["g2"]
    assert trust["bound"] == pytest.approx(scale * row["advantage"]["square"], rel=1e-5) and not seen
    _, rows, _ = run(slas, flags(out="second", steps=2, kl_budget=1.5 * scale, **settings))
    (limit, dr, gamma), = seen
    assert limit == pytest.approx(1.5, rel=1e-5) and dr.std(correction=0).item() == pytest.approx(1, abs=.01)
    assert dr.abs().pow(2 * (1 + gamma)).mean().item() == pytest.approx(1.5, rel=1e-4) and 0 < gamma < 4
    assert [row["trust"]["gamma"] for row in rows] == [0, pytest.approx(gamma, rel=1e-5)]


def test_eq_7_looks_at_images_of_every_group(flags, monkeypatch):
    honest, seen = models.fisher, []
    monkeypatch.setattr(models, "fisher", lambda policy, steps, images, *rest: seen.append(images) or honest(
        policy, steps, images, *rest))
    run(slas, flags(groups=4, fisher_every=1, fisher_images=4, steps=1))
    run(slas, flags(out="one", groups=4, fisher_every=1, fisher_images=1, steps=1))
    assert seen == [[0, 4, 8, 12], [0]]


def test_two_processes_choose_one_gamma(flags):
    settings = dict(gamma="auto", kl_budget=1e6, groups=4, dtype="float64", fisher_every=1, eval_images=2)
    two = process(ROOT / "slas.py", flags(out="two", **settings), torchrun=True)
    _, rows, one = run(slas, flags(out="one", **settings))
    out, err = two.communicate(timeout=600)
    assert two.returncode == 0, err
    for a, b in zip(rows, map(json.loads, open("two/metrics.jsonl")), strict=True):
        for key in a["trust"]:
            assert a["trust"][key] == pytest.approx(b["trust"][key], rel=1e-6), key
        for key, value in a["advantage"].items():
            assert value == pytest.approx(b["advantage"][key], rel=1e-5), key
        assert list(a["rewards"].values())[0] == pytest.approx(list(b["rewards"].values())[0])
    other = torch.load("two/last/state.pt", weights_only=True)
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(one["params"], other["params"]))


def test_a_sum_logs_its_terms_and_a_constant_reward_is_said_once(flags, tmp_path, capsys):
    file = tmp_path / "terms.py"
    file.write_text("def a(images, prompts, meta):\n    return images.mean((1, 2, 3))\n\n"
                    "def flat(images, prompts, meta):\n    return images.new_full((len(images),), .25)\n")
    line = flags(steps=3)
    line[line.index("--reward") + 1] = f"{file}:a:2,{file}:flat:-0.5"
    _, rows, _ = run(slas, line)
    a, flat = rows[0]["rewards"][f"{file}:a"], rows[0]["rewards"][f"{file}:flat"]
    assert (a["weight"], flat["weight"], flat["mean"], flat["std"]) == (2, -.5, .25, 0) and a["std"] > 0
    assert 2 * a["mean"] - .125 == pytest.approx(rows[0]["reward"], abs=1e-5)
    line[line.index("--reward") + 1], line[line.index("--out") + 1] = f"{file}:flat", "flat"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        slas.main([*line, "--weight-decay", "0"])
    assert said.getvalue().count("is 0.25 for every image") == 1
    rows = [json.loads(row) for row in open("flat/metrics.jsonl")]
    assert all(row["advantage"]["square"] == 0 and row["grad_norm"] == 0 and row["skipped"] == 0 for row in rows)


def test_no_update_is_skipped_after_gradients_of_0():
    """Ten updates with nothing to learn, then one with: their norms, all 0, are no measure of a spike."""
    one = data.Run.__new__(data.Run)
    one.rank, one.world, one.norms, one.lap, one.count = 0, 1, [], id, {"updates": 0, "skipped": 0}
    p = torch.nn.Parameter(torch.zeros(2))
    for norm in [0.0] * 10 + [.5]:
        p.grad = torch.tensor([norm, 0.0])
        one.update(torch.optim.SGD([p], lr=1.0), [p], 1.0)
    assert one.count["skipped"] == 0 and p[0].item() == -.5 and one.norms == [.5]


def test_score_keeps_its_terms():
    calls = rewards.load("shapes:2,shapes-strict:0.5,shapes:1")
    rows = data.draw_prompts(data.world_prompts("test"), 4, "terms")
    got = calls(data.render(rows, 0), [row["prompt"] for row in rows], rows)
    assert calls.weights == {"shapes": 3, "shapes-strict": .5} and set(calls.values) == set(calls.weights)
    torch.testing.assert_close(got, 3 * calls.values["shapes"] + .5 * calls.values["shapes-strict"])


# ===================================================================================================== flags and files

def test_estimates_want_a_gpu_of_48_gb():
    """By csrc/count.py one image's take 26 GB on SD3.5 Medium; typed, they are tried."""
    line = ["--model", "sd35m", "--gpu-memory"]
    for more, every in (([24], 0), ([48], 10), ([24, "--fisher-every", 5], 5)):
        assert data.cli(slas.Config, slas.PRESETS, list(map(str, line + more)), slas.METHODS).fisher_every == every


def test_gamma_is_any_number_from_0():
    for gamma in ("0", "1e-3", ".5", 0.5, "auto"):
        assert slas.Config(gamma=gamma).gamma == gamma


@pytest.mark.parametrize("line, words", (
    (["--gamma", "-1"], ("--gamma -1", "0 or more")), (["--gamma", "nan"], ("--gamma nan",)),
    (["--gamma", "inf"], ("--gamma inf",)),
    (["--gamma", "much"], ("--gamma much", "auto")), (["--kl-budget", "0"], ("--kl-budget 0",)),
    (["--kl-budget", "-1"], ("--kl-budget -1",)), (["--kl-budget", "inf"], ("--kl-budget inf",)),
    (["--fisher-every", "-1"], ("--fisher-every -1",)), (["--fisher-images", "0"], ("--fisher-images 0",)),
    (["--adv-std", "group"], ("--adv-std 'group'",)), (["--gamma", "auto", "--adv-std", "none"], ("--adv-std",)),
    (["--gamma", "auto", "--fisher-every", "0"], ("--fisher-every",)), (["--compile"], ("--fisher-every 0",)),
    (["--reward", "shapes:1,pretty:2"], ("pretty",))), ids=str)
def test_bad_input(line, words, small, refused):                       # noqa: F811
    refused(slas, [*small, *line], *words)
    assert not Path("out").exists()


def test_presets(monkeypatch):
    for model, reward in (("sd14", "hpsv2:1,clip-dfn:1"), ("flux", "hpsv2:0.7,clip-dfn:1.4")):
        for preset in ("paper", "official"):
            monkeypatch.setenv("WORLD_SIZE", "1")                       # FLUX trains in shards, under torchrun
            cfg = data.cli(slas.Config, slas.PRESETS, ["--preset", preset, "--model", model], slas.METHODS)
            assert (cfg.reward, cfg.method, cfg.fisher_every, cfg.adv_std) == (reward, "dance", 0, "batch")
            assert (cfg.gamma, cfg.adv_clip, cfg.lr, cfg.shared_noise) == ("1", 5.0, 1e-5, True)
            dance = data.cli(grpo.Config, grpo.PRESETS, ["--preset", preset, "--model", model], grpo.METHODS)
            assert dance.reward == {"paper": "hpsv2:0.7,clip-dfn:1.4", "official": "hpsv2"}[preset]
            assert not dance.gold_reward
            numbers = {"flux": {"official": (.01, .995, 16, 12, 2, 16, 9), "paper": (1, 0, 32, 12, 4, 25, 15)},
                       "sd14": {"official": (1, 0, 32, 16, 2, 50, 0), "paper": (1, 0, 32, 12, 1, 50, 30)}}
            assert all((c.max_grad_norm, c.ema, c.groups, c.group_size, c.updates, c.sample_steps, c.train_steps) ==
                       numbers[model][preset] for c in (cfg, dance))
            assert cfg.reward_mix == "reward" and (dance.reward_mix, dance.adv_std) == {
                "paper": ("advantage", "none"), "official": ("reward", "group")}[preset]
    cfg = data.cli(slas.Config, slas.PRESETS, [], slas.METHODS)
    assert (cfg.model, cfg.method, cfg.noise_level, cfg.shared_noise) == ("tiny", "dance", .3, True)
    for gamma, std in (("1", "batch"), ("auto", "before")):
        cfg = data.cli(slas.Config, slas.PRESETS, ["--model", "sd35m", "--gamma", gamma], slas.METHODS)
        assert (cfg.method, cfg.gamma, cfg.adv_std) == ("flow", gamma, std)


@pytest.mark.parametrize("module", (grpo, slas))
def test_a_method_that_is_not_the_presets_brings_its_own_numbers(module, monkeypatch):
    """On SD3.5, whose presets are Flow-GRPO's, and on FLUX, whose are DanceGRPO's; flags stand above both."""
    monkeypatch.setenv("WORLD_SIZE", "1")

    def kind(*line):
        cfg = data.cli(module.Config, module.PRESETS, list(line), module.METHODS)
        return cfg.sde or cfg.method, cfg.noise_level, cfg.kl_beta, cfg.shared_noise, cfg.clean_final
    assert kind("--model", "sd35m") == ("flow", .7, .04, False, False)
    assert kind("--model", "sd35m", "--method", "flow") == ("flow", .7, .04, False, False)
    assert kind("--model", "sd35m", "--method", "dance") == ("dance", .3, 0, True, False)
    assert kind("--model", "sd35m", "--method", "dance", "--noise-level", ".5") == ("dance", .5, 0, True, False)
    assert kind("--model", "flux") == ("dance", .3, 0, True, True)
    assert kind("--model", "flux", "--method", "flow") == ("flow", .7, 0, False, False)
    assert data.cli(module.Config, module.PRESETS, ["--model", "flux"], module.METHODS).shift == 3


def test_the_diff_is_the_paper():
    """Under 120 lines, and each line of grpo.py that goes is replaced: nothing of DanceGRPO is lost."""
    said = subprocess.run(["diff", ROOT / "grpo.py", ROOT / "slas.py"], capture_output=True, text=True).stdout
    gone, come = ([line for line in said.splitlines() if line.startswith(mark)] for mark in "<>")
    assert 40 < len(gone) + len(come) < 120 and len(gone) < 20
    assert not re.search(r"^[\d,]+d\d", said, re.M)                    # diff's word for lines that only go
