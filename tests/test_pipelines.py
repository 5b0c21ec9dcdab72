"""Whole pipelines against diffusers: prompts, times, pixels, files and LoRA of SD3, FLUX and Stable Diffusion 1."""
import dataclasses
import json
import math
import shutil
import types
from pathlib import Path

import diffusers
import numpy
import peft
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal

import data
import dgpo
import grpo
import models
import pipelines
import rewards

PROMPTS = ("", "a red circle", "two blue squares, a heart! " * 30, "  A  GREEN\tTriangle\n",
           "\u00fcn\u00efc\u00f6de\u0301 \u2014 \u732b \U0001f408 a star")
NAMES = {"sd3": "sd35m", "flux": "flux", "sd14": "sd14"}               # family -> --model
NET = {"sd3": "transformer", "flux": "transformer", "sd14": "unet"}
EACH = pytest.mark.parametrize("family", pipelines.FAMILIES)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """{family: (directory, diffusers' pipeline)}; schnell is FLUX without guidance, its times not shifted."""
    folders = {family: tmp_path_factory.mktemp(family) for family in pipelines.FAMILIES}
    made = {family: (folder, pipelines.save(family, folder)) for family, folder in folders.items()}
    folder, dev = tmp_path_factory.mktemp("schnell") / "model", made["flux"][1]
    config = {key: value for key, value in dev.transformer.config.items() if not key.startswith("_")}
    net = diffusers.FluxTransformer2DModel(**config | {"guidance_embeds": False})
    schnell = diffusers.FluxPipeline(**dev.components | {
        "transformer": pipelines.redraw(net, 5), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)})
    shutil.copytree(made["flux"][0], folder)
    schnell.transformer.save_pretrained(folder / "transformer")
    schnell.scheduler.save_pretrained(folder / "scheduler")
    made["schnell"] = folder, schnell
    for _, pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def copy(saved, tmp_path):
    """copy(family): a copy of its directory, to be damaged."""
    def copied(family):
        return Path(shutil.copytree(saved[family][0], tmp_path / family))
    return copied


def near(ours, theirs, tolerance=1e-5):
    """Equal within a fraction of the standard deviation."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert 0.01 < theirs.std() < 20
    error = (ours - theirs).abs().max() / theirs.std()
    assert error <= tolerance, f"off by {error:.1e} standard deviations"


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ================================================================================================ from prompt to pixels

@pytest.mark.parametrize("family, steps, size, options, kind, scale", (
    ("sd3", 7, 32, dict(guidance_scale=4.5, negative_prompt=[""] * 2, max_sequence_length=77), "sd3", 4.5),
    ("sd3", 4, 48, dict(guidance_scale=1.0, max_sequence_length=77), "sd3", 1),
    ("flux", 5, 32, dict(guidance_scale=3.5, max_sequence_length=77), "", 1),
    ("flux", 3, 72, dict(guidance_scale=3.5, max_sequence_length=77), "", 1),
    ("schnell", 4, 32, dict(guidance_scale=0.0, max_sequence_length=77), "", 1),
    ("sd14", 10, 32, dict(guidance_scale=5.0), "", 5.0),
    ("sd14", 4, 48, dict(guidance_scale=1.0), "", 1)))
def test_from_prompt_to_pixels(family, steps, size, options, kind, scale, saved):
    """The same noise and prompts give the same latents and the same image."""
    directory, theirs = saved[family]
    ours, prompts = models.load(str(directory), text_length=77), list(PROMPTS[1:3])
    shape = ours.latent_shape(size)
    assert shape == (4, size // 4, size // 4)
    x = start = randn(2, *shape)
    if family in ("flux", "schnell"):
        start = theirs._pack_latents(x, *x.shape)
    ts = ours.times(steps, kind, resolution=size)
    x = grpo.ode(ours.net, x, ts, ours.encode_text(prompts), ours.encode_text([""]), scale, ours.solver())
    latents, images = (theirs(prompts, latents=start, num_inference_steps=steps, height=size, width=size,
                              output_type=output, **options).images for output in ("latent", "pt"))
    if family in ("flux", "schnell"):
        latents = theirs._unpack_latents(latents, size, size, theirs.vae_scale_factor)
    near(x, latents)
    near(ours.decode(x), images)
    assert images[0].sub(images[1]).abs().mean() > 0.01                # the prompt is seen
    assert (images == images.clamp(0.01, 0.99)).float().mean() > 0.5   # and little of it cut off


# ============================================================================================================== prompts

def encoded(theirs, family, prompts, length):
    """diffusers' features, in our order."""
    if family == "sd3":
        context, _, pooled, _ = theirs.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False,
                                                     max_sequence_length=length)
        return context, pooled
    if family == "sd14":
        return theirs.encode_prompt(prompts, "cpu", 1, False)[:1]
    return theirs.encode_prompt(prompts, max_sequence_length=length)[:2]


@pytest.mark.parametrize("family, text_length, length", (
    ("sd3", 77, 77), ("sd3", None, 128), ("flux", None, 512), ("flux", 77, 77), ("schnell", None, 256),
    ("sd14", None, None)))
def test_text_features_are_those_of_the_pipeline(family, text_length, length, saved):
    """Alone or together, by encode and, kept, by encode_text; FLUX.1-dev's third says how much guidance."""
    directory, theirs = saved[family]
    ours, prompts = models.load(str(directory), text_length=text_length), list(PROMPTS)
    with torch.no_grad():
        want = encoded(theirs, family, prompts, length)
    for got in (ours.encode(prompts), ours.encode_text(prompts)[:len(want)]):
        for a, b in zip(got, want, strict=True):
            near(a, b)
    if length:
        assert want[0].shape[1] == length + (family == "sd3") * 16     # CLIP's tokens, then T5's
    again = ours.encode_text(prompts[::-1] + prompts[:1])
    assert all(torch.equal(a[:-1].flip(0), b) and torch.equal(a[-1], b[0])
               for a, b in zip(again, ours.encode_text(prompts)))
    assert len(again) == len(want) + (family == "flux")
    if family == "flux":
        ours.guidance = 2.0
        assert ours.encode_text(prompts)[2].tolist() == [2.0] * len(prompts) and again[2].unique().tolist() == [3.5]


def test_the_features_of_a_prompt_are_sent_once_whatever_its_copies(saved, monkeypatch):
    pipe, shapes, send = models.load(str(saved["sd3"][0])), [], data.sent
    monkeypatch.setattr(data, "sent", lambda tensor, device: shapes.append((*tensor.shape,)) or send(tensor, device))
    context, pooled = pipe.encode_text([PROMPTS[2]] * 2 + [PROMPTS[1]] * 3)
    assert shapes == [(5,)]                                            # what is on the network's device stays there
    pipe.net.to("meta")                                                # in place of a GPU
    again = pipe.encode_text([PROMPTS[2]] * 2 + [PROMPTS[1]] * 3)
    assert shapes[1:] == [(5,), (2, *context.shape[1:]), (2, *pooled.shape[1:])]
    assert [(x.shape, x.device.type) for x in again] == [(context.shape, "meta"), (pooled.shape, "meta")]


# ============================================================================================================ schedules

@pytest.mark.parametrize("steps", (1, 4, 10, 20, 30, 50, 999))
def test_ddim_times_are_diffusers(steps, saved):
    scheduler = saved["sd14"][1].scheduler
    scheduler.set_timesteps(steps)
    assert models.schedule(steps, kind="ddim") == [*scheduler.timesteps.tolist(), 0]


