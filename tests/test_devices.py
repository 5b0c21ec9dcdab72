"""The scripts and rewards on tensors that claim to be on a GPU: nothing stays behind on the CPU. See devices.py."""
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import pipelines
import rewards
import test_clip_rewards as clips
import test_detector as detector
from test_clip_rewards import home as clip_home  # noqa: F401
from test_detector import home as detector_home, reference  # noqa: F401
from test_ocr import TEXTS, sign

ROOT = Path(__file__).resolve().parent.parent
EVALS = ("--eval-images", "4", "--val-images", "4", "--eval-steps", "2", "--cfg-also", "0", "--out", "out")
SMALL = ("--no-fused", "--steps", "1", "--groups", "2", "--group-size", "2", "--updates", "1", "--sample-steps", "3",
         *EVALS)
pytestmark = pytest.mark.skipif(bool(torch.version.cuda), reason="a build that has CUDA refuses tensors that claim to")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(folder, *line, processes=1): (exit status, what was said) of a script under tests/devices.py."""
    library = tmp_path_factory.mktemp("library") / "hooks.so"

    def start(folder, *line, processes=1):
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
        done = subprocess.run([sys.executable, *torchrun * (processes > 1), ROOT / "tests/devices.py", *map(str, line)],
                              cwd=folder, text=True, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(folder), "T2I_DEVICES": str(library)})
        return done.returncode, done.stdout + done.stderr
    return start


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of very small pipelines: {family: folder}."""
    folders = {family: tmp_path_factory.mktemp(family) for family in pipelines.FAMILIES}
    for family, folder in folders.items():
        pipelines.save(family, folder)
        (folder / "prompts.txt").write_text("a red circle\na blue ring\n")
    return folders


@pytest.mark.parametrize("family, line", (
    ("sd3", "dgpo --lora-rank 4 --cfg-rollout 3 --cfg-train 2 --cfg-ref 2 --dtype bfloat16 --offload --overlap"),
    ("flux", "grpo --method flow --kl-beta .1 --no-fsdp --checkpointing"),
    ("sd14", "slas --cfg-train 2 --cfg-rollout 2 --ema .5 --fisher-every 1 --fisher-images 1"),
    ("", "proxt2i rl --cfg-rollout 3 --cfg-train 3 --kl-beta .1"),
    ("", "proxt2i rl --method score --model tiny-score --dtype bfloat16"),
    ("", "dgpo --sde --rollout ema --clip-range .01 --grid")), ids=str)
def test_everything_is_on_the_gpu(family, line, models, reward_file, run, tmp_path):
    where = ("--model", models[family], "--preset", "tiny", "--prompts", models[family] / "prompts.txt",
             "--resolution", 16) if family else ()
    reward = f"{reward_file}:red"
    code, said = run(tmp_path, *line.split(), *SMALL, *where, "--reward", reward, "--eval-reward", reward)
    assert code == 0, said
    assert "on 1 x cuda" in said and '"steps": 1' in said


def test_training_from_scratch(run, tmp_path):
    code, said = run(tmp_path, "proxt2i", "train", "--no-fused", "--steps", 1, "--batch", 4, "--eval-every", 1, *EVALS)
    assert code == 0 and "on 1 x cuda" in said and '"steps": 1' in said, said


