"""dgpo.py and grpo.py train SD3.5, FLUX and Stable Diffusion 1, very small and random: processes, shards, memory."""
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from tqdm import tqdm

import data
import dgpo
import grpo
import models
import pipelines

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("alone")
BOTH = pytest.mark.parametrize("module", (dgpo, grpo), ids=("dgpo", "grpo"))
FAMILIES = pytest.mark.parametrize("family", pipelines.FAMILIES)
PUBLIC = {"sd3": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel,
          "sd14": diffusers.UNet2DConditionModel}
SMALL = dict(groups=2, group_size=4, sample_steps=3, eval_steps=1, eval_images=2, val_images=2, eval_every=0, steps=2,
             updates=2, cfg_also=0, cfg_rollout=2.0, cfg_train=2.0, minutes=60, lr=1e-3, resolution=32, text_length=8,
             dtype="float64")
ANCHORED = dict(kl_beta=.1, fsdp=True, save_every=1)                   # the reference's weights stand in, as shards
WORKER = """import json, sys
import torch.distributed as dist
import dgpo, grpo

end, dist.destroy_process_group = dist.destroy_process_group, lambda: None   # one group of processes for all the runs
for name, line in json.loads(sys.argv[1]):
    {"dgpo": dgpo, "grpo": grpo}[name].main(line)
end()
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The three pipelines and a file of three prompts."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "prompts.txt").write_text("a red circle\na blue square\ntwo green stars\n")
    for family in pipelines.FAMILIES:
        (folder / family).mkdir()
        pipelines.save(family, folder / family)
    return folder


@pytest.fixture(scope="session")
def flags(folder, reward_file):
    """flags("sd3", out="a", steps=3, ...) -> the command line of a small run of that family."""
    def make(family, **settings):
        settings = {"weights": folder / family, "prompts": folder / "prompts.txt", "reward": f"{reward_file}:red",
                    "eval_reward": f"{reward_file}:red", "out": "out", **SMALL, **settings}
        line = []
        for name, value in settings.items():
            flag = name.replace("_", "-")
            line += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return line
    return make


def result(out, said=""):
    """What a run left: out, said, rows of metrics.jsonl, evals, and state, with the shards put together."""
    out = Path(out)
    rows, evals = ([json.loads(row) for row in (out / name).read_text().splitlines()]
                   for name in ("metrics.jsonl", "evals.jsonl"))
    state = torch.load(out / "last" / "state.pt", weights_only=True)
    if "shards" in state:
        dcp_to_torch_save(out / "last" / state["shards"], out / "whole.pt")
        state |= torch.load(out / "whole.pt", weights_only=True)
    return SimpleNamespace(out=out, said=said, rows=rows, evals=evals, state=state)


@pytest.fixture(scope="session")
def train(flags, tmp_path_factory):
    """train(module, family, **settings): that run in this process, made once, as `result` returns it."""
    runs = {}

    def made(module, family, **settings):
        key = (module.__name__, family, *sorted(settings.items()))
        if key not in runs:
            out = tmp_path_factory.mktemp("run") / "out"
            with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
                module.main(flags(family, out=out, **settings))
            runs[key] = result(out, said.getvalue())
        return runs[key]
    return made


def torchrun(count, runs):
    """Runs [(script's name, command line)] one after the other in `count` processes, which start once."""
    Path("worker.py").write_text(WORKER)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "worker.py"]
    child = subprocess.Popen([*line, json.dumps(runs)], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    try:
        _, err = child.communicate(timeout=300)
    except subprocess.TimeoutExpired:                                  # processes that wait for each other
        child.terminate()                                              # torchrun ends them
        _, err = child.communicate()
    assert child.returncode == 0, err[:2000] + err[-2000:]


@pytest.fixture(scope="session")
def two(flags, tmp_path_factory):
    """{name: result} of the runs below, by torchrun with 2 processes; `handed` goes on with 1 process."""
    folder = tmp_path_factory.mktemp("two")

    def line(name, family, **settings):
        return flags(family, out=folder / name, **settings)
    anchored = dict(ref="start", **ANCHORED)
    runs = [("dgpo", line("dgpo sd3", "sd3")), ("dgpo", line("dgpo flux", "flux")), ("grpo", line("grpo sd14", "sd14")),
            ("dgpo", line("whole", "sd3", steps=4, **anchored)), ("dgpo", line("parts", "sd3", **anchored)),
            ("dgpo", line("handed", "sd3", **anchored)),
            ("dgpo", line("parts", "sd3", steps=4, **anchored) + ["--resume"]),
            ("grpo", line("grpo shards", "flux", **ANCHORED)),
            ("dgpo", line("float32 shards", "sd3", dtype="float32", fsdp=True)),
            ("grpo", line("uneven", "sd14", groups=6, updates=2, micro_batch=4, steps=1, fsdp=True))]
    with contextlib.chdir(folder):
        torchrun(2, runs)
        torchrun(1, [("dgpo", line("handed", "sd3", steps=4, **anchored) + ["--resume"])])
    return {path.name: result(path) for path in folder.iterdir() if path.is_dir()}


def distance(a, b):
    """The largest difference of two runs' parameters and moving averages."""
    assert len(a.state["ema"]) == len(a.state["params"]) > 0
    pairs = [pair for key in ("params", "ema") for pair in zip(a.state[key], b.state[key], strict=True)]
    assert all(p.dtype == q.dtype and p.shape == q.shape for p, q in pairs)
    return max((p - q).abs().max().item() for p, q in pairs)


def network(folder, family, dtype=torch.float64):
    return models.load("", folder / family, dtype, text_length=8).net


def numbers(row):
    """All numbers of a metrics line, those in its dicts and lists too."""
    if isinstance(row, (dict, list)):
        return [n for value in (row.values() if isinstance(row, dict) else row) for n in numbers(value)]
    return [row]


def unread(name):
    """The queries of SD3's text in its last block: there the text is read by the image and not heard of again."""
    return re.match(r"transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)", name)


# ============================================================================================================ families

@FAMILIES
@BOTH
def test_every_family_trains(module, family, train, folder):
    """Two steps move every tensor; what is evaluated is what diffusers reads from OUT."""
    run, net = train(module, family), network(folder, family)
    for (name, before), after in zip(net.named_parameters(), run.state["params"], strict=True):
        assert after.dtype == torch.float64 and (unread(name) or (after - before).abs().max() > 1e-5), name
    assert [row["step"] for row in run.rows] == [1, 2] and not any(row["skipped"] or row["failed"] for row in run.rows)
    for row in run.rows:
        assert row["grad_norm"] > 0
        assert row.pop("eval") is None and all(math.isfinite(value) for value in numbers(row))
    tests = [row for row in run.evals if row["split"] == "test"]
    assert [row["step"] for row in tests] == [0, 2] and all(math.isfinite(row["eval"]) for row in tests)
    theirs = PUBLIC[family].from_pretrained(run.out / ("unet" if family == "sd14" else "transformer"),
                                            torch_dtype=torch.float64).state_dict()
    for (name, _), value in zip(net.named_parameters(), run.state["ema"], strict=True):
        assert torch.equal(theirs[name], value), name
    if module is grpo:
        worst = float(re.search(r"the worst \|ratio - 1\| is (\S+)", run.said).group(1))
        assert worst <= 1e-12


# =========================================================================================================== processes

@pytest.mark.parametrize("module, family", ((dgpo, "sd3"), (dgpo, "flux"), (grpo, "sd14")),
                         ids=("dgpo-sd3", "dgpo-flux", "grpo-sd14"))
def test_two_processes_equal_one(module, family, train, two):
    assert distance(train(module, family), two[f"{module.__name__} {family}"]) < 1e-9


def without_fsdp(settings):
    return {name: value for name, value in settings.items() if name != "fsdp"}


def test_shards_equal_whole_weights(train, two):
    """FSDP2 on two processes, with the reference's weights standing in on the way, and one process."""
    one = train(dgpo, "sd3", steps=4, ref="start", **without_fsdp(ANCHORED))
    assert distance(one, two["whole"]) < 1e-9
    for a, b in zip(one.rows, two["whole"].rows, strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[key] - b[key]) < 1e-5 for key in ("loss", "kl", "grad_norm", "reward"))
    for a, b in zip(one.evals, two["whole"].evals, strict=True):
        assert a["step"] == b["step"] and abs(a["eval"] - b["eval"]) < 1e-5
    assert one.rows[-1]["kl"] > 0
    one = train(grpo, "flux", **without_fsdp(ANCHORED))
    assert distance(one, two["grpo shards"]) < 1e-9 and one.rows[-1]["kl"] > 0
    saved, whole = (PUBLIC["flux"].from_pretrained(run.out / "transformer", torch_dtype=torch.float64).state_dict()
                    for run in (one, two["grpo shards"]))
    assert saved.keys() == whole.keys() and all((saved[key] - whole[key]).abs().max() < 1e-9 for key in saved)


def test_shards_are_summed_in_float32_too(train, two):
    """By a sum that gloo has, as NCCL: with its own factor FSDP2 asks for another kind in float32 and bfloat16."""
    one = train(dgpo, "sd3", dtype="float32")
    for a, b in zip(one.rows, two["float32 shards"].rows, strict=True):
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3 * a["grad_norm"] and a["grad_norm"] > 0


def test_shards_of_groups_that_do_not_divide_by_the_updates(train, two):
    """3 groups a process and 2 updates: 2 and 1 groups, 1 and 2 passes, and yet every process gathers as often."""
    assert distance(train(grpo, "sd14", groups=6, micro_batch=4, steps=1), two["uneven"]) < 1e-9


def test_shards_resume(two):
    """By as many processes the same bits; by one the same numbers. Only the last step's shards stay."""
    assert distance(two["whole"], two["parts"]) < 1e-12
    assert 0 < distance(two["whole"], two["handed"]) < 1e-9
    for name, step in (("whole", 4), ("parts", 4), ("handed", 4), ("grpo shards", 2)):
        files = sorted(path.name for path in (two[name].out / "last").iterdir())
        assert files == ["lock", f"shards-{step}", "state.pt"]
        assert two[name].state["count"]["step"] == step


@pytest.fixture
def one_process(monkeypatch):
    """A group of this process alone, as torchrun with 1 process has."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    end = dist.destroy_process_group
    yield
    end()


def test_shards_are_written_once(flags, one_process, monkeypatch):
    """A kill must find whole shards under the name in state.pt, so the end of a run does not write those again."""
    import torch.distributed.checkpoint as dcp
    written, save = [], dcp.save
    monkeypatch.setattr(dcp, "save", lambda big, checkpoint_id: written.append(checkpoint_id.name) or
                        save(big, checkpoint_id=checkpoint_id))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with monkeypatch.context() as m, contextlib.redirect_stdout(io.StringIO()):
        m.setattr(data.Run, "done", lambda self: True)                 # stopped before its first update: no moments yet
        dgpo.main(flags("sd3", steps=2, fsdp=True))
    for steps, more in ((2, ["--resume"]), (2, ["--resume"]), (3, ["--resume"])):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dgpo.main(flags("sd3", steps=steps, fsdp=True, save_every=2) + more)
    assert written == ["shards-0", "shards-2", "shards-3"]


@FAMILIES
def test_shards_compute_in_bfloat16_as_whole_weights_do(family, folder, flags, one_process):
    """Gathered in bf16, a block rounds its weights and products; times and positions are no such matter."""
    torch.manual_seed(0)
    pipe = models.load("", folder / family, text_length=8)
    x = torch.randn(4, *pipe.latent_shape(32))
    t = torch.tensor([999., 961., 637., 3.]) / (1 if pipe.ddpm else 1000)
    exact, errors = pipe.net(x, t, *pipe.encode_text(["a red circle"] * 4)), []
    for fsdp in (False, True):
        cfg = data.cli(dgpo.Config, dgpo.PRESETS, flags(family, dtype="bfloat16", fsdp=fsdp))
        sharded, params = data.load_policy(cfg, SimpleNamespace(device=torch.device("cpu"), watch=id, say=id))
        assert all(p.dtype == torch.float32 and models.is_sharded([p]) == fsdp for p in params)
        with torch.no_grad():
            some = sharded.encode_text(["a red circle"] * 4)
            errors.append((dgpo.guided(sharded.net, x, t, some, None, 1) - exact).std().item())
    assert 0 < errors[1] < 1.5 * errors[0] < .1 * exact.std(), errors
    cfg = data.cli(dgpo.Config, dgpo.PRESETS, flags(family, dtype="bfloat16", fsdp=True, init="random"))
    pipe, _ = data.load_policy(cfg, SimpleNamespace(device=torch.device("cpu"), watch=id, say=id))
    assert dgpo.guided(pipe.net, x, t, pipe.encode_text(["a red circle"] * 4), None, 1).isfinite().all()


# ============================================================================================================== memory

@pytest.mark.parametrize("module, settings", ((dgpo, {}), (dgpo, dict(clip_range=1e-3, clip_old="ema")),
                                              (dgpo, dict(method="diffusion-dpo")), (grpo, {})),
                         ids=("dgpo", "clip", "dpo", "grpo"))
def test_micro_batches_inside_a_group(module, settings, train):
    """3 of 8 images at a time: the loss of a group is not a sum over its images, and yet its gradient adds up."""
    parts, whole = (train(module, "sd3", group_size=8, micro_batch=size, **settings) for size in (3, 64))
    assert distance(parts, whole) < 1e-9
    for a, b in zip(parts.rows, whole.rows, strict=True):
        assert all(abs(a[key] - b[key]) <= 2e-6 for key in ("loss", "kl", "dsm", "grad_norm") if key in a)


@FAMILIES
@BOTH
def test_checkpointing(module, family, train, monkeypatch):
    """Blocks computed again in the backward pass: the same weights, from more forward passes of blocks."""
    kept = train(module, family)
    calls, again = [], models.checkpoint
    monkeypatch.setattr(models, "checkpoint", lambda *args, **options: calls.append(1) or again(*args, **options))
    assert distance(kept, train(module, family, checkpointing=True)) < 1e-12 and calls


def test_compiled_blocks_stay_compiled(flags, monkeypatch):
    """Gradients on and off, several batch sizes: PyTorch's own limit would send most passes to eager."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile(block, backend="eager"))
    cfg = data.cli(dgpo.Config, dgpo.PRESETS, flags("sd14", lora_rank=2, compile=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        pipe, params = data.load_policy(cfg, SimpleNamespace(device=torch.device("cpu"), watch=id, say=id))
        for batch in (6, 4, 3):
            x, ctx = torch.randn(batch, *pipe.latent_shape(32)).double(), pipe.encode_text(["a red circle"] * batch)
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    v = dgpo.guided(pipe.net, x, 1, ctx, None, 1)
            v.square().mean().backward()
    assert all(p.grad is not None for p in params)
    torch._dynamo.reset()


def test_compiled_blocks_know_whether_the_lora_is_merged(flags, monkeypatch):
    """Each block is compiled for both, once, and computes what it does uncompiled, after updates, too."""
    compile, graphs = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile(
        block, backend=lambda graph, _: graphs.append(1) or graph.forward))
    torch._dynamo.reset()
    answers = []
    for on in (False, True):
        cfg = data.cli(dgpo.Config, dgpo.PRESETS, flags("sd3", lora_rank=2, compile=on))
        torch.manual_seed(0)
        pipe, params = data.load_policy(cfg, SimpleNamespace(device=torch.device("cpu"), watch=id, say=id))
        x, ctx = torch.randn(2, *pipe.latent_shape(32)).double(), pipe.encode_text(["a red circle"] * 2)
        for update in range(3):
            for p in params:
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(update), dtype=p.dtype)
            for merge in (False, True):
                with torch.no_grad(), models.merged(pipe.net, merge):
                    answers.append(dgpo.guided(pipe.net, x, .5, ctx, None, 1))
            if on and update == 0:
                once = len(graphs)
    assert len(graphs) == once > 1
    for plain, compiled in zip(answers, answers[6:]):
        assert torch.allclose(plain, compiled, rtol=1e-12, atol=1e-12)
    assert (answers[0] - answers[1]).abs().max() < 1e-10 < 1e-3 < (answers[0] - answers[2]).abs().max()
    torch._dynamo.reset()


@BOTH
def test_offload(module, train, monkeypatch):
    """The VAE waits on the CPU and is fetched for each decoding: the same bits."""
    moves, to = [], models.VAE.to
    monkeypatch.setattr(models.VAE, "to", lambda vae, place: moves.append(str(place)) or to(vae, place))
    assert distance(train(module, "sd3"), train(module, "sd3", offload=True)) == 0
    assert moves[0] == "cpu" and len(moves) == 1 + 2 * 6               # 2 steps, 2 evaluations, 2 rows of the picture


@FAMILIES
@BOTH
def test_lora(module, family, train, folder):
    """Only the LoRA is trained and kept: no base weight lies in the checkpoint, none in lora.safetensors."""
    run, net = train(module, family, lora_rank=2), network(folder, family)
    models.add_lora(net, 2, 128.0, net.lora_targets)
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters() if p.requires_grad))
    assert [p.shape for p in run.state["params"]] == [*shapes] == [p.shape for p in run.state["ema"]]
    assert all(unread(name) or p.abs().max() > 1e-4 for name, p in zip(names, run.state["params"]))  # B started at zero
    kept = {part for values in run.state["opt"]["state"].values() for part in values}
    assert kept == {"step", "exp_avg", "exp_avg_sq"} and len(run.state["opt"]["state"]) == len(shapes)
    bare = sum(math.prod(shape) for shape in shapes) * 8
    assert 4 * bare < (run.out / "last" / "state.pt").stat().st_size < 4 * bare + 2000 * len(shapes)
    with safe_open(run.out / "lora.safetensors", framework="pt") as file:
        assert len(file.keys()) == len(shapes) and all(".lora_" in key for key in file.keys())
    assert not (run.out / "transformer").exists() and not (run.out / "unet").exists()