def test_ddim_has_999_steps_at_most():
    """A thousand, offset by one, would begin at step 1000, and the last is 999."""
    assert models.schedule(999, kind="ddim")[0] == len(models.ALPHA_BAR) - 1
    with pytest.raises(ValueError, match="steps=1000: .* 999"):
        models.schedule(1000, kind="ddim")


def test_alpha_bar_as_a_tensor_is_made_once():
    for dtype in (torch.float32, torch.float64):
        table = models.alpha_bar(torch.device("cpu"), dtype)
        assert torch.equal(table, torch.tensor(models.ALPHA_BAR, dtype=dtype))
        assert models.alpha_bar(torch.ones(1).device, dtype) is table


def test_alpha_bar_is_diffusers(saved):
    scheduler = saved["sd14"][1].scheduler
    torch.testing.assert_close(torch.tensor(models.ALPHA_BAR), scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    assert models.ALPHA_BAR[0] == pytest.approx(scheduler.final_alpha_cumprod.item(), abs=1e-6)


@pytest.mark.parametrize("family", ("flux", "schnell"))
@pytest.mark.parametrize("size", (256, 512, 1024))
@pytest.mark.parametrize("steps", (1, 4, 28))
def test_flux_times_are_diffusers(family, size, steps, saved):
    """Resolutions of the public VAE: 8 px a latent, 16 px a token. In float32 there, so 1e-6."""
    theirs, ours = saved[family][1].scheduler, models.TextToImage(
        "flux", torch.nn.Linear(1, 1), shift=models.read_shift(saved[family][0]))
    ours.latent_shape = lambda resolution: (16, resolution // 8, resolution // 8)
    tokens = (size // 16) ** 2
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    assert models.flux_shift(tokens) == pytest.approx(math.exp(mu), rel=1e-12)
    theirs.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
    torch.testing.assert_close(torch.tensor(ours.times(steps, resolution=size)), theirs.sigmas, rtol=0, atol=1e-6)
    kept = torch.tensor(ours.times(steps, shift=3.0, resolution=size))                   # a flag beats the checkpoint
    torch.testing.assert_close(kept, torch.tensor(models.schedule(steps, 3.0)), rtol=0, atol=0)


def test_a_dynamic_shift_of_another_line_is_refused(copy):
    file = copy("flux") / "scheduler" / "scheduler_config.json"
    edit(file, max_shift=1.3)
    with pytest.raises(ValueError, match=r"scheduler_config\.json: max_shift=1\.3"):
        models.load(str(file.parent.parent))


@pytest.mark.parametrize("family, change", (
    ("flux", dict(use_karras_sigmas=True)), ("sd3", dict(use_exponential_sigmas=True)),
    ("sd3", dict(use_beta_sigmas=True)), ("sd3", dict(invert_sigmas=True)), ("flux", dict(shift_terminal=0.02)),
    ("schnell", dict(stochastic_sampling=True)), ("sd3", dict(use_dynamic_shifting=True))), ids=str)
def test_flow_times_of_another_kind_are_refused(family, change, copy):
    directory, (name, value) = copy(family), *change.items()
    edit(directory / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: {name}={value} is not implemented: only "):
        models.load(str(directory))


SOLVERS = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler


@pytest.mark.parametrize("scheduler, shift", (
    *((solver(use_flow_sigmas=True, flow_shift=2.5, prediction_type="flow_prediction"), 2.5) for solver in SOLVERS),
    (diffusers.FlowMatchHeunDiscreteScheduler(shift=4.0), 4), *((solver(flow_shift=3.0), None) for solver in SOLVERS),
    (diffusers.EulerDiscreteScheduler(), None)), ids=lambda value: type(value).__name__)
def test_the_shift_of_another_scheduler_is_read_or_it_is_refused(scheduler, shift, copy):
    directory = copy("sd3")
    scheduler.save_pretrained(directory / "scheduler")
    if shift:
        assert models.read_shift(directory) == shift
    else:
        with pytest.raises(ValueError, match=rf"scheduler_config\.json: a {type(scheduler).__name__} with shift=None"):
            models.load(str(directory))


@pytest.mark.parametrize("shift", (0, -1, None, "abc", math.inf, math.nan))
def test_a_shift_that_is_no_number_above_0_is_refused(shift, copy):
    directory = copy("sd3")
    edit(directory / "scheduler" / "scheduler_config.json", shift=shift)
    with pytest.raises(ValueError, match=rf"{directory}/scheduler/scheduler_config\.json: .* with shift={shift!r}:"):
        models.load(str(directory))


@pytest.mark.parametrize("change", (
    dict(prediction_type="v_prediction"), dict(beta_schedule="linear"), dict(beta_start=0.0001), dict(beta_end=0.02),
    dict(num_train_timesteps=500), dict(trained_betas=[0.1, 0.2]), dict(rescale_betas_zero_snr=True)), ids=str)
def test_ddpm_steps_of_another_kind_are_refused(change, copy):
    """What a file leaves out is at diffusers' default: other betas than Stable Diffusion 1's, but its prediction."""
    directory, (name, value) = copy("sd14"), *change.items()
    file = directory / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    edit(file, **change)
    with pytest.raises(ValueError) as caught:
        models.load(str(directory))
    assert f"scheduler_config.json: {name}={value!r} is not implemented: only " in str(caught.value)
    file.write_text(json.dumps({key: config[key] for key in config if key != name}))
    if name.startswith("beta_"):
        with pytest.raises(ValueError, match=f"{name}=.*{diffusers.DDIMScheduler().config[name]}"):
            models.load(str(directory))
    else:
        models.load(str(directory))


def test_a_pipeline_that_names_no_scheduler_has_no_shift(copy):
    directory = copy("sd3")
    assert models.read_shift(directory) == 3
    shutil.rmtree(directory / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json is missing"):
        models.read_shift(directory)
    for value in ([None, None], None):
        edit(directory / "model_index.json", scheduler=value)
        assert models.read_shift(directory) == 1


# ================================================================================================================= DDIM

@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("steps", (4, 50))
def test_ddim_step_is_diffusers(eta, steps, saved):
    """The first, a middle and the last step, which arrives at alpha_bar[0]: there is noise in it, too."""
    scheduler, ts = saved["sd14"][1].scheduler, models.schedule(steps, kind="ddim")
    scheduler.set_timesteps(steps)
    for i in (0, steps // 2, steps - 1):
        eps_hat, x, eps = (randn(2, 3, 4, 4, seed=10 * i + k) for k in range(3))
        want = scheduler.step(eps_hat, ts[i], x, eta=eta, variance_noise=eps).prev_sample
        a, a_next = models.ALPHA_BAR[ts[i]], models.ALPHA_BAR[ts[i + 1]]
        x_next, logp, mean, std = grpo.ddim_step(eps_hat, x, a, a_next, eta, eps)
        near(x_next, want)
        assert std == pytest.approx(eta * scheduler._get_variance(ts[i], ts[i + 1]).item() ** 0.5, rel=1e-3)
        assert (logp is None) == (eta == 0)
        if eta:
            _, scored, *_ = grpo.ddim_step(eps_hat, x, a, a_next, eta, x_next=x_next)
            assert torch.equal(logp, scored)
            exact = Normal(mean.double(), std).log_prob(x_next.double()).flatten(1).mean(1)
            torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(mean, x_next) and torch.equal(grpo.ddim_step(eps_hat, x, a, a_next, eta)[0], x_next)


MEAN, STD, COUNT = 0.7, 0.4, 40000


def keeps(x, a):
    """x has the mean and variance of sqrt(a) x_0 + sqrt(1 - a) eps, x_0 ~ N(MEAN, STD^2): four standard errors."""
    variance = a * STD ** 2 + 1 - a
    assert abs(x.mean().item() - math.sqrt(a) * MEAN) < 4 * math.sqrt(variance / COUNT)
    assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / COUNT)


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_ddim_keeps_the_marginals_whatever_the_steps(eta):
    """Told the noise that is in x_n, a step draws q(x_next | x_n, x_0), DDIM's Eq. 7: exact in 4 steps of any eta."""
    x_0 = MEAN + STD * randn(COUNT, 1, 1, 1, dtype=torch.float64)
    ts = models.schedule(4, kind="ddim")
    a = models.ALPHA_BAR[ts[0]]
    x = math.sqrt(a) * x_0 + math.sqrt(1 - a) * randn(*x_0.shape, seed=1, dtype=torch.float64)
    for i, n in enumerate(ts[1:]):
        eps_hat, a_next = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a), models.ALPHA_BAR[n]
        x, *_ = grpo.ddim_step(eps_hat, x, a, a_next, eta, randn(*x.shape, seed=2 + i, dtype=torch.float64))
        a = a_next
        keeps(x, a)


def expected(x, a):
    """E[eps | x_n] of that data: all that a network can know."""
    return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * STD ** 2 + 1 - a)


def followed(eta, steps):
    """The exact mean and variance of DDIM's samples with that network, and the data's: a step is affine in x_n."""
    ts, probe = models.schedule(steps, kind="ddim"), torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    a = models.ALPHA_BAR[ts[0]]
    mean, variance = math.sqrt(a) * MEAN, a * STD ** 2 + 1 - a
    for n in ts[1:]:
        a_next = models.ALPHA_BAR[n]
        _, _, out, std = grpo.ddim_step(expected(probe, a), probe, a, a_next, eta, torch.zeros_like(probe))
        b, slope = out[0].item(), (out[1] - out[0]).item()
        mean, variance, a = slope * mean + b, slope ** 2 * variance + std ** 2, a_next
    return mean, variance, math.sqrt(a) * MEAN, a * STD ** 2 + 1 - a


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_ddim_keeps_the_marginals_of_a_gaussian(eta):
    """With what a network can know the mean is exact and the error of the std falls as 1/steps, under 0.005 at last.

    Samples agree with these moments within four standard errors.
    """
    errors = []
    for steps in (250, 500, 999):
        mean, variance, true_mean, true_variance = followed(eta, steps)
        assert mean == pytest.approx(true_mean, abs=1e-12)
        errors.append(math.sqrt(variance) - math.sqrt(true_variance))
    assert all(1.7 < a / b < 2.1 for a, b in zip(errors, errors[1:])) and abs(errors[-1]) < 0.005, errors
    ts, generator = models.schedule(100, kind="ddim"), torch.Generator().manual_seed(3)
    a = models.ALPHA_BAR[ts[0]]
    x = math.sqrt(a) * MEAN + math.sqrt(a * STD ** 2 + 1 - a) * randn(COUNT, 1, 1, 1, dtype=torch.float64)
    for n in ts[1:]:
        eps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x, *_ = grpo.ddim_step(expected(x, a), x, a, models.ALPHA_BAR[n], eta, eps)
        a = models.ALPHA_BAR[n]
    mean, variance, *_ = followed(eta, 100)
    assert abs(x.mean().item() - mean) < 4 * math.sqrt(variance / COUNT)
    assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / COUNT)


# =========================================================================================================== text cache

def files(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def never(prompts):
    raise AssertionError(f"{prompts} were encoded again")


def test_what_is_kept():
    """Random features, of --init random, need no folder and no encoders."""
    pipe = models.TextToImage.__new__(models.TextToImage)
    pipe.encoders, pipe.folder = (), None
    assert pipe.is_kept("a")
    pipe.folder = Path("nowhere")
    assert not pipe.is_kept("a")
    pipe.encoders = (torch.nn.Identity(),)
    assert pipe.is_kept("a")


@EACH
def test_prepared_prompts_are_read_by_the_next_run(family, saved, tmp_path):
    """Encoded once, freed, and read bit for bit by another pipeline whose encoders are never asked."""
    directory, prompts = str(saved[family][0]), list(PROMPTS)
    first, second = models.load(directory), models.load(directory)
    want = models.load(directory).encode_text(prompts)
    first.prepare(prompts, tmp_path)
    written = files(tmp_path)
    assert first.encoders == () and len(written) == len(prompts)
    assert {name.suffix for name in written} == {".safetensors"}
    second.encode = never
    second.prepare(prompts[::-1], tmp_path)
    assert second.encoders == () and files(tmp_path) == written
    for pipe in (first, second):
        for _ in range(2):                                             # from disk, then from memory
            assert all(torch.equal(a, b) for a, b in zip(pipe.encode_text(prompts), want, strict=True))
    with pytest.raises(RuntimeError, match="before 'a prompt of tomorrow' was encoded"):
        first.encode_text([prompts[1], "a prompt of tomorrow"])


@EACH
def test_other_encoders_have_another_folder(family, saved, tmp_path):
    """One weight, the dtype, T5's length or a tokenizer's words: each changes the features, so the folder."""
    def folder(change=lambda pipe: None, **options):
        pipe = models.load(str(saved[family][0]), **options)
        change(pipe)
        pipe.prepare([""], tmp_path)
        return pipe.folder.name

    def weight(pipe):
        with torch.no_grad():
            next(pipe.encoders[-1].parameters()).view(-1)[0] += 1e-3

    def vocabulary(pipe):
        pipe.tokenizers[0].core.add_tokens(["a red circle"])
    def rounded(pipe):                                                 # the same numbers as in bfloat16, in float32
        for encoder in pipe.encoders:
            encoder.bfloat16().float()
    folders = [folder(), folder(weight), folder(vocabulary), folder(rounded), folder(dtype=torch.bfloat16)]
    if family != "sd14":
        folders += [folder(text_length=77), folder(text_length=78)]
    assert len(set(folders)) == len(folders) == len(list(tmp_path.iterdir()))
    assert folder() == folders[0]


def test_two_processes_share_the_prompts(saved, tmp_path):
    """Each takes its part of the sorted set, whatever the order and the copies it was given."""
    parts, directory = [], str(saved["sd3"][0])
    for rank, prompts in enumerate((PROMPTS, PROMPTS[::-1] * 2)):
        pipe, asked = models.load(directory), []
        encode = pipe.encode
        pipe.encode = lambda prompts: asked.extend(prompts) or encode(prompts)
        pipe.prepare(prompts, tmp_path, rank, 2)
        parts.append(asked)
    assert sorted(parts[0] + parts[1]) == sorted(PROMPTS) and min(map(len, parts)) == 2
    alone = models.load(directory)
    alone.prepare(PROMPTS, tmp_path / "alone")
    assert files(alone.folder) == files(pipe.folder)


def test_features_for_which_the_disk_is_too_small_are_refused_after_one(saved, tmp_path, monkeypatch):
    pipe = models.load(str(saved["sd3"][0]))
    free = 4 * sum(part.nbytes for part in pipe.encode([""])) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free))
    with pytest.raises(ValueError, match="features of 5 prompts need .* GB more .* are free: give --text-cache"):
        pipe.prepare(PROMPTS, tmp_path)
    assert len(files(tmp_path)) == 1
    pipe.prepare(PROMPTS, tmp_path)                                    # one is there, and three more fit
    assert len(files(tmp_path)) == len(PROMPTS)


def test_small_encoders_are_kept_and_large_ones_have_a_folder(saved, tmp_path, monkeypatch):
    """Without --text-cache nothing is written for small encoders; from ten million numbers on, weights/text is it."""
    monkeypatch.setattr(models, "HERE", tmp_path)
    small, large = (models.load(str(saved["sd14"][0])) for _ in range(2))
    small.prepare(PROMPTS)
    assert small.encoders and small.folder is None and not any(tmp_path.iterdir())
    large.encoders[0].ballast = torch.nn.Parameter(torch.zeros(1).expand(10 ** 7), requires_grad=False)
    large.prepare(PROMPTS)
    assert large.encoders == () and large.folder.parent == tmp_path / "weights" / "text"
    assert len(files(large.folder)) == len(PROMPTS)


def test_a_killed_writer_leaves_no_broken_file(saved, tmp_path, monkeypatch):
    """A file has its name only once it is whole, and a part of one does not stay; the next run writes the rest."""
    def killed(state, file, **options):
        save_file(state, file, **options)
        Path(file).write_bytes(Path(file).read_bytes()[:-7])
        raise KeyboardInterrupt
    pipe = models.load(str(saved["flux"][0]))
    monkeypatch.setattr(models, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        pipe.prepare(PROMPTS, tmp_path)
    assert not files(tmp_path)
    monkeypatch.undo()
    pipe.prepare(PROMPTS, tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        assert [part.ndim for part in load_file(file).values()] == [3, 2]
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(PROMPTS)


def test_the_cache_is_of_one_width(saved, tmp_path):
    """Features are padded to what the network reads, so another network's are others, with the same encoders."""
    pipe = models.load(str(saved["sd3"][0]))
    pipe.prepare([""], tmp_path)
    other = models.load(str(saved["sd3"][0]))
    other.net.config = {**other.net.config, "joint_attention_dim": 1 + other.net.config["joint_attention_dim"]}
    other.prepare([], tmp_path)
    assert other.folder != pipe.folder


def test_a_damaged_file_of_the_cache_is_an_error_that_names_it(saved, tmp_path):
    pipe = models.load(str(saved["sd14"][0]))
    pipe.prepare(["a heart"], tmp_path)
    file, = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        pipe.encode_text(["a heart"])


def test_offload_fetches_the_vae_to_encode_and_to_decode(saved, monkeypatch):
    pipe, moves, to = models.load(str(saved["sd3"][0])), [], models.VAE.to
    monkeypatch.setattr(models.VAE, "to", lambda vae, place: moves.append(str(place)) or to(vae, place))
    images = randn(2, 3, 32, 32).sigmoid()
    latents = pipe.encode_images(images)
    plain = pipe.decode(latents)
    assert not moves
    pipe.offload = True
    assert torch.equal(pipe.encode_images(images), latents) and moves == ["cpu"] * 2     # there, and back
    assert torch.equal(pipe.decode(latents), plain) and len(moves) == 4


# ================================================================================================= what suits a network

def test_latent_shape(saved):
    """The checkpoint's own, or a resolution in whole patches: 4 px a latent here; SD3's table has 12 x 12 patches."""
    sd3, flux, sd14 = (models.load(str(saved[family][0])) for family in pipelines.FAMILIES)
    assert sd3.latent_shape() == sd14.latent_shape(0) == (4, 8, 8)
    assert flux.latent_shape() == flux.latent_shape(512) == (4, 128, 128)                # its config names none: 128
    assert sd3.latent_shape(96) == (4, 24, 24) and sd14.latent_shape(100) == (4, 25, 25)
    for pipe, bad, patch in ((sd3, 44, 8), (flux, 44, 8), (sd14, 42, 4), (sd3, 3, 8)):
        with pytest.raises(ValueError, match=f"resolution={bad} is not a multiple of {patch}"):
            pipe.latent_shape(bad)
    with pytest.raises(ValueError, match="resolution=104 is more than 96"):
        sd3.latent_shape(104)
    assert flux.latent_shape(4096) == (4, 1024, 1024)                  # rotary positions have no table


KINDS = {"times": ("--schedule", ("linear", "sd3", "dpm")), "solver": ("--solver", ("euler", "dpm")),
         "sde": ("--sde", ("flow", "dance", "cps"))}


@pytest.mark.parametrize("what", KINDS)
def test_a_kind_that_does_not_suit_is_refused_with_one_that_does(what, saved):
    flag, flow = KINDS[what]

    def ask(pipe, kind):
        return pipe.times(10, kind) if what == "times" else getattr(pipe, what)(kind)
    for family in pipelines.FAMILIES:
        pipe = models.load(str(saved[family][0]))
        good, bad = (("ddim",), flow) if family == "sd14" else (flow, ("ddim",))
        assert ask(pipe, "") == ask(pipe, good[0])
        for kind in good:
            assert len(ask(pipe, kind)) == 11 if what == "times" else ask(pipe, kind) == kind
        for kind in bad:
            with pytest.raises(ValueError, match=f"{flag} {kind} does not suit {family}.*try {flag} {good[0]}"):
                ask(pipe, kind)


# ============================================================================================================== loading

@pytest.mark.parametrize("name, numbers, vae, shapes", (
    ("sd35m", 2_243_171_520, 83_819_683, [(205, 4096), (2048,)]),
    ("flux", 11_901_408_320, 83_819_683, [(512, 4096), (768,), ()]),
    ("sd14", 859_520_964, 83_653_863, [(77, 768)])))
def test_random_weights_at_full_size(name, numbers, vae, shapes):
    """The public numbers of parameters; features of the public shapes, a function of the prompt. No memory is used."""
    pipe = models.load(name, init="random", dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in pipe.net.parameters()) == numbers
    assert sum(p.numel() for p in pipe.vae.parameters()) == vae
    assert {p.dtype for p in pipe.net.state_dict().values()} == {torch.bfloat16}         # positions, too
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    assert [p.device.type for net in (pipe.net, pipe.vae) for p in net.state_dict().values() if not p.is_meta] == []
    assert not models.trainable(pipe.net) and not pipe.net.training
    ctx = pipe.encode_text(["a", "b"])
    assert [tuple(part.shape) for part in ctx] == [(2, *shape) for shape in shapes]
    assert pipe.latent_shape(512) == ((4 if name == "sd14" else 16), 64, 64)
    assert pipe.latent_shape()[1] == (64 if name == "sd14" else 128)


@EACH
def test_random_weights_from_configs_alone(family, copy):
    """No weights, no tokenizers: the network answers, and a prompt's features are its own, in any company."""
    directory = copy(family)
    for file in directory.rglob("*"):
        if file.is_file() and file.name not in ("config.json", "model_index.json", "scheduler_config.json"):
            file.unlink()
    pipe, other = (models.load(str(directory), init="random", text_length=9) for _ in range(2))
    pipe.prepare(["a", "b"])
    ctx, again = pipe.encode_text(["a", "b", "a"]), other.encode_text(["b", "a"])
    assert all(torch.equal(x[0], x[2]) and torch.equal(x[:2], y.flip(0)) for x, y in zip(ctx, again))
    assert not torch.equal(ctx[0][0], ctx[0][1])
    length = {"sd3": 77 + 9, "flux": 9, "sd14": 77}[family]
    assert ctx[0].shape == (3, length, 24 if family == "sd14" else 48) and ctx[0].std() == pytest.approx(1, abs=0.1)
    assert len(ctx) == {"sd3": 2, "flux": 3, "sd14": 1}[family]
    out = grpo.guided(pipe.net, randn(3, *pipe.latent_shape(32)), 1, ctx, pipe.encode_text([""]), 2.0)
    assert out.isfinite().all() and pipe.decode(out).shape == (3, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match="no .*safetensors weights|is missing"):
        models.load(str(directory))


def original(net, prefix=""):
    """Our weights under the names of the authors' file, by the table read the other way."""
    ours, last, state = net.state_dict(), len(getattr(net, "transformer_blocks", ())) - 1, {}
    swapped = {"norm_out.linear"}
    if isinstance(net, models.MMDiT):
        swapped.add(f"transformer_blocks.{last}.norm1_context.linear")
    for key, parts in models.original_names(net).items():
        tensor = torch.cat([ours[name] for name in parts])
        if parts[0].rpartition(".")[0] in swapped:                     # (scale, shift) -> (shift, scale)
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if ".attn_1." in key and tensor.ndim == 2:                     # the VAE's attention, 1 x 1 convolutions there
            tensor = tensor[:, :, None, None]
        state[prefix + key] = tensor.contiguous()
    return state


def strip(directory, *parts):
    """Leave only config.json in these parts of a pipeline."""
    for part in parts:
        for file in (directory / part).glob("*.safetensors*"):
            file.unlink()


def same(ours, theirs):
    """Two pipelines hold the same numbers."""
    pairs = [(ours.net, theirs.net), (ours.vae, theirs.vae), *zip(ours.encoders, theirs.encoders, strict=True)]
    for a, b in pairs:
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return True


ORIGINALS = {"sd3": "sd3.5_medium.safetensors", "flux": "flux1-dev.safetensors"}
BESIDE = {"sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl_fp16"},
          "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}}


@pytest.mark.parametrize("family", ORIGINALS)
@pytest.mark.parametrize("vae", ("ae.safetensors", "first_stage_model."))
@pytest.mark.parametrize("folder", ("text_encoders", "."))
def test_an_original_file_is_the_same_pipeline(family, vae, folder, saved, copy):
    """The authors' file in a directory of configs; the VAE inside it or beside, the text encoders beside."""
    directory, want = copy(family), models.load(str(saved[family][0]))
    inside = vae.endswith(".")
    state = original(want.net, "model.diffusion_model." if inside else "")
    save_file(state | (original(want.vae, vae) if inside else {}), directory / ORIGINALS[family])
    stray = {key: tensor + inside for key, tensor in original(want.vae).items()}         # the file's own is preferred
    save_file(stray, directory / "ae.safetensors")
    (directory / folder).mkdir(exist_ok=True)
    for part, name in BESIDE[family].items():
        (directory / part / "model.safetensors").rename(directory / folder / f"{name}.safetensors")
    strip(directory, "transformer", "vae")
    assert all(not list((directory / part).glob("*.safetensors")) for part in (*BESIDE[family], "transformer", "vae"))
    pipe = models.load(str(directory), weights=directory / ORIGINALS[family])
    assert same(pipe, want) and pipe.shift == want.shift
    assert all(torch.equal(a, b) for a, b in zip(pipe.encode_text(PROMPTS), want.encode_text(PROMPTS), strict=True))
    assert models.family(str(directory), directory / ORIGINALS[family]) == family
    cfg = data.cli(dgpo.Config, dgpo.PRESETS, ["--preset", "official", "--model", str(directory), "--gpu-memory", "80",
                                               "--weights", str(directory / ORIGINALS[family])])
    assert cfg.lora_rank == 64 and cfg.micro_batch == models.memory_plan(family, 80, 64)["micro_batch"]


@pytest.mark.parametrize("family", ORIGINALS)
def test_one_file_may_hold_the_text_encoders_too(family, saved, copy):
    """Under the prefixes of the public files of SD3 that hold all: two encoders of one class, so each has its own."""
    directory, want = copy(family), models.load(str(saved[family][0]))
    state = original(want.net, "model.diffusion_model.") | original(want.vae, "first_stage_model.")
    for net, name in zip(want.encoders, BESIDE[family].values(), strict=True):
        state |= original(net, f"text_encoders.{name.removesuffix('_fp16')}.transformer.")
        save_file({key: tensor + 1 for key, tensor in original(net).items()}, directory / f"{name}.safetensors")
    save_file(state, directory / "all.safetensors")
    strip(directory, "transformer", "vae", *BESIDE[family])
    assert same(models.load(str(directory), weights=directory / "all.safetensors"), want)


def test_an_original_file_lets_the_folders_that_have_weights_be(saved, copy):
    """Only the network is read from it; where the VAE or an encoder is nowhere, the error says where it could be."""
    directory, want = copy("flux"), models.load(str(saved["flux"][0]))
    state = original(want.net)
    state["img_in.bias"] += 1
    save_file(state, directory / "flux1.safetensors")
    pipe = models.load("flux", weights=directory / "flux1.safetensors")
    assert torch.equal(pipe.net.x_embedder.bias, want.net.x_embedder.bias + 1) and pipe.net.x_embedder.bias.any()
    for part, name in (("vae", "ae"), ("text_encoder_2", "text_encoders/t5xxl")):
        strip(directory, part)
        with pytest.raises(FileNotFoundError, match=rf"{part} is neither in .* {name}\.safetensors.*flux1\."):
            models.load("flux", weights=directory / "flux1.safetensors")


def test_an_original_of_schnell_is_named_as_such(saved, copy):
    directory = copy("flux")
    save_file(original(models.load(str(saved["schnell"][0])).net), directory / "flux1-schnell.safetensors")
    with pytest.raises(ValueError, match=r"flux1-schnell\.safetensors: tensor guidance_in.* 4 in all: it is FLUX\.1-"
                                         r"schnell's: guidance_embeds is false in transformer/config\.json"):
        models.load("flux", weights=directory / "flux1-schnell.safetensors")
    edit(directory / "transformer" / "config.json", guidance_embeds=False)
    assert not models.load("flux", weights=directory / "flux1-schnell.safetensors").net.config["guidance_embeds"]


@pytest.mark.parametrize("init", (None, "random"))
@pytest.mark.parametrize("family, part, change", (
    ("sd14", "unet", dict(norm_num_groups=0)), ("sd14", "unet", dict(attention_head_dim=3)),
    ("sd3", "vae", dict(block_out_channels=[])), ("flux", "vae", dict(scaling_factor=None))), ids=str)
def test_a_config_of_no_network_is_named(family, part, change, init, copy):
    directory = copy(family)
    edit(directory / part / "config.json", **change)
    with pytest.raises(ValueError, match=rf"{directory}/{part}/config\.json: no network can be made of it"):
        models.load(str(directory), init=init)


def test_the_clip_of_flux_is_never_projected(saved, copy):
    """model_index.json calls it a CLIPTextModel, and so diffusers reads it, whatever its own config says."""
    directory, want = copy("flux"), saved["flux"][1]
    theirs = pipelines.clip(directory / "tokenizer", 1, 24, 24)[0]
    theirs.save_pretrained(directory / "text_encoder")
    ours = models.load(str(directory))
    with torch.no_grad():
        pooled = theirs.text_model(ours.tokenizers[0](list(PROMPTS))).pooler_output
        projected = theirs(ours.tokenizers[0](list(PROMPTS))).text_embeds
    near(ours.encode(list(PROMPTS))[1], pooled)
    assert (pooled - projected).abs().max() > 0.1 and type(want.text_encoder) is transformers.CLIPTextModel
    assert models.CLIPText(**ours.encoders[0].config).state_dict().keys() == ours.encoders[0].state_dict().keys()


def test_a_single_file_of_sd1_is_refused_before_anything_is_read(copy):
    directory = copy("sd14")
    (file := directory / "v1-4.safetensors").write_bytes(b"not read")
    for model in (directory, "sd14"):
        with pytest.raises(ValueError, match="can be read of SD3 and FLUX, not of a StableDiffusionPipeline"):
            models.load(str(model), weights=file)


@pytest.mark.parametrize("name", models.SOURCES)
def test_missing_weights_come_with_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "HERE", tmp_path)
    repository = models.SOURCES[name]
    with pytest.raises(FileNotFoundError, match=f'hf download {repository}( --exclude "[^"]+")+ --local-dir {tmp_path}'
                       ) as caught:
        models.load(name)
    for words in ("hf auth login", f"https://huggingface.co/{repository}"):
        assert (words in str(caught.value)) == (name != "sd14")       # which is not gated
    with pytest.raises(FileNotFoundError, match=f"hf download {repository}.*elsewhere"):
        models.load(name, weights="elsewhere")
    with pytest.raises(FileNotFoundError, match=r"--weights .*typo\.safetensors does not exist") as caught:
        models.load(name, weights=tmp_path / "typo.safetensors")
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize("name, twice", (
    ("sd35m", ("sd3.5_medium.safetensors", "text_encoders/clip_l.safetensors", "text_encoders/t5xxl_fp16.safetensors",
               "text_encoder_3/model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16.safetensors")),
    ("flux", ("flux1-dev.safetensors", "ae.safetensors")),
    ("sd14", ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors"))))
def test_what_the_download_leaves_out_is_there_twice(name, twice):
    """By the hub's own reading of --exclude."""
    wanted = ["model_index.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
              "text_encoder_3/model-00001-of-00002.safetensors", "tokenizer/vocab.json",
              "scheduler/scheduler_config.json", "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"]
    assert [*filter_repo_objects([*wanted, *twice], ignore_patterns=list(models.DUPLICATES[name]))] == wanted


@EACH
def test_a_missing_or_wrong_part_is_an_error_that_names_it(family, saved, copy):
    net, directory = NET[family], copy(family)

    def refused(error, match):
        with pytest.raises(error, match=match):
            models.load(str(directory))
    for part in json.loads((directory / "model_index.json").read_text()):
        if (directory / part).is_dir():
            (directory / part).rename(directory / "away")
            refused(FileNotFoundError, f"{part}/")
            (directory / "away").rename(directory / part)
    shutil.rmtree(directory / net)
    getattr(saved[family][1], net).save_pretrained(directory / net, max_shard_size="40KB")
    shards = sorted((directory / net).glob("*-of-*.safetensors"))
    assert len(shards) > 1 and same(models.load(str(directory)), models.load(str(saved[family][0])))
    shards[1].rename(directory / "away")
    refused(FileNotFoundError, shards[1].name)
    (directory / "away").rename(shards[1])
    shards[1].write_bytes(shards[1].read_bytes()[:-7])
    refused(ValueError, f"{shards[1].name} is damaged")
    shutil.rmtree(directory / net)
    shutil.copytree(saved["sd14" if family == "sd3" else "sd3"][0] / "vae", directory / net)
    refused(ValueError, f"{net}/config.json describes a AutoencoderKL")


@pytest.mark.parametrize("family, part, other, words", (
    ("sd3", "text_encoder", "sd14", "give 48 .* and 36 pooled, the network takes 48 and 24"),
    ("flux", "text_encoder", "sd3", "give 16 .* and 16 pooled, the network takes 48 and 24"),
    ("sd14", "text_encoder", "sd3", "give 16 .* the network takes 24")))
def test_encoders_of_another_model_are_refused(family, part, other, words, saved, copy):
    directory = copy(family)
    shutil.rmtree(directory / part)
    shutil.copytree(saved[other][0] / part, directory / part)
    with pytest.raises(ValueError, match=f"{directory}: the text encoders {words}"):
        models.load(str(directory))


# ================================================================================================================= LoRA

RANK, ALPHA = 4, 6.0
LORA = pytest.mark.parametrize("family", ("flux", "sd14"))             # SD3: test_models.py


def lora_net(saved, family, seed=1):
    """Our network with a LoRA whose two factors are random."""
    net = models.load(str(saved[family][0])).net
    torch.manual_seed(seed)
    for p in models.add_lora(net, RANK, ALPHA, net.lora_targets):
        torch.nn.init.normal_(p.data, std=0.3)
    return net


def their_net(saved, family):
    cls = type(getattr(saved[family][1], NET[family]))
    return cls.from_pretrained(saved[family][0] / NET[family]).eval()


def pair(ours, theirs, family):
    """The answers of two networks to the same question, ours and theirs."""
    dtype = next(ours.parameters()).dtype
    x, pooled, t = randn(2, 4, 8, 8).to(dtype), randn(2, 24, seed=2).to(dtype), torch.tensor([0.3, 1.0], dtype=dtype)
    with torch.no_grad():
        if family == "sd14":
            text, n = randn(2, 7, 24, seed=1).to(dtype), torch.tensor([7, 900])
            return ours(x, n, text), theirs(x, n, text).sample
        text, guidance = randn(2, 7, 48, seed=1).to(dtype), torch.full((2,), 3.5, dtype=dtype)
        flux = diffusers.FluxPipeline
        out = theirs(flux._pack_latents(x, *x.shape), text, pooled, t, flux._prepare_latent_image_ids(
            2, 4, 4, "cpu", torch.float32), torch.zeros(7, 3), guidance).sample
        return ours(x, t, text, pooled, guidance), flux._unpack_latents(out, 32, 32, 4)


def their_pipeline(saved, family, net):
    parts = {name: None for name in saved[family][1].components}
    cls = type(saved[family][1])
    return cls(**parts | {NET[family]: net, "scheduler": saved[family][1].scheduler},
               **({"requires_safety_checker": False} if family == "sd14" else {}))


def adapter(net, targets, alpha=10.0):
    """A peft adapter on these layers, its two factors random."""
    net.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(targets)))
    torch.manual_seed(2)
    for p in models.trainable(net):
        torch.nn.init.normal_(p.data, std=0.3)
    return net


@LORA
def test_diffusers_reads_our_lora(family, saved, tmp_path):
    """By the pipeline and by the network; every layer that we change is among those that it changes."""
    ours, theirs = lora_net(saved, family), their_net(saved, family)
    plain = pair(ours, theirs, family)[1]
    models.save_lora(ours, tmp_path / "lora.safetensors")
    their_pipeline(saved, family, theirs).load_lora_weights(tmp_path, weight_name="lora.safetensors")
    got, want = pair(ours, theirs, family)
    near(got, want)
    assert (want - plain).abs().max() > 0.05 * plain.std()             # the LoRA is more than a rounding error
    assert set(models.lora_layers(ours)) == {
        name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def by_pipeline(saved, family, net, folder):
    name, config = NET[family], net.peft_config["default"].to_dict()
    type(saved[family][1]).save_lora_weights(folder, **{
        f"{name}_lora_layers": peft.get_peft_model_state_dict(net),
        f"{name}_lora_adapter_metadata": {k: list(v) if isinstance(v, set) else v for k, v in config.items()}})
    return folder / "pytorch_lora_weights.safetensors"


def by_network(saved, family, net, folder):
    net.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


def by_training_script(saved, family, net, folder):
    """As diffusers' examples do for SD1: names of its older kind, and no alpha, so scale 1."""
    layers = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(net))
    type(saved[family][1]).save_lora_weights(folder, **{f"{NET[family]}_lora_layers": layers})
    return folder / "pytorch_lora_weights.safetensors"


@LORA
@pytest.mark.parametrize("save, alpha", ((by_pipeline, 10.0), (by_network, 10.0), (by_training_script, float(RANK))))
def test_load_lora_reads_what_diffusers_wrote(family, save, alpha, saved, tmp_path):
    ours = lora_net(saved, family)
    theirs = adapter(their_net(saved, family), ours.lora_targets, alpha)
    file = save(saved, family, theirs, tmp_path)
    models.load_lora(ours, file)
    near(*pair(ours.double(), theirs.double(), family))                # the LoRA is strong: rounding grows
    assert {layer.lora_scale for layer in models.lora_layers(ours).values()} == {ALPHA / RANK}
    bare = models.load(str(saved[family][0])).net
    models.load_lora(bare, file)                                       # whose layers may be in down_blocks
    near(*pair(bare.double(), theirs, family))


def test_the_final_layer_of_flux_is_no_single_blocks(saved, tmp_path):
    """Its name, proj_out, ends theirs: of a file the names are whole."""
    theirs = their_net(saved, "flux")
    theirs.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=10.0, target_modules=r"proj_out|.*\.to_q"))
    torch.manual_seed(2)
    for p in models.trainable(theirs):
        torch.nn.init.normal_(p.data, std=0.3)
    bare = models.load(str(saved["flux"][0])).net
    models.load_lora(bare, by_network(saved, "flux", theirs, tmp_path))
    near(*pair(bare.double(), theirs.double(), "flux"))
    layers = models.lora_layers(bare)
    assert "proj_out" in layers and "single_transformer_blocks.0.proj_out" not in layers and len(layers) == 3


def test_what_diffusers_converts_of_kohyas_format_is_read(saved, tmp_path):
    """By the two calls that the error names."""
    ours, theirs, state = lora_net(saved, "sd14"), their_net(saved, "sd14"), {}
    for name, layer in models.lora_layers(ours).items():
        stem = "lora_unet_" + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": layer.lora_A.detach(), f"{stem}.lora_up.weight": layer.lora_B.detach(),
                  f"{stem}.alpha": torch.tensor(ALPHA)}
    save_file(state, tmp_path / "kohya.safetensors")
    bare = models.load(str(saved["sd14"][0])).net
    with pytest.raises(ValueError, match=r"kohya\.safetensors: lora_unet_.* is in kohya's format"):
        models.load_lora(bare, tmp_path / "kohya.safetensors")
    their_pipeline(saved, "sd14", theirs).load_lora_weights(tmp_path, weight_name="kohya.safetensors",
                                                            adapter_name="default")
    theirs.save_lora_adapter(tmp_path / "converted")
    models.load_lora(bare, tmp_path / "converted")
    near(*(net(randn(2, 4, 8, 8), torch.tensor([7, 900]), randn(2, 7, 24, seed=1)).detach() for net in (bare, ours)))


