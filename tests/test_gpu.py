"""On a GPU: the tiny model by every script; full-size SD3.5 Medium and FLUX.1-dev, random weights, beside diffusers."""
import gc
import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

import data
import models
from csrc import bench

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device: needs a gpu")


@pytest.fixture(autouse=True)
def freed():
    """Gives all memory back to the GPU, also what the frames of a test that failed hold: the next may be a process."""
    yield
    if getattr(sys, "last_traceback", None):
        traceback.clear_frames(sys.last_traceback)
    gc.collect()
    torch.cuda.empty_cache()


def wants(gigabytes):
    """Skip where the GPU has less memory, a tenth less by its maker's count."""
    has = torch.cuda.mem_get_info()[1] / 2 ** 30
    if has * 1.1 < gigabytes:
        pytest.skip(f"wants a gpu of {gigabytes} GB, this one has {has:.0f} GiB")


def inputs(pipe, batch=2):
    """bf16 latents of 512 px, times and random text features, as the network takes them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, *pipe.latent_shape(512)), generator=generator).to("cuda", torch.bfloat16)
    return x, torch.tensor([0.3, 0.9][:batch], device="cuda"), *pipe.encode_text(["a", "b"][:batch])


def theirs(name, net, x, t, context, pooled, guidance=None):
    """The same forward by diffusers, on the very tensors of our network."""
    import diffusers
    cls = {"sd35m": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel}[name]
    with torch.device("meta"):
        other = cls.from_config(net.config)
    other.load_state_dict(net.state_dict(), assign=True)
    if name == "sd35m":
        return other(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t * 1000).sample
    h, w = x.shape[2], x.shape[3]
    packed = diffusers.FluxPipeline._pack_latents(x, len(x), x.shape[1], h, w)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(len(x), h // 2, w // 2, x.device, torch.float32)
    y = other(packed, timestep=t, guidance=guidance, encoder_hidden_states=context, pooled_projections=pooled,
              img_ids=ids, txt_ids=torch.zeros(context.shape[1], 3, device=x.device)).sample
    return diffusers.FluxPipeline._unpack_latents(y, h * 8, w * 8, 8)


@pytest.mark.parametrize("name", ("sd35m", "flux"))
def test_full_size_forward_is_that_of_diffusers(name):
    """In bf16, the error of both against the same weights in float32: ours at most twice theirs."""
    pytest.importorskip("diffusers")
    wants({"sd35m": 24, "flux": 80}[name])                             # the weights in float32 and in bf16
    pipe = models.load(name, init="random", dtype=torch.bfloat16, device="cuda")
    args = inputs(pipe)
    with torch.no_grad():
        ours, other = pipe.net(*args).float(), theirs(name, pipe.net, *args).float()
        wide = [arg.float() for arg in args]
        exact = pipe.net.float()(*wide)
    error, reference = (ours - exact).abs().mean(), (other - exact).abs().mean()
    assert exact.std() > 0 and error <= 2 * reference and reference < 0.1 * exact.std(), (error, reference, exact.std())


@pytest.mark.parametrize("tokens", (77, 1229, 4096))
def test_attention_rounds_alike_with_and_without_gradients(tokens):
    """A rollout's log-probs are compared with an update's: another kernel for one of them would be another policy."""
    data.join()
    q, k, v = torch.randn((3, 4, 24, tokens, 64), device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        plain = models.attend(q, k, v)
    assert torch.equal(models.attend(q.requires_grad_(), k, v).detach(), plain)


@pytest.mark.parametrize("name", ("tiny", "tiny-prox"))
@torch.no_grad()
def test_a_captured_pass_is_the_networks_own(name):
    """Of new inputs, not of those that it was captured with."""
    net, (x, t, *rest) = bench.network(name, 4, 28, data.join("cuda")[2])
    (replay, _), other = bench.captured(net, [x, t, *rest]), torch.randn_like(x)
    for image, time in ((x, t), (other, t / 2)):
        torch.testing.assert_close(replay(image, time), net(image, time, *rest), rtol=.05, atol=.05)
    assert replay(other, t) is replay(x, t)                            # one buffer: the next call overwrites it
    assert (replay(other, t).clone() - replay(x, t)).abs().mean() > .1


@pytest.mark.parametrize("line", ("dgpo.py", "grpo.py", "slas.py", "proxt2i.py rl"))
def test_the_tiny_model_trains(line, tmp_path):
    """Every script on its own, two steps of its quick start: exit code 0, and its last line says where the run is."""
    script, *stage = line.split()
    more = ["--steps", "2", "--eval-images", "24", "--val-images", "24", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, ROOT / script, *stage, *more], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " on 1 x cuda, " in done.stdout and json.loads(done.stdout.splitlines()[-1])["steps"] == 2


@pytest.mark.parametrize("script, name, gigabytes", (
    ("dgpo", "sd35m", 24), ("grpo", "sd35m", 24), ("dgpo", "flux", 48)))
def test_one_update_at_512_px_fits(script, name, gigabytes):
    """A step of each script with LoRA 64 runs in the memory that --gpu-memory promises: it gets no more."""
    wants(gigabytes)
    [row] = bench.model([(script, name, gigabytes, ())])
    assert row["seconds"] is not None, row["error"]
    assert 0 < row["peak"] <= row["reserved"] < gigabytes, row
