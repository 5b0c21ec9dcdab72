"""csrc/count.py: what it counts is what PyTorch's profiler sees, and the memory plans hold what it counts."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import models
import pipelines
from csrc import bench, count

ROOT = Path(__file__).resolve().parent.parent


def test_storages_count_from_birth_to_death():
    """Once, however many views they have; rounded up to 512 bytes; a product's operations are 2 m n k."""
    with count.Meter() as meter:
        x = torch.zeros(100, 128)                                      # 51200 bytes
        view, same = x[3:], x.add_(1)
        assert meter.now == meter.peak == 51200
        y = x @ torch.zeros(128, 8)                                    # 4096, freed at once; 3200, rounded to 3584
        assert meter.now == 51200 + 3584 and meter.peak == meter.now + 4096 and meter.flops == 2 * 100 * 128 * 8
        del x, same
        assert meter.now == 51200 + 3584                               # of which view keeps the whole
        del view, y
        assert meter.now == 0


def step(checkpointing):
    """(tensors, a function that trains a small MMDiT with a LoRA on them once), on the CPU."""
    torch.manual_seed(0)
    net = models.MMDiT(**models.TINY).init_weights()
    models.add_lora(net, 8, 16, net.lora_targets)
    net.checkpointing = checkpointing
    given = [torch.randn(16, 3, 28, 28), torch.rand(16), torch.randn(16, 12, 128), torch.randn(16, 128)]
    return [*given, *net.parameters(), *net.buffers()], lambda: net(*given).square().mean().backward()


def profiled(f, tmp_path):
    """Bytes at most, beyond those before f, by PyTorch's profiler, which watches the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    totals.sort(key=lambda pair: pair[0])
    start = totals[0][1]["Total Allocated"] - totals[0][1]["Bytes"]
    return max(args["Total Allocated"] for _, args in totals) - start


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_step_takes_what_the_profiler_sees(checkpointing, tmp_path):
    """Forward, LoRA, checkpointing and backward: the count of numbers that are there, and of fake ones."""
    def counted():
        tensors, train = step(checkpointing)
        with count.Meter() as meter:
            for tensor in tensors:
                meter.see(tensor.untyped_storage())
            start = meter.now
            train()
        return meter.peak - start
    real = profiled(step(checkpointing)[1], tmp_path)
    with FakeTensorMode():
        fake = counted()
    assert counted() == pytest.approx(real, rel=.005)
    assert fake == pytest.approx(real, rel=.005)


def test_attention_counts_as_a_gpus():
    """No softmax is kept: twice the tokens take twice the memory, and four times the operations, backward too."""
    def taken(tokens, **settings):
        with FakeTensorMode(), count.Meter() as meter:
            q, k, v = (torch.zeros(2, 4, tokens, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16) if settings.pop("masked", 0) else None
            start = meter.now
            count.attention(q, k, v, mask, **settings).sum().backward()
        return meter.peak - start, meter.flops
    for settings in ({}, dict(is_causal=True), dict(masked=True)):
        (small, few), (large, many) = taken(1024, **settings), taken(2048, **settings)
        assert large == pytest.approx(2 * small, rel=.01) and many == 4 * few > 0
    assert few == 7 * 2 * 2 * 4 * 1024 ** 2 * 64                       # 2 products forward, 5 backward


SMALL = ("--group-size", 4, "--micro-batch", 4, "--lora-rank", 4, "--sample-steps", 2, "--resolution", 32,
         "--text-length", 8, "--dtype", "bfloat16")


@pytest.mark.parametrize("family, peers", (("sd3", bench.PEERS), ("flux", bench.PEERS[:1]), ("sd14", bench.PEERS[:1])))
def test_a_run_of_ours_and_on_diffusers(family, peers, tmp_path):
    """The same operations, but for a LoRA that is merged in rollouts; memory that its parts add up to."""
    pipelines.save(family, tmp_path)
    ours, *theirs = count.table([("dgpo", str(tmp_path), 80, peers)], SMALL)
    assert [row["network"] for row in (ours, *theirs)] == ["ours", *peers]
    for row in (ours, *theirs):
        assert row["held"] < row["update"][0] < 1 and row["held"] < row["rollout"][0] < 1 and "error" not in row
        assert row["update"][1] == pytest.approx(ours["update"][1], rel=.02) and row["update"][1] > 0
    assert ours["held"] <= theirs[0]["held"] * 1.01
    if len(theirs) > 1:
        assert theirs[0]["held"] * 1.01 < theirs[1]["held"]            # weights in float32


def test_a_plan_fits():
    """The 24 GB plan of SD3.5 Medium, counted at full size in one step of a rollout: as it was, with room for a reward.

    csrc/BENCHMARKS.md has the plan's own ten steps, which hold a little more.
    """
    [row] = count.table([("dgpo", "sd35m", 24, ())], ("--steps", 1, "--sample-steps", 1))
    assert row["rollout"][0] == pytest.approx(12.3, abs=.3) and row["update"][0] == pytest.approx(9.8, abs=.3), row


def test_wrong_words():
    done = subprocess.run([sys.executable, ROOT / "csrc/count.py", "sd35l"], capture_output=True, text=True)
    assert done.returncode == 1 and "sd35l: flux, sd14, sd35m, uvit, or a run" in done.stderr