@FAMILIES
def test_merged_lora(family, train):
    """The rollouts' LoRA added into the weights: in float64 the same run."""
    assert 0 < distance(train(dgpo, family, lora_rank=2), train(dgpo, family, lora_rank=2, merge_lora=True)) < 1e-9


@FAMILIES
@BOTH
def test_bfloat16_keeps_float32_weights(module, family, train, folder):
    """The file's own, not rounded: an update far under bf16's precision is kept, and they start from there.

    The rollout's batch gives again its log-probs to the bit, so that the self-check needs no wider clip range.
    """
    run, net = train(module, family, dtype="bfloat16", lr=1e-6), network(folder, family)
    for key in ("params", "ema"):
        assert all(p.dtype == torch.float32 for p in run.state[key])
    for p, (name, before) in zip(run.state["params"], net.named_parameters(), strict=True):
        assert unread(name) or 0 < (p - before.float()).abs().max() < 1e-5, name
    assert all(math.isfinite(row["grad_norm"]) for row in run.rows if "loss" in row)


# ================================================================================================================ math

def test_noised_and_the_loss_of_a_ddpm_network():
    """Formulas in float64, one image at a time, and diffusers' own scheduler, whose table is float32."""
    torch.manual_seed(0)
    x_0, eps, v = torch.randn(3, 5, 4, 6, 6, dtype=torch.float64)
    n = torch.tensor([0, 1, 500, 998, 999])
    theirs = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x_n = dgpo.noised(x_0, eps, n.double(), ddpm=True)
    torch.testing.assert_close(x_n, theirs.add_noise(x_0, eps, n), rtol=0, atol=1e-5)
    torch.testing.assert_close(dgpo.noised(x_0.float(), eps.float(), n.float(), ddpm=True), x_n.float())
    for weight in ("v", "x0"):
        loss = dgpo.dsm_loss(v, x_0, eps, n.double(), weight, ddpm=True)
        assert loss.shape == (5,)
        for i, step in enumerate(n.tolist()):
            a = 1.0
            for m in range(step + 1):
                a *= 1 - (0.00085 ** .5 + (0.012 ** .5 - 0.00085 ** .5) * m / 999) ** 2
            torch.testing.assert_close(x_n[i], a ** .5 * x_0[i] + (1 - a) ** .5 * eps[i], rtol=1e-12, atol=1e-12)
            guess = (x_n[i] - (1 - a) ** .5 * v[i]) / a ** .5
            want = (guess - x_0[i]).square().mean() if weight == "x0" else (v[i] - eps[i]).square().mean()
            torch.testing.assert_close(loss[i], want, rtol=1e-10, atol=0)
    t = torch.tensor([0.0, .25, .5, .9, 1.0], dtype=torch.float64)
    want = torch.stack([(1 - s) * a + s * b for s, a, b in zip(t, x_0, eps)])
    torch.testing.assert_close(dgpo.noised(x_0, eps, t), want, rtol=1e-12, atol=1e-12)


