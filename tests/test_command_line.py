"""The command line of dgpo.py and grpo.py: presets, help, and bad input, which ends with code 2 and one clear line."""
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import data
import dgpo
import grpo
import models
import proxt2i
import slas

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("alone")
BAR = ("dgpo: ", "grpo: ")                                             # how a line of the progress bar starts
BOTH = pytest.mark.parametrize("module", (dgpo, grpo), ids=("dgpo", "grpo"))
FOUR = pytest.mark.parametrize("module", (dgpo, grpo, slas, proxt2i), ids=lambda module: module.__name__)


@pytest.fixture
def small(random_model, reward_file):
    """The flags of a run that ends in a moment."""
    return ["--weights", str(random_model), "--reward", f"{reward_file}:red", "--eval-reward", f"{reward_file}:red",
            "--groups", "2", "--group-size", "4", "--sample-steps", "3", "--eval-steps", "1", "--eval-images", "2",
            "--val-images", "2", "--steps", "1", "--cfg-also", "0", "--minutes", "60", "--out", "out"]


@pytest.fixture
def refused(capsys):
    """refused(module, line, *words): exit code 2, one line on stderr with those words, no traceback. Returns the
    line."""
    def check(module, line, *words):
        capsys.readouterr()                                            # what went before
        with pytest.raises(SystemExit) as end:
            module.main([str(word) for word in line])
        err = capsys.readouterr().err
        for bar in list(getattr(tqdm, "_instances", ())):              # in a process of its own it would end with it
            bar.close()
        capsys.readouterr()
        start = "error (process " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "error: "
        lines = [part for part in err.replace("\r", "\n").split("\n") if part.strip() and not part.startswith(BAR)]
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith(start), err
        missing = [word for word in words if word not in lines[0]]
        assert not missing, (missing, lines[0])
        return lines[0]
    return check


@BOTH
def test_torchrun_starts_again_where_a_run_was(module, small, refused, monkeypatch):
    """--max-restarts types the same words again; where nothing had begun they begin."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refused(module, small[:-2], "only with --out")
    module.main(small)
    module.main([*small, "--steps", "2"])
    assert [json.loads(row)["step"] for row in open("out/metrics.jsonl")] == [1, 2]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    refused(module, small, "already holds a run")


def test_what_goes_on_by_itself_needs_no_out(monkeypatch):
    """rewards.py bench under --max-restarts."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert data.cli(dgpo.Config, dgpo.PRESETS, [], restarts=False) == dgpo.Config(preset="tiny")