@LORA
def test_load_lora_reads_what_peft_wrote(family, saved, tmp_path):
    ours, theirs = lora_net(saved, family), their_net(saved, family)
    config = peft.LoraConfig(r=RANK, lora_alpha=10.0, target_modules=list(ours.lora_targets))
    theirs = peft.get_peft_model(theirs, config)
    torch.manual_seed(2)
    for p in models.trainable(theirs):
        torch.nn.init.normal_(p.data, std=0.3)
    theirs.save_pretrained(tmp_path)
    models.load_lora(ours, tmp_path / "adapter_model.safetensors")
    near(*pair(ours, theirs.eval().base_model.model, family))


@EACH
def test_merged_is_the_lora_and_gives_the_weights_back(family, saved):
    net = lora_net(saved, family)
    ctx = {"sd3": (randn(2, 7, 48), randn(2, 24)), "sd14": (randn(2, 7, 24),),
           "flux": (randn(2, 7, 48), randn(2, 24), torch.full((2,), 3.5))}[family]
    inputs = randn(2, 4, 8, 8, seed=3), torch.tensor([1, 0.2]) if family != "sd14" else torch.tensor([1, 900]), *ctx
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layers, pointers = models.lora_layers(net), [p.data_ptr() for p in net.parameters()]

    def untouched():
        return (all(torch.equal(tensor, own[name]) for name, tensor in net.state_dict().items())
                and [p.data_ptr() for p in net.parameters()] == pointers and models.lora_layers(net) == layers
                and not any(layer.lora_merged for layer in layers.values()))
    with torch.no_grad():
        want = net(*inputs)
        with models.merged(net):
            assert all(layer.lora_merged for layer in layers.values()) and not untouched()
            near(net(*inputs), want)
            with models.merged(net):                                   # once is enough
                near(net(*inputs), want)
            assert all(layer.lora_merged for layer in layers.values())
        assert untouched() and torch.equal(net(*inputs), want)
        with models.merged(net, on=False):
            assert untouched() and torch.equal(net(*inputs), want)
        with pytest.raises(KeyError), models.merged(net):
            raise KeyError("no such judge")
        assert untouched() and torch.equal(net(*inputs), want)