def test_the_slope_gives_a_group_s_gradient_in_parts():
    """dL/dl_i = beta / (P G) sigmoid(z_g) A_i, and mean_i slope_i A_i l_i has the gradient of L / beta."""
    torch.manual_seed(0)
    P, G, beta = 3, 5, 7.0
    dsm, dsm_ref, adv = torch.rand(3, P * G, dtype=torch.float64) * torch.tensor([[1.], [1.], [2.]]) - .5
    dsm.requires_grad_()
    whole, = torch.autograd.grad(dgpo.dgpo_loss(dsm, dsm_ref, adv, G, beta), dsm)
    slope = dgpo.dgpo_slope(dsm.detach(), dsm_ref, adv, G, beta)
    assert slope.std() > .01
    torch.testing.assert_close(whole, beta / (P * G) * slope * adv, rtol=1e-12, atol=1e-15)
    parts, = torch.autograd.grad((slope * adv * dsm).mean(), dsm)
    torch.testing.assert_close(parts, whole / beta, rtol=1e-12, atol=1e-15)


@FAMILIES
def test_dgpos_sde_with_hardly_any_noise_is_its_ode(family, tmp_path):
    """Step by step to the image itself, by flow times and by DDPM steps, with guidance."""
    pipelines.save(family, tmp_path / "weights")
    pipe = models.load("", str(tmp_path / "weights"), text_length=8)
    cfg = dgpo.Config(sample_steps=5, group_size=2, solver="ddim" if family == "sd14" else "euler", cfg_rollout=2.0,
                      resolution=32)
    ctx, null = pipe.encode_text(["a ring"] * 2), pipe.encode_text([""])
    want = dgpo.rollout(pipe, ctx, null, cfg, 0, range(1))
    got = dgpo.rollout(pipe, ctx, null, dataclasses.replace(cfg, sde=True, noise_level=1e-6), 0, range(1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.std().item())


@FAMILIES
def test_a_grid_is_the_samplers_times_from_t_min_on(family, flags, tmp_path, monkeypatch):
    """Flow times, and DDPM steps, of which t_min is a share; the end of the last step is no time to train."""
    monkeypatch.chdir(tmp_path)
    honest, seen = dgpo.draw_time, []
    monkeypatch.setattr(dgpo, "draw_time", lambda cfg, times, *rest: seen.append(times) or honest(cfg, times, *rest))
    line = flags(family, grid=True, sample_steps=8, t_min=.5, steps=1)
    dgpo.main(line)
    pipe = models.load("", line[line.index("--weights") + 1], text_length=8)
    whole = 1000 if family == "sd14" else 1
    want = [t for t in pipe.times(8, resolution=32)[:-1] if t / whole >= .5]
    assert 2 <= len(want) <= 7 and seen and all(times == want for times in seen)


@pytest.mark.parametrize("t_min", (0.0, .5, .8))
def test_draws_of_a_ddpm_step(t_min, monkeypatch):
    """Whole steps, as often in each tenth of [1000 t_min, 999], and close to both ends."""
    cfg = SimpleNamespace(grid=False, t_min=t_min)
    steps = torch.tensor([dgpo.draw_time(cfg, [], True, 0, step, group, 0, 0) for step in range(500)
                          for group in range(8)])
    low = 1000 * t_min
    assert steps.dtype == torch.int64 and low <= steps.min() < low + 5 and 995 < steps.max() <= 999
    tenths = torch.histc(steps.double(), 10, low, 1000)
    assert (tenths - 400).abs().max() < 100                            # 5 standard deviations
    for u, step in ((0.0, 999), (1 - 2 ** -53, low)):       # t = 1 is no step of the table
        monkeypatch.setattr(data, "uniform", lambda *key: [u])
        assert dgpo.draw_time(cfg, [], True, 0, 0, 0, 0, 0) == step
    monkeypatch.undo()
    cfg = SimpleNamespace(grid=True, t_min=t_min)
    assert {dgpo.draw_time(cfg, [981, 501], True, 0, 0, 0, 0, draw) for draw in range(2)} == {981, 501}


# ================================================================================================================ text

def test_text_cache(train, folder, tmp_path, monkeypatch):
    """The first run encodes each prompt once, the second none; both train as a run without a cache does."""
    encoded, encode = [], models.TextToImage.encode
    monkeypatch.setattr(models.TextToImage, "encode",
                        lambda pipe, prompts: encoded.append(prompts) or encode(pipe, prompts))
    first = train(dgpo, "sd3", text_cache=tmp_path / "text")
    assert sorted(encoded) == [[""], ["a blue square"], ["a red circle"], ["two green stars"]]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "text").rglob("*.safetensors")}
    assert len(files) == 4
    second = train(dgpo, "sd3", text_cache=f"{tmp_path}/text")
    assert len(encoded) == 4 and all(path.stat().st_mtime_ns == when for path, when in files.items())
    assert distance(first, second) == distance(first, train(dgpo, "sd3")) == 0