def snapshot(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# ============================================================================================================= flags

@FOUR
def test_every_field_is_a_flag_with_a_comment(module, capsys):
    source = Path(module.__file__).read_text().split("class Config:")[1].split("def __post_init__")[0]
    commented = {line.split(":")[0].strip() for line in source.splitlines() if ":" in line and "  # " in line}
    fields = {field.name for field in dataclasses.fields(module.Config)}
    assert commented == fields
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')}" in said
    assert "--no-fused" in said and module.__doc__.split(".")[0] in said


@FOUR
def test_the_common_flags_are_there(module):
    names = {field.name for field in dataclasses.fields(module.Config)}
    assert names >= set("model weights method preset reward eval_reward prompts steps sample_steps eval_steps groups "
                        "group_size resolution lora_rank cfg_rollout cfg_train cfg_ref cfg_eval seed out resume "
                        "minutes fused".split())


@pytest.mark.parametrize("module", (grpo, proxt2i, slas), ids=("grpo", "proxt2i", "slas"))
def test_what_is_not_typed_fits_what_is(module):
    """Fewer groups or steps need no other flags: updates and trained steps come down; those that are typed do not."""
    presets = module.presets("rl") if module is proxt2i else module.PRESETS
    for line, updates, trained in ((["--groups", "1", "--sample-steps", "2"], 1, 2), (["--groups", "6"], 2, 3),
                                   (["--groups", "8"], module.Config.updates, 3)):
        cfg = data.cli(module.Config, presets, line)
        assert (cfg.updates, cfg.train_steps) == (updates, trained), line
    with pytest.raises(ValueError, match="--groups 3 cannot be split into --updates 2"):
        data.cli(module.Config, presets, ["--groups", "3", "--updates", "2"])
    if module is not proxt2i:
        with pytest.raises(ValueError, match="--train-steps 3: between 0 .* --sample-steps 2"):
            data.cli(module.Config, presets, ["--train-steps", "3", "--sample-steps", "2"])


def test_what_is_evaluated():
    """The tiny world's verifier for its own prompts, the trained reward for others, unless it is typed."""
    for line, name in (([], "shapes-strict"), (["--reward", "tiny-clip"], "shapes-strict"),
                       (["--prompts", "my.txt", "--reward", "pickscore"], "pickscore"),
                       (["--prompts", "my.txt", "--reward", "pickscore", "--eval-reward", "hpsv2"], "hpsv2")):
        for module in (dgpo, grpo, slas):
            assert data.cli(module.Config, module.PRESETS, line).eval_reward == name


@BOTH
def test_flags_beat_the_preset_and_the_preset_beats_defaults(module):
    cfg = data.cli(module.Config, module.PRESETS, ["--preset", "official", "--lr", "0.5", "--no-fused", "--resume"])
    assert (cfg.lr, cfg.fused, cfg.resume, cfg.preset) == (.5, False, True, "official")
    assert cfg.model == "sd35m" and cfg.weight_decay == module.Config.weight_decay


@BOTH
def test_fused_builds_the_ops_and_says_why_it_cannot(module, small, refused, monkeypatch):
    asked = []
    monkeypatch.setattr(module.ops, "build", lambda: asked.append(1))
    for line, times in (([], 0), (["--no-fused"], 0), (["--fused"], 1)):
        assert data.cli(module.Config, module.PRESETS, line).fused == (line != ["--no-fused"])
        assert len(asked) == times

    def fails():
        raise RuntimeError("No C++ compiler found")
    monkeypatch.setattr(module.ops, "build", fails)
    refused(module, [*small, "--fused"], "--fused", "No C++ compiler found")


def test_help_runs_as_a_command():
    for script in ("dgpo.py", "grpo.py"):
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL)
        assert done.returncode == 0 and "--group-size" in done.stdout and not done.stderr


# =========================================================================================================== presets

COMMON = dict(model="sd35m", resolution=512, dtype="bfloat16", shift=3.0, sample_steps=10, cfg_rollout=4.5,
              cfg_eval=4.5,
              lr=3e-4, weight_decay=1e-4, max_grad_norm=1.0, adv_clip=5.0)
DGPO = dict(COMMON, solver="dpm", schedule="dpm", lora_rank=64, lora_alpha=128.0, beta=100.0, updates=1, timesteps=4,
            cfg_train=1.0, cfg_ref=1.0, eval_steps=14, ref="start", dsm="v", adv_std="group")
GRPO = dict(COMMON, schedule="sd3", sde="flow", lora_rank=32, lora_alpha=64.0, groups=48, group_size=24, noise_level=.7,
            clip_range=1e-4, train_steps=0, cfg_train=4.5, eval_steps=40, kl_beta=.04, ema=.81, drop_constant=True)


@pytest.mark.parametrize("module, preset, numbers", (
    (dgpo, "paper", dict(DGPO, group_size=24, timesteps=1, grid=False, clip_range=0.0, kl_beta=0.0)),
    (dgpo, "official", dict(DGPO, group_size=16, grid=True, clip_range=1e-2, kl_beta=.02)),
    (grpo, "paper", dict(GRPO, adv_std="group", kl_form="gaussian")),
    (grpo, "official", dict(GRPO, adv_std="batch", kl_form="flow-grpo", cfg_ref=4.5, updates=2, ema_every=8))),
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:9])
def test_presets(module, preset, numbers, refused):
    """The numbers of the papers and of the released code; without the weights: one line that says what is missing."""
    cfg = data.cli(module.Config, module.PRESETS, ["--preset", preset])
    assert {name: getattr(cfg, name) for name in numbers} == numbers
    refused(module, ["--preset", preset, "--out", "out"], "sd35m", "hf download")
    assert not Path("out").exists()