# =================================================================================================== memory and presets

BOTH = pytest.mark.parametrize("module", (dgpo, grpo), ids=("dgpo", "grpo"))


def cli(module, *line):
    return data.cli(module.Config, module.PRESETS, [str(word) for word in line])


def test_memory_plan():
    """More memory, no fewer images; what is refused says what would fit."""
    for family, plans in models.MEMORY.items():
        seen = [models.memory_plan(family, gigabytes, 32) for gigabytes in sorted(plans)]
        for plan, gigabytes in zip(seen, sorted(plans)):
            assert plan.keys() == {"micro_batch", "checkpointing", "offload"} and plan["micro_batch"] >= 1
            assert plan["offload"] == (gigabytes == 24)
            full = models.memory_plan(family, gigabytes, 0, shards=64)
            assert full["checkpointing"] and 1 <= full["micro_batch"] == plans[gigabytes][0] // 4
            half = models.memory_plan(family, gigabytes, 32, guided=True)
            assert half == {**plan, "micro_batch": plan["micro_batch"] // 2}
        for a, b in zip(seen, seen[1:]):                               # fewer images only where checkpointing ends
            assert b["micro_batch"] >= a["micro_batch"] or a["checkpointing"] and not b["checkpointing"]
    for number in (-80, 16, 40, 100):
        with pytest.raises(ValueError, match=f"--gpu-memory {number}: 24, 48, 80 or 141"):
            models.memory_plan("sd3", number, 32)
    with pytest.raises(ValueError, match="--gpu-memory 48: .* 54 GB: --lora-rank 64, or torchrun and --fsdp"):
        models.memory_plan("sd3", 48, 0)
    with pytest.raises(ValueError, match="--gpu-memory 48: .* 36 GB: --lora-rank 64, or more processes"):
        models.memory_plan("flux", 48, 0, shards=8)                    # 24 bytes a parameter on 8 GPUs, and the rest
    assert models.memory_plan("flux", 80, 0, shards=8)
    with pytest.raises(ValueError, match="--gpu-memory 24: .* wants --gpu-memory 48"):
        models.memory_plan("flux", 24, 32)
    with pytest.raises(ValueError, match="--gpu-memory 80: .* known are sd35m, flux, sd14"):
        models.memory_plan(None, 80, 32)


def test_memory_plan_of_a_larger_network():
    """SD3.5 Large is 3.6 times Medium: fewer images by more than that, since its weights take their room too."""
    medium, large = 2_243_171_520, 8_056_627_520
    for gigabytes in models.MEMORY["sd3"]:
        plan = models.memory_plan("sd3", gigabytes, 32)
        assert plan == models.memory_plan("sd3", gigabytes, 32, parameters=medium)
        assert plan == models.memory_plan("sd3", gigabytes, 32, parameters=10 ** 6)
        fewer = models.memory_plan("sd3", gigabytes, 32, parameters=large)["micro_batch"]
        assert 1 <= fewer <= plan["micro_batch"] * medium / large
    assert models.memory_plan("sd3", 80, 0, shards=64, parameters=large)["micro_batch"] == 3
    with pytest.raises(ValueError, match="--gpu-memory 141: .* 194 GB: --lora-rank 64, or torchrun and --fsdp"):
        models.memory_plan("sd3", 141, 0, parameters=large)
    with pytest.raises(ValueError, match="--gpu-memory 48: .* 24.0 B parameters .* it wants --gpu-memory 80"):
        models.memory_plan("flux", 48, 32, parameters=24 * 10 ** 9)
    with pytest.raises(ValueError, match="--gpu-memory 141: .* 100.0 B parameters .* try --micro-batch 1"):
        models.memory_plan("flux", 141, 32, parameters=10 ** 11)


@EACH
def test_parameter_count_is_the_networks(family, saved, copy):
    """By config.json alone, of whichever directory would be loaded; nothing where there is none."""
    directory, theirs = saved[family]
    count = sum(p.numel() for p in getattr(theirs, NET[family]).parameters())
    for model, weights in ((directory, ""), (NAMES[family], directory), ("", directory / "model_index.json")):
        assert models.parameter_count(str(model), str(weights)) == count > 1000
    directory = copy(family)
    strip(directory, NET[family])
    assert models.parameter_count(str(directory)) == count
    (directory / NET[family] / "config.json").unlink()
    assert models.parameter_count(str(directory)) is models.parameter_count("nowhere") is None


@BOTH
def test_gpu_memory_stands_between_the_preset_and_the_flags(module, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name, gigabytes in (("sd35m", 24), ("sd35m", 48), ("sd35m", 80), ("sd14", 24), ("sd14", 141), ("flux", 141)):
        cfg = cli(module, "--model", name, "--gpu-memory", gigabytes)
        both = cfg.cfg_train != 1 and not getattr(cfg, "cfg_detach", False)
        plan = models.memory_plan(models.family(name), gigabytes, cfg.lora_rank, both, 4 * cfg.fsdp)
        images = plan.pop("micro_batch")
        assert {key: getattr(cfg, key) for key in plan} == plan and cfg.gpu_memory == gigabytes
        if module is dgpo:
            assert cfg.micro_batch == images
        else:                                                          # an update's batches are the rollout's again
            mine, size, n = cfg.groups // 4, cfg.group_size, cfg.micro_batch
            whole = max(1, n // size) * size                           # images of a rollout
            batches = [min(n, whole - k) for k in range(0, whole, n)] if mine * size >= whole else []
            updates = [[j for j in range(mine) if (rank * mine + j) % cfg.updates == update]
                       for rank in range(4) for update in range(cfg.updates)]
            batches += [min(n, len(turn) * size - k) for turn in updates for k in range(0, len(turn) * size, n)]
            assert images / 2 < n <= images and set(batches) == {n}, (name, gigabytes, n, set(batches))
    cfg = cli(module, "--model", "sd35m", "--gpu-memory", 24, "--micro-batch", 3, "--no-checkpointing", "--no-offload")
    assert (cfg.micro_batch, cfg.checkpointing, cfg.offload) == (3, False, False)
    if module is not dgpo:                                             # guidance's two passes, or one of them
        line = ("--model", "sd35m", "--gpu-memory", 80, "--lora-rank", 8, "--cfg-train", 4.5)
        both, one = (cli(module, *line, flag).micro_batch for flag in ("--no-cfg-detach", "--cfg-detach"))
        assert 2 * both == one == 24
    lora = cli(module, "--model", "sd14", "--gpu-memory", 48, "--lora-rank", 8).micro_batch
    assert lora == 4 * cli(module, "--model", "sd14", "--gpu-memory", 48, "--lora-rank", 0).micro_batch
    for line, words in ((("--model", "sd35m", "--gpu-memory", 40), "24, 48, 80 or 141"),
                        (("--model", "flux", "--gpu-memory", 24), "wants --gpu-memory 48"),
                        (("--weights", "nowhere", "--gpu-memory", 80), "no plan for this model"),
                        (("--model", "nowhere", "--gpu-memory", 80), "no plan for this model")):
        with pytest.raises(ValueError, match=words):
            cli(module, *line)


@BOTH
@EACH
@pytest.mark.parametrize("preset", ("paper", "official"))
def test_every_preset_of_every_family_is_a_valid_run(module, family, preset, saved, monkeypatch):
    """By the public name and by a directory, whose model_index.json says what it is; guided as its family asks."""
    fsdp = module.PRESETS[preset][family].get("fsdp", False)
    if fsdp:
        with pytest.raises(ValueError, match="--fsdp.* torchrun"):
            cli(module, "--preset", preset, "--model", saved[family][0])
        monkeypatch.setenv("WORLD_SIZE", "8")
    by_name = cli(module, "--preset", preset, "--model", NAMES[family])
    by_directory = cli(module, "--preset", preset, "--model", saved[family][0])
    by_weights = cli(module, "--preset", preset, "--model", NAMES[family], "--weights", saved[family][0])
    assert by_name == dataclasses.replace(by_directory, model=NAMES[family])
    assert by_name == dataclasses.replace(by_weights, weights="") and by_name.preset == preset
    for key, value in module.PRESETS[preset][family].items():
        assert getattr(by_name, key) == value, key
    pipe = models.load(str(saved[family][0]))                          # what the numbers ask, the network can do
    for steps in (by_name.sample_steps, by_name.eval_steps):
        assert len(pipe.times(steps, by_name.schedule, by_name.shift, 32)) == steps + 1
    assert pipe.solver(by_name.solver) and pipe.sde(by_name.sde if module is grpo else "")
    assert (by_name.cfg_rollout > 1) == (family != "flux")             # FLUX is distilled: guidance is an input


@BOTH
def test_which_preset_is_meant_without_one(module, saved):
    assert cli(module).preset == cli(module, "--model", "tiny").preset == "tiny"
    cfg = cli(module, "--model", "sd35m")
    assert (cfg.preset, cfg.prompts, cfg.resolution) == ("official", "geneval", 512) and cfg.lora_rank in (32, 64)
    for family in pipelines.FAMILIES:
        cfg = cli(module, "--model", saved[family][0])
        assert (cfg.preset, cfg.prompts, cfg.lora_rank) == ("tiny", "shapes", 0)
    assert cli(module, "--preset", "official").model == "sd35m"


@BOTH
def test_a_preset_for_a_model_of_no_family_is_refused(module, copy):
    directory = copy("sd14")
    edit(directory / "model_index.json", _class_name="SanaPipeline")
    for model in (directory, "nowhere"):
        with pytest.raises(ValueError, match=f"--preset official has no numbers for --model {model}"):
            cli(module, "--preset", "official", "--model", model)


@EACH
def test_a_benchmark_samples_as_evaluation_does(saved, family, tmp_path, reward_file):
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    rewards.main(["bench", "--model", str(saved[family][0]), "--benchmark", str(tmp_path / "prompts.txt"), "--reward",
                  f"{reward_file}:red", "--out", str(tmp_path / "out"), "--cfg-eval", "3", "--eval-steps", "2"])
    stamp = json.loads((tmp_path / "out" / "protocol.json").read_text())
    pipe, cfg = models.load(str(saved[family][0])), dgpo.Config(eval_steps=2)
    images = dgpo.sample(pipe, ["a red circle", "two blue squares"], [("eval", 0), ("eval", 1)], cfg, 3.0)
    for i, image in enumerate(images):
        picture = numpy.array(Image.open(tmp_path / "out" / "images" / f"0000{i}" / "samples" / "0000.png"))
        assert numpy.array_equal(picture, (image.permute(1, 2, 0) * 255).round().byte().numpy())
    assert stamp["weights_sha256"] == rewards.digest(pipe.net, *pipe.encoders, pipe.vae)
    assert stamp["solver"] == {"sd14": "ddim"}.get(family, "euler") and stamp["resolution"] == images.shape[-1]
