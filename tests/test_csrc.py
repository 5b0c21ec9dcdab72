"""The fused ops against formulas in float64, their gradients, their fakes, their checks, and the build itself."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc import ops

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 33, 1000, 65537)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device: needs a gpu")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
nan, inf = math.nan, math.inf


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


def test_prox_matching_loss_does_not_depend_on_the_batch_or_the_threads():
    pred, target = randn(5, 20000), randn(5, 20000, seed=1)
    whole = ops.prox_matching_loss(pred, target, 1.0)
    assert torch.equal(whole[3:4], ops.prox_matching_loss(pred[3:4], target[3:4], 1.0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(whole, ops.prox_matching_loss(pred, target, 1.0))
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
                torch.testing.assert_close(got, want, rtol=2e-6 if dtype != torch.float64 else 1e-14, atol=0)
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
    assert ops.group_advantage(torch.zeros(0, dtype=dtype, device=device), 4, "batch").shape == (0,)


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
    reward = randn(12, dtype=dtype, device=device)
    reward[5] = bad
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
    ]
    try:
        for call, words in wrong:
            with pytest.raises(ValueError) as caught:
                call()
            assert words in str(caught.value) and "\n" not in str(caught.value)
    finally:
        ops.use(True)


# == Autograd and torch.compile ==

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
    wide = ops.prox_matching_loss(a, b, 1.0).detach()
    for op, args in ((ops.lib.prox_matching_loss, (a, b, 1.3)), (ops.lib.cfg_combine, (a, b.detach(), 4.5)),
                     (ops.lib.prox_matching_loss, (a.transpose(0, 1), b.transpose(0, 1), 1.3)),
                     (ops.lib.prox_matching_loss_backward, (wide, a.detach(), b.detach(), wide, 1.3)),
                     (ops.lib.cfg_combine_backward, (a, 4.5)), (ops.lib.group_advantage, (a.detach()[0, :4], 2, 1))):
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_the_ops_stay_whole_under_torch_compile():
    def step(pred, uncond, cond, reward):
        adv = ops.group_advantage(reward, 2)
        return (adv * ops.prox_matching_loss(pred, ops.cfg_combine(uncond, cond, 3.0), 1.0)).sum()

    pred, uncond, cond = (randn(4, 70, seed=i) for i in range(3))
    reward, grads = randn(4, seed=3), []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = pred.clone().requires_grad_()
        f(x, uncond, cond, reward).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


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


def test_importing_is_quick():
    done = run("import torch, time; t = time.process_time(); from csrc import ops; print(time.process_time() - t)")
    assert float(done.stdout) < 0.05


@pytest.mark.skipif(not ops.find_nvcc(), reason="no nvcc, so the cuda kernels cannot be compiled")
@pytest.mark.parametrize("name", ops.NAMES)
def test_nvcc_compiles_the_kernels_for_sm_90_without_torch(name, tmp_path):
    out = tmp_path / "kernel.o"
    command = [ops.find_nvcc(), "-arch=sm_90", "-Werror", "all-warnings", "-c", f"csrc/{name}.cu", "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and out.stat().st_size > 0, done.stderr
    text = "".join((ROOT / "csrc" / file).read_text() for file in (f"{name}.cu", "common.cuh"))
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