def test_official_presets_times():
    """DGPO's clip keeps the first 5 of its 10 times (t >= .8178); Flow-GRPO's schedule is the library's, 9 steps
    trained."""
    cfg = data.cli(dgpo.Config, dgpo.PRESETS, ["--preset", "official"])
    ts = models.schedule(cfg.sample_steps, cfg.shift, cfg.schedule)
    kept = [t for t in ts if t >= cfg.t_min]
    assert kept == ts[:5] and kept[-1] == pytest.approx(.8178, abs=1e-4)
    cfg = data.cli(grpo.Config, grpo.PRESETS, ["--preset", "official"])
    ts = models.schedule(cfg.sample_steps, cfg.shift, cfg.schedule)
    assert [round(t, 4) for t in ts] == [1, .9601, .9133, .8577, .7904, .7073, .6022, .4649, .278, .0089, 0]


# ========================================================================================================= bad input

WORDS = {"both": ("method", "preset", "schedule", "solver", "dtype", "adv_std"),
         "dgpo": ("dsm", "ref", "rollout", "clip_old"), "grpo": ("sde", "kl_form")}
NUMBERS = {"both": {
    "--steps": (0, -1, "many", 1.5), "--sample-steps": (0,), "--eval-steps": (0,), "--eval-images": (0,),
    "--micro-batch": (0,),
    "--group-size": (1, 0, -4), "--groups": (0, -2), "--updates": (0,), "--save-every": (0,), "--val-images": (0,),
    "--eval-every": (-1,), "--lr": (0, -1e-4, "nan", "inf", "fast"), "--minutes": (0, -1, "nan"),
    "--weight-decay": (-1,),
    "--max-grad-norm": (0, -1), "--adv-clip": (0, -5), "--shift": (-3,), "--ema": (-.1, 1, 1.5),
    "--kl-beta": (-1, "nan"),
    "--noise-level": (-.5,), "--clip-range": (-1,), "--resolution": (-8, 13), "--lora-rank": (-1,),
    "--cfg-rollout": ("nan", "inf"), "--seed": ("x",)},
    "dgpo": {"--beta": (0, -1, "nan"), "--t-min": (-.1, 1, 2), "--timesteps": (0,)},
    "grpo": {"--window": (-1, 4), "--train-steps": (-1, 4), "--ema-every": (0,), "--clip-range": (0,),
             "--noise-level": (0,)}}


@pytest.mark.parametrize("module, name", [(module, name) for module in (dgpo, grpo)
                                          for name in WORDS["both"] + WORDS[module.__name__]],
                         ids=lambda value: getattr(value, "__name__", value))
def test_unknown_words(module, name, small, refused):
    refused(module, [*small, f"--{name.replace('_', '-')}", "nonsense"], f"--{name.replace('_', '-')}", "'nonsense'")
    assert not Path("out").exists()