def test_two_processes_and_shards(models, reward_file, run, tmp_path):
    """NCCL's part by gloo, which is given no tensor of the CPU's, and the numbers are those of a CPU."""
    line = ("dgpo", *SMALL, "--model", models["sd3"], "--preset", "tiny", "--prompts", models["sd3"] / "prompts.txt",
            "--resolution", 16, "--fsdp", "--reward", f"{reward_file}:red", "--eval-reward", f"{reward_file}:red")
    code, said = run(tmp_path, *line, processes=2)
    assert code == 0 and "on 2 x cuda" in said, said
    (tmp_path / "out").rename(tmp_path / "gpu")
    words = [sys.executable, ROOT / "dgpo.py", *(str(word) for word in line[1:] if word != "--fsdp")]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    theirs, ours = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("out", "gpu"))
    for key in ("reward", "loss", "dsm", "grad_norm"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


REWARDS = '''
import functools
import pickle
import torch
import rewards


def main(argv):
    """Score every case on the GPU, and save what came out."""
    with open(argv[0], "rb") as file:
        sizes, words, cases = pickle.load(file)
    rewards.CLIP_SIZES.update(sizes)
    rewards.ImageReward = functools.partial(rewards.ImageReward, **words)
    rewards.detector_pixels = functools.partial(rewards.detector_pixels, long=130, short=80)
    for name, home, dtype, images, prompts, metas, want in cases:
        score = rewards.load(name, home, "cuda", dtype)
        got = score(torch.tensor(images, device="cuda"), prompts, metas)
        assert got.device.type == "cuda", name
        torch.testing.assert_close(got.cpu(), torch.tensor(want), atol=1e-4 if dtype == "float32" else .02, rtol=1e-4)
        print(name, "is as on the CPU")
'''


def test_rewards(clip_home, detector_home, run, tmp_path, monkeypatch):  # noqa: F811
    """Small random networks in the public files' layouts, and the OCR readers' own: scores as on the CPU."""
    monkeypatch.setattr(rewards, "detector_pixels", functools.partial(rewards.detector_pixels, long=130, short=80))
    rewards.geneval_engine.cache_clear()
    home, words = tmp_path / "imagereward", "a red ring,two stars,a,of".split(",")
    home.mkdir()
    (home / "vocab.txt").write_text("\n".join(clips.VOCAB) + "\n", encoding="utf-8")
    torch.save(clips.shaken(rewards.ImageReward(**clips.WORDED)).state_dict(), home / "ImageReward.pt")
    world, rows = torch.rand(4, 3, 28, 28), data.prompts("shapes", "test")[:4]
    drawn, signs = clips.pictures(40, 52, 4)[1], torch.stack([sign(i, text) for i, text in enumerate(TEXTS[:3])])
    plain = (drawn, words, [{}] * 4)
    cases = [(name, clip_home, dtype, *plain) for name, dtype in (
        ("pickscore", "float32"), ("hpsv2:0.7,clip-dfn:1.4", "float32"), ("clipscore", "float32"),
        ("aesthetic", "float32"), ("pickscore", "bfloat16"))]
    cases += [("imagereward", tmp_path, dtype, *plain) for dtype in ("float32", "bfloat16")]
    cases += [("geneval", detector_home, "float32", drawn, [""] * 4, detector.METAS),
              ("tiny-clip", None, "float32", world, [row["prompt"] for row in rows], rows),
              ("shapes", None, "float32", world, [row["prompt"] for row in rows], rows)]
    words = [f'"{text}"' for text in TEXTS[:3]]
    cases += [(name, None, "float32", signs, words, [{}] * 3) for name in ("ocr", "ocr-gold")]
    small, saved = rewards.ImageReward, []
    monkeypatch.setattr(rewards, "ImageReward", lambda: small(**clips.WORDED))
    for name, where, dtype, images, prompts, metas in cases:
        want = rewards.load(name, where, "cpu", dtype)(images, prompts, metas)
        assert want.shape == (len(images),)
        saved.append((name, where, dtype, images.numpy(), prompts, metas, want.tolist()))
    sizes = {size: rewards.CLIP_SIZES[size] for size in ("H/14", "H/14-378")}
    (tmp_path / "cases.pkl").write_bytes(pickle.dumps((sizes, clips.WORDED, saved)))
    (tmp_path / "scores.py").write_text(REWARDS)
    code, said = run(tmp_path, "scores", tmp_path / "cases.pkl")
    assert code == 0 and said.count("is as on the CPU") == len(cases), said


def test_what_stays_behind_is_found(run, tmp_path):
    """A tensor made without its device, the usual slip; indices on the GPU of one not there; a picture not fetched."""
    for body, words in (("torch.ones(3, device='cuda') + torch.ones(3)", "two devices"),
                        ("torch.ones(3)[torch.ones(3, device='cuda') > 0]", "two devices"),
                        ("torch.ones(3, device='cuda').numpy()", "numpy() is not supported")):
        (tmp_path / "slip.py").write_text(f"import torch\n\n\ndef main(argv):\n    {body}\n")
        code, said = run(tmp_path, "slip")
        assert code and words in said, said
    (tmp_path / "slip.py").write_text("import torch\n\n\ndef main(argv):\n    x = torch.arange(4., device='cuda')\n"
                                      "    print(x[1].item(), x.cpu()[[2]], x[x > 2].sum())\n")
    code, said = run(tmp_path, "slip")
    assert code == 0 and "1.0 tensor([2.])" in said and "waited for the GPU 3 times" in said, said