@FAMILIES
@BOTH
def test_random_weights(module, family, train, folder, tmp_path):
    """A directory of settings alone: --init random trains, on random text."""
    bare = tmp_path / "bare"
    shutil.copytree(folder / family, bare, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "text_*"))
    run = train(module, family, weights=bare, init="random", dtype="float32")
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in run.rows)
    assert len(run.rows) == 2 and (run.out / ("unet" if family == "sd14" else "transformer")).is_dir()


# ============================================================================================================= the peer

def peer(how, module, line, out):
    """The same script on diffusers' network and peft's LoRA, in a process of its own."""
    done = subprocess.run([sys.executable, ROOT / "csrc" / "peer.py", how, module.__name__, *line],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return result(out, done.stdout)


@BOTH
@FAMILIES
def test_diffusers_and_peft_do_the_same_work(module, family, flags, train):
    """csrc/peer.py, which benchmarks are set beside: the same images, losses, passes, count of trained parameters."""
    more = dict(lora_rank=4, updates=1, checkpointing=True, dtype="float32", **(
        dict(clip_range=.5, ref="start", hold=0) if module is dgpo else dict(kl_beta=.1)))
    ours = train(module, family, **more)
    theirs = peer("bfloat16", module, flags(family, out="peer", **more), "peer")
    trained = [re.search(r"([\d,]+) trained parameters", run.said).group(1) for run in (ours, theirs)]
    assert trained[0] == trained[1] and len(theirs.rows) == len(ours.rows) == 2
    for key in ("forwards", "backwards", "reward", "loss", "kl"):      # before the first update: B is 0
        assert theirs.rows[0][key] == pytest.approx(ours.rows[0][key], rel=1e-4, abs=1e-5), key


def test_the_peer_holds_its_weights_as_the_released_code(flags):
    """In float32, the LoRA, too; what it computes differs by bf16's rounding."""
    more = dict(lora_rank=4, dtype="bfloat16", eval_images=8)
    lean, released = (peer(how, dgpo, flags("sd3", out=how, **more), how) for how in ("bfloat16", "released"))
    assert [run.rows[-1]["forwards"] for run in (lean, released)] == [lean.rows[-1]["forwards"]] * 2
    assert released.rows[0]["reward"] == pytest.approx(lean.rows[0]["reward"], abs=.05)
    assert released.rows[0]["reward"] != lean.rows[0]["reward"]


def test_the_benchmark_of_models_runs_ours_and_theirs(folder):
    code = f"""import sys; sys.path[:0] = ["{ROOT}/csrc", "{ROOT}"]
import bench, json
few = ["--group-size", 4, "--micro-batch", 4, "--lora-rank", 4, "--sample-steps", 2]
small = [*few, "--resolution", 32, "--text-length", 8]
rows = bench.model([("dgpo", "{folder}/sd3", 80, bench.PEERS)], small)
rows += bench.model([("proxt2i", "{ROOT}/tests/tiny-prox", 80, ())], [*few, "--resolution", 28])
rows += bench.model([("dgpo", "{folder}/sd3", 80, ())], [*small, "--dtype", "float16"])
print(json.dumps(rows))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, wrong = json.loads(done.stdout.splitlines()[-1])
    assert [(row["script"], row["network"]) for row in rows] == [
        ("dgpo", "ours"), ("dgpo", "bfloat16"), ("dgpo", "released"), ("proxt2i", "ours")]
    for row in rows:                                                   # of 4 images, by which the table divides
        assert row["seconds"] is not None, row["error"]
        assert .2 * row["seconds"] < 4 / row["rollout"] + 4 / row["update"] <= row["seconds"] + .01
    assert wrong["seconds"] is None and "--dtype 'float16'" in wrong["error"]


# =========================================================================================================== bad input

@pytest.fixture
def refused(capsys):
    """refused(module, line, *words): exit code 2, one line on stderr with those words, and no OUT."""
    def check(module, line, *words):
        with pytest.raises(SystemExit) as end:
            module.main(line)
        err = capsys.readouterr().err
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        lines = [part for part in err.replace("\r", "\n").split("\n") if part.strip()]
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err[-2000:]
        missing = [word for word in words if str(word) not in lines[0]]
        assert not missing and not Path("out").exists(), (missing, lines[0])
    return check


@BOTH
def test_what_a_model_cannot_do(module, flags, refused, monkeypatch):
    refused(module, flags("sd14", solver="euler"), "--solver euler", "sd14", "--solver ddim")
    refused(module, flags("sd3", schedule="ddim"), "--schedule ddim", "sd3", "--schedule linear")
    refused(module, flags("sd14", shift=3.0), "--shift 3", "sd14")
    refused(module, flags("flux", gpu_memory=24), "--gpu-memory 24", "--gpu-memory 48")
    for family in pipelines.FAMILIES:
        refused(module, flags(family, resolution=33), "resolution=33", "multiple of 4" if family == "sd14" else "of 8")
    if module is grpo:
        refused(module, flags("sd14", sde="flow"), "--sde flow", "sd14", "--sde ddim")
    else:
        refused(module, flags("sd14", dsm="elbo"), "--dsm elbo", "--dsm v")
    noisy = flags("sd14", noise_level=1.5, **{} if module is grpo else {"sde": True})
    refused(module, noisy, "--noise-level 1.5 is DDIM's eta", "try 1")
    refused(module, flags("sd3", fsdp=True), "--fsdp", "torchrun")
    refused(module, ["--model", "flux", "--weights", "nowhere", "--fsdp"], "no weights for --model flux")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refused(module, flags("sd3", fsdp=True, lora_rank=2), "--fsdp", "--lora-rank 0")


@BOTH
def test_missing_and_damaged_files(module, flags, refused, folder, tmp_path):
    """A shard that is not there, half a VAE, a pickle, and a pickle under another name."""
    copy = tmp_path / "copy"

    def damaged(family, damage, *words):
        shutil.copytree(folder / family, copy)
        damage()
        refused(module, flags(family, weights=copy), *words)
        shutil.rmtree(copy)
    part = copy / "transformer"
    whole, first, last = (part / f"diffusion_pytorch_model{name}.safetensors" for name in (
        "", "-00001-of-00002", "-00002-of-00002"))

    def without_a_shard():
        with safe_open(whole, framework="pt") as file:
            keys = list(file.keys())
        index = {key: (first if i < len(keys) // 2 else last).name for i, key in enumerate(keys)}
        (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        whole.rename(first)
    damaged("sd3", without_a_shard, last, "missing", "index.json")
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    damaged("flux", lambda: vae.write_bytes(vae.read_bytes()[:5000]), vae, "damaged")
    pickle = copy / "unet" / "diffusion_pytorch_model.bin"

    def as_pickle():
        torch.save({}, pickle)
        pickle.with_suffix(".safetensors").unlink()
    damaged("sd14", as_pickle, pickle, "pickle", "safetensors")
    damaged("sd3", lambda: torch.save({}, whole), whole, "damaged")


def test_a_text_cache_that_cannot_be_made(flags, refused):
    Path("file").write_text("")
    refused(dgpo, flags("sd3", text_cache="file"), "--text-cache file")


def test_more_processes_than_gpus(flags, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    refused(dgpo, flags("sd3"), "process 4", "--nproc_per_node 4")


def test_too_little_memory_names_the_plan_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gigabytes, plan in ((23.6, 24), (47.4, 48), (44.5, 48), (39.4, 24), (79.3, 80),
                            (139.8, 141), (11.0, 24)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(gigabytes * 2 ** 30)))
        with pytest.raises(SystemExit) as end, data.exit_codes():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(lines) == 1 and f"--gpu-memory {plan}," in lines[0], lines