@pytest.mark.parametrize("module, flag, value", [
    (module, flag, value) for module in (dgpo, grpo)
    for flag, values in {**NUMBERS["both"], **NUMBERS[module.__name__]}.items() for value in values],
    ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_numbers_out_of_range(module, flag, value, small, refused):
    refused(module, [*small, flag, value], str(value), flag[2:].split("-")[0])
    assert not Path("out").exists()


@BOTH
def test_unknown_flags(module, small, refused):
    refused(module, [*small, "--group-sise", "4"], "--group-sise", "did you mean --group-size?", "--help")
    refused(module, [*small, "--zzzzzz=4"], "--zzzzzz=4 (--help")
    refused(module, [*small, "stray"], "stray")
    refused(module, [*small, "--seed"], "--seed")
    refused(module, [*small, "--minute", "1"], "--minute")             # no abbreviations
    refused(module, ["--model", "tiny-prox", *small[2:]], "tiny-prox", "proxt2i.py rl")
    assert not Path("out").exists()


@BOTH
def test_groups_and_processes(module, small, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(module, [*small, "--groups", "3"], "--groups 3", "2 processes", "--groups 4")
    refused(module, [*small, "--eval-images", "1"], "--eval-images 1", "2 or more", "process 0 of 2, ")


def test_processes_do_not_share_a_gpu_for_rewards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    data.check_device("reward_device", "cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    data.check_device("reward_device", "cuda")
    with pytest.raises(ValueError, match="--reward-device cuda:1: .*try cpu"):
        data.check_device("reward_device", "cuda:1")


def test_combinations(small, refused):
    refused(dgpo, [*small, "--grid", "--schedule", "dpm", "--t-min", ".9999"], "--grid", "--t-min 0.9999")
    refused(grpo, [*small, "--updates", "2", "--groups", "3"], "--groups 3", "--updates 2")
    refused(grpo, [*small, "--lora-rank", "2", "--lora-alpha", "0"], "--lora-alpha 0")
    refused(dgpo, [*small, "--ema-ramp", "-1"], "--ema-ramp -1.0")
    refused(dgpo, [*small, "--guidance", "4.5"], "--guidance 4.5 is told to FLUX.1-dev alone", "--cfg-rollout")
    refused(grpo, [*small, "--sde", "cps", "--sample-steps", "1", "--train-steps", "1"], "--sample-steps 1", "cps")
    refused(grpo, [*small, "--sde", "cps", "--noise-level", "1.5"], "--noise-level 1.5", "cps")
    for flag in ("--ref", "--rollout", "--clip-old"):
        refused(dgpo, [*small, "--ema", "0", flag, "ema"], "--ema 0", flag)


@BOTH
def test_missing_and_damaged_checkpoints(module, small, refused, random_model, tmp_path):
    refused(module, [*small, "--weights", "nowhere"], "nowhere", "does not exist")
    refused(module, [*small[2:], "--model", "sd99"], "sd99", "directory")
    copy = tmp_path / "copy"

    def damaged(file, content, *words):
        shutil.copytree(random_model, copy)
        content(copy / file)
        before = snapshot(copy)
        refused(module, [*small, "--weights", copy], str(copy / file), *words)
        assert snapshot(copy) == before and not Path("out").exists()
        shutil.rmtree(copy)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    damaged(weights, lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged")
    damaged(weights, lambda path: path.write_bytes(b""), "damaged")
    damaged("model_index.json", lambda path: path.unlink(), "missing")
    damaged("transformer/config.json", lambda path: path.write_text("{"), "damaged")
    damaged("tokenizer/merges.txt", lambda path: path.unlink(), "missing")


@BOTH
def test_out_that_is_taken(module, small, refused):
    module.main(small)
    before = snapshot("out")
    refused(module, small, "out already holds a run", "--resume", "another --out")
    refused(module, [*small, "--resume", "--lr", "0.25"], "lr=", "0.25")
    refused(module, [*small, "--resume", "--group-size", "5"], "group_size=4", "not 5")
    assert snapshot("out") == before
    Path("other").mkdir()
    Path("other/notes.txt").write_text("not a run")
    refused(module, [*small, "--out", "other"], "other")
    refused(module, [*small, "--out", "other/notes.txt"], "other/notes.txt is a file")
    refused(module, [*small, "--out", "other/notes.txt/deeper"], "other/notes.txt")
    assert os.listdir("other") == ["notes.txt"] and Path("other/notes.txt").read_text() == "not a run"


def test_out_that_cannot_be_made_is_refused_before_the_model_loads(small, refused, monkeypatch):
    """Beneath a file, where a link leads nowhere, or where one may not write (root may, so that is played)."""
    monkeypatch.setattr(models, "load", None)
    Path("file").write_text(""), Path("link").symlink_to("gone")
    refused(dgpo, [*small, "--out", "file/a/b"], "cannot make --out file/a/b: file is no folder")
    refused(dgpo, [*small, "--out", "link/a"], "cannot make --out link/a: link is no folder")
    Path("theirs/empty").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "theirs" not in str(path) and access(path, mode))
    refused(dgpo, [*small, "--out", "theirs/a/b"], "cannot make --out theirs/a/b: theirs is not yours to write to")
    refused(dgpo, [*small, "--out", "theirs/empty"], "theirs/empty is not yours")
    assert sorted(path.name for path in Path().iterdir()) == ["file", "link", "theirs"]


def test_a_path_that_cannot_be_asked_for_is_one_line(small, refused):
    """What pathlib, shutil and frozen modules raise is judged by who asked; outside our code it is a bug."""
    refused(dgpo, [*small, "--prompts", "x" * 300], "xxx")
    with pytest.raises(SystemExit) as end, data.exit_codes():          # iterdir, of what is gone since
        data._folder(Path("gone"), "train")
    assert end.value.code == 2
    with pytest.raises(FileNotFoundError), data.exit_codes():
        exec(compile("Path('gone').stat()", "/elsewhere/mine.py", "exec"))


def test_a_resume_with_less_gpu_memory_keeps_the_estimates(tmp_path, monkeypatch):
    """--gpu-memory's plan leaves SLAS's estimates out on a small GPU, but only where nothing says otherwise."""
    words = ["--model", "sd35m", "--out", "out"]
    first, small = (data.cli(slas.Config, slas.PRESETS, [*words, "--gpu-memory", number], slas.METHODS)
                    for number in ("80", "24"))
    assert first.fisher_every > 0 == small.fisher_every
    Path("out").mkdir()
    Path("out/config.json").write_text(json.dumps(dataclasses.asdict(first)))
    again = data.cli(slas.Config, slas.PRESETS, ["--out", "out", "--resume", "--gpu-memory", "24"], slas.METHODS)
    assert again.fisher_every == first.fisher_every and again.offload > first.offload


def test_a_sample_wants_prompts(refused):
    refused(proxt2i, ["sample", "--eval-every", "0", "--val-images", "0"], "--val-images 0: 1 or more")


@pytest.mark.parametrize("module", (grpo, slas))
def test_a_resume_keeps_the_micro_batch_that_was_typed(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "sd35m", "--gpu-memory", "24", "--out", "out"]
    first = data.cli(module.Config, module.PRESETS, [*words, "--micro-batch", "7"], module.METHODS)
    assert first.micro_batch == 7
    Path("out").mkdir()
    Path("out/config.json").write_text(json.dumps(dataclasses.asdict(first)))
    again = data.cli(module.Config, module.PRESETS, ["--out", "out", "--resume"], module.METHODS)
    assert again == dataclasses.replace(first, resume=True)
    with pytest.raises(ValueError, match="--updates 0"):
        data.cli(module.Config, module.PRESETS, [*words, "--updates", "0"], module.METHODS)


@BOTH
def test_two_runs_at_once_take_two_folders(module, small, capsys):
    """Both look for a free one before either has begun; a folder that was named is refused instead."""
    cfg = data.cli(module.Config, module.PRESETS, [*small, "--out", ""])
    one, two = (data.Run(cfg, module.__name__) for _ in range(2))
    assert one.out == two.out == Path(f"runs/{module.__name__}-001") and not Path("runs").exists()
    one.make_out(), two.make_out()
    assert (one.out.name, two.out.name) == (f"{module.__name__}-001", f"{module.__name__}-002")
    assert f"out: {two.out}" in capsys.readouterr().out
    assert all(json.loads((run.out / "config.json").read_text())["out"] == "" for run in (one, two))


def test_a_link_to_nothing_is_no_free_folder(small):
    """A scratch disk that is not there."""
    Path("runs").mkdir()
    Path("runs/dgpo-001").symlink_to("gone/dgpo-001")
    run = data.Run(data.cli(dgpo.Config, dgpo.PRESETS, [*small, "--out", ""]), "dgpo")
    run.make_out()
    assert run.out == Path("runs/dgpo-002") and (run.out / "config.json").is_file()


@BOTH
def test_a_folder_that_another_process_writes_is_refused(module, small, refused):
    module.main(small)
    before = snapshot("out")
    hold = "import fcntl; f = open('out/last/lock', 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    other = subprocess.Popen([sys.executable, "-c", f"{hold}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    refused(module, [*small, "--resume", "--steps", "2"], "out is another process's", "--out")
    assert snapshot("out") == before
    other.kill()                                                       # the lock goes with it
    other.wait()
    module.main([*small, "--resume", "--steps", "2"])


def test_the_run_of_another_script_is_refused(small, refused):
    """Pairs that know all of each other's flags, too; a copy of a script goes on with the original's runs."""
    for module in (slas, dgpo):
        module.main([*small, "--out", module.__name__])
    before = snapshot("slas"), snapshot("dgpo")
    for module, out in ((grpo, "slas"), (dgpo, "slas"), (grpo, "dgpo"), (slas, "dgpo"), (proxt2i, "dgpo")):
        refused(module, ["--resume", "--out", out, "--steps", 2],
                f"{out} is a run of another script", "they differ in ")
    assert (snapshot("slas"), snapshot("dgpo")) == before
    Path("mine.py").write_bytes((ROOT / "dgpo.py").read_bytes())
    subprocess.run([sys.executable, "mine.py", *small, "--out", "dgpo", "--resume", "--steps", "2"], check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_folder_of_something_else_is_not_called_a_run(small, refused):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    refused(dgpo, small, "out already holds notes.txt, no run: empty it, or choose another --out")


@BOTH
def test_resume_without_a_run(module, small, refused):
    refused(module, [*small, "--resume"], "--resume", "out/config.json does not exist", "leave --resume away")
    refused(module, [*small, "--resume", "--out", ""], "--resume", f"runs/{module.__name__}-*")
    assert not Path("out").exists() and not Path("runs").exists()


@BOTH
def test_resume_from_a_damaged_run(module, small, refused):
    module.main(small)
    state, config = Path("out/last/state.pt"), Path("out/config.json")
    whole, settings = state.read_bytes(), config.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"nonsense"):
        state.write_bytes(content)
        before = snapshot("out")
        refused(module, [*small, "--resume", "--steps", "2"], "out/last/state.pt is damaged", "--out")
        assert snapshot("out") == before
    for written in (None, 1, {"metrics.jsonl": 1}):                    # as earlier code wrote it
        torch.save({**torch.load(io.BytesIO(whole), weights_only=True), "written": written}, state)
        refused(module, [*small, "--resume", "--steps", "2"], "out/last/state.pt is of another version")
    state.write_bytes(whole)
    config.write_bytes(settings[:20])
    refused(module, [*small, "--resume", "--steps", "2"], "out/config.json is damaged")
    config.write_bytes(settings)
    module.main([*small, "--resume", "--steps", "2"])                  # nothing was lost
    assert json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@BOTH
def test_an_empty_out_is_used(module, small):
    Path("out").mkdir()
    module.main(small)
    assert Path("out/last/state.pt").is_file()


@BOTH
def test_prompts_that_the_judge_refuses_are_found_before_training(module, small, refused):
    """A class that the verifier does not know, in the test prompts alone, then in those of validation alone."""
    Path("p").mkdir()
    good = data.world_prompts("test")[:2]
    bad = [{"prompt": "a photo of a cat", "include": [{"class": "cat", "count": 1}]}] * 2
    Path("red.py").write_text("def red(images, prompts, metas):\n    return images[:, 0].mean((1, 2))\n")
    line = [*small, "--prompts", "p", "--reward", "red.py:red", "--eval-reward", "shapes-strict", "--eval-every", "1"]
    for unknown in ("test", "val", ""):
        for split in ("train", "val", "test"):
            rows = bad if split == unknown else good
            Path(f"p/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if unknown:
            refused(module, line, "a photo of a cat")
            assert not Path("out").exists()
    module.main(line)                                                  # and without it there is nothing to refuse


@BOTH
def test_bad_prompt_files(module, small, refused):
    for name, content, words in (("a.txt", None, "No such file"), ("b.txt", b"", "no prompts"),
                                 ("c.txt", b"\n \n", "no prompts"),
                                 ("d.txt", b"caf\xe9\n", "not UTF-8"), ("e.jsonl", b"{", "not a valid"),
                                 ("f.csv", b"text\nred\n", "no prompt"), ("g.md", b"red", "unknown prompts")):
        if content is not None:
            Path(name).write_bytes(content)
        refused(module, [*small, "--prompts", name], name, words)
    refused(module, [*small, "--prompts", "geneva"], "geneva")
    assert not Path("out").exists()


@BOTH
def test_bad_rewards(module, small, refused, reward_file, monkeypatch):
    for name, words in (("shape", ("'shape'", "shapes")), (f"{reward_file}:", ("''",)),
                        (f"{reward_file}:read", ("'read'",)),
                        ("missing.py:red", ("missing.py",)), ("shapes:heavy", ("'heavy'",))):
        for flag in ("--reward", "--eval-reward"):
            refused(module, [*small, flag, name], *words)
            assert not Path("out").exists()
    for device in ("gpu", "cuda:99"):
        refused(module, [*small, "--reward-device", device], f"--reward-device {device}")
    monkeypatch.setattr(models, "load", None)                          # a large model is not loaded first
    refused(module, [*small, "--reward", "missing.py:red"], "missing.py")
    refused(module, [*small, "--prompts", "missing.txt"], "missing.txt")
    refused(module, [*small, "--model", "sd35m", "--weights", "", "--reward", "missing.py:red"],
            "no weights for --model sd35m")
    refused(module, [*small, "--reward-dtype", "bfloat16"], "is computed in float32")
    refused(module, [*small, "--reward-dtype", "float16"], "--reward-dtype 'float16' is unknown")
    for line in ("raise SystemExit(0)", "import sys; sys.exit(3)"):    # a script's end, not a run's
        Path("ends.py").write_text(f"{line}\n")
        refused(module, [*small, "--reward", "ends.py:main"], "ends.py does not load: SystemExit")
    refused(module, [*small, "--seed", 2 ** 63], f"--seed {2 ** 63}")
    refused(module, [*small, "--reward-mix", "advantage"], "--reward-mix advantage", "is one reward")
    refused(module, [*small, "--reward-mix", "sum"], "--reward-mix 'sum' is unknown")


@pytest.mark.parametrize("name, words", (("raises", "no such judge"), ("too_short", "8"), ("one_number", "8"),
                                         ("all_nan", "8 of 8"), ("many_nan", "a tenth"), ("exits", "SystemExit"),
                                         ("paints", "changed the images")))
@BOTH
def test_rewards_that_fail(module, name, words, small, refused, reward_file):
    """In the rollouts and in evaluation; 2 groups of 4, so that the lengths to be named are 8 and 16."""
    refused(module, [*small, "--reward", f"{reward_file}:{name}"], f"{reward_file}:{name}",
            words.replace("8 of 8", "8 of 8 images"))
    more = ["--val-images", "16", "--eval-every", "1", "--eval-reward", f"{reward_file}:{name}", "--out", "again"]
    refused(module, [*small, *more], f"{reward_file}:{name}", words.replace("8", "16"))


def test_bad_input_as_a_command(small, reward_file):
    """The same from a shell: the code, one line on stderr and nothing on stdout; later, a line beside the progress
    bar."""
    done = subprocess.run([sys.executable, ROOT / "dgpo.py", *small, "--group-size", "1"], capture_output=True,
                          text=True,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --group-size 1: ")
    done = subprocess.run([sys.executable, ROOT / "grpo.py", *small, "--reward", f"{reward_file}:all_nan"], text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)
    lines = done.stderr.replace("\r", "\n").split("\n")
    assert done.returncode == 2 and sum(line.startswith("error: the reward") for line in lines) == 1
    assert all(line.startswith(("error: ", *BAR)) for line in lines if line.strip())


@pytest.mark.parametrize("script", ("dgpo", "grpo", "slas", "proxt2i"))
def test_waiting_threads_are_told_before_torch_loads(script):
    """OpenMP reads it then, and never again. With its default, 300,000 spins, a step took ten times as long where
    another program was busy on one of two cores."""
    code = f"""import os, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
import {script}"""
    env = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "3000\n", done.stderr


def test_a_path_that_is_not_canonical(tmp_path):
    """A script that is called through a link ends with one line, too."""
    (tmp_path / "link").symlink_to(Path(dgpo.__file__).parent)
    done = subprocess.run([sys.executable, tmp_path / "link" / "dgpo.py", "--t-min", "2"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --t-min 2.0") and done.stderr.count("\n") == 1
