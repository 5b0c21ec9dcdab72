"""The loops on tensors that claim to be on a GPU: nothing stays behind on the CPU. See tests/devices.py."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pipelines

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--no-fused", "--no-overlap", "--steps", "1", "--groups", "2", "--group-size", "2", "--updates", "1",
         "--eval-images", "4", "--val-images", "4", "--sample-steps", "3", "--eval-steps", "2", "--out", "out")
pytestmark = pytest.mark.skipif(bool(torch.version.cuda), reason="a build that has CUDA refuses tensors that claim to")


def run(folder, *line):
    """(exit status, what was said) of a script under tests/devices.py."""
    done = subprocess.run([sys.executable, ROOT / "tests/devices.py", *map(str, line)], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(folder)})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of very small pipelines: {family: folder}."""
    folders = {family: tmp_path_factory.mktemp(family) for family in pipelines.FAMILIES}
    for family, folder in folders.items():
        pipelines.save(family, folder)
        (folder / "prompts.txt").write_text("a red circle\na blue ring\n")
    return folders


@pytest.mark.parametrize("family, line", (
    ("sd3", "dgpo --lora-rank 4 --cfg-rollout 3 --cfg-train 2 --cfg-ref 2 --dtype bfloat16 --offload"),
    ("flux", "grpo --method flow --kl-beta .1 --no-fsdp --checkpointing"),
    ("sd14", "slas --cfg-train 2 --cfg-rollout 2 --ema .5 --fisher-every 1 --fisher-images 1"),
    ("", "proxt2i rl --cfg-rollout 3 --cfg-train 3 --kl-beta .1"),
    ("", "proxt2i rl --method score --model tiny-score --dtype bfloat16"),
    ("", "dgpo --sde --rollout ema --clip-range .01 --grid")), ids=str)
def test_everything_is_on_the_gpu(family, line, models, tmp_path):
    where = ("--model", models[family], "--preset", "tiny", "--prompts", models[family] / "prompts.txt",
             "--resolution", 16, "--cfg-also", 0) if family else ()
    code, said = run(tmp_path, *line.split(), *SMALL, *where)
    assert code == 0, said
    assert "on 1 x cuda" in said and '"steps": 1' in said


def test_what_stays_behind_is_found(tmp_path):
    """A tensor made without its device, the usual slip, and a picture that was not fetched."""
    for body, words in (("torch.ones(3, device='cuda') + torch.ones(3)", "two devices"),
                        ("torch.ones(3, device='cuda').numpy()", "numpy of a tensor on cuda:0"),
                        ("torch.nn.Linear(3, 3).weight.sum().backward()", "backward of a tensor on cpu")):
        (tmp_path / "slip.py").write_text(f"import torch\n\ndef main(argv):\n    {body}\n")
        code, said = run(tmp_path, "slip")
        assert code and words in said, said
