"""python rewards.py bench: what it samples and scores, where it goes on, what its folder says, and what it refuses.

And csrc/bench.py: rewards are timed, and the runs of models end with it.
"""
import argparse
import csv
import fcntl
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dgpo
import grpo
import models
import proxt2i
import rewards
from csrc import bench as speed

FILES = ["images", "protocol.json", "result.json", "scores.csv", "scores.jsonl", "sheet.png"]


def bench(out, *flags):
    rewards.main(["bench", "--out", str(out), "--micro-batch", "4", "--eval-steps", "2", *map(str, flags)])
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        rewards.main(["bench", *map(str, flags)])
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    return said


def painted(out):
    """The images of a bench's folder, (B, 3, H, W) in [0, 1], in the order of its listing."""
    rows = [json.loads(line) for line in (out / "images" / "prompts.jsonl").read_text().splitlines()]
    arrays = [np.array(Image.open(out / "images" / row["file"])) for row in rows]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255, rows


def rounded(images):
    return (images.clamp(0, 1) * 255).round() / 255


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(random_model):
    return ["--model", random_model, "--benchmark", "shapes", "--draw", 5, "--per-prompt", 2]


@pytest.fixture
def watched(tmp_path):
    """A reward that is killed at its second call if a file `stop` lies beside it, and is NaN for some prompts."""
    file = tmp_path / "watched.py"
    file.write_text("""import math, pathlib
import torch

calls = 0


def mean(images, prompts, metas):
    global calls
    calls += 1
    if calls == 2 and pathlib.Path(__file__).with_name("stop").exists():
        raise KeyboardInterrupt
    values = images.mean((1, 2, 3))
    return torch.where(torch.tensor(["star" in p for p in prompts]), math.nan, values)
""")
    return f"{file}:mean"


def test_what_comes_out(tmp_path, capsys, random_model, model):
    out, spec = tmp_path / "out", "shapes-strict,shapes-soft"
    rows = bench(out, *model, "--reward", spec, "--seed", 7, "--cfg-eval", 2.5)
    said = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in out.iterdir()) == FILES

    # The images are those of the scripts' own sampler, from consecutive seeds.
    metas = data.draw_prompts(data.prompts("shapes", "test"), 5, "test")
    asked = [meta for meta in metas for _ in range(2)]
    cfg = dgpo.Config(eval_steps=2, micro_batch=4)
    want = dgpo.sample(models.load(str(random_model)), [meta["prompt"] for meta in asked],
                       [("eval", 7 + j) for j in range(10)], cfg, 2.5)
    images, listing = painted(out)
    assert torch.equal(images, rounded(want)) and [row["prompt"] for row in listing] == [m["prompt"] for m in asked]
    assert [row["seed"] for row in rows] == list(range(7, 17))
    assert [row["file"] for row in rows[:3]] == ["00000/samples/0000.png", "00000/samples/0001.png",
                                                 "00001/samples/0000.png"]
    assert json.loads((out / "images" / "00004" / "metadata.jsonl").read_text()) == metas[4]

    # The scores are those of what lies there, by the verifier and by the other command.
    parts = rewards.verify(images, asked)
    for key in ("strict", "soft"):
        assert [row[f"shapes-{key}"] for row in rows] == pytest.approx(parts[key].tolist(), abs=1e-6)
    again = rewards.score_folder("shapes-soft", out / "images")
    assert [row["reward"] for row in again] == pytest.approx([row["shapes-soft"] for row in rows], abs=1e-6)
    result = json.loads((out / "result.json").read_text())
    assert result["scores"]["all"]["shapes-soft"] == pytest.approx(parts["soft"].mean().item())
    assert result["protocol"] == json.loads((out / "protocol.json").read_text())
    table = list(csv.DictReader((out / "scores.csv").open()))
    assert [float(row["shapes-soft"]) for row in table] == [row["shapes-soft"] for row in rows]
    assert len({row["protocol"] for row in table}) == 1
    assert said[-3].split()[:2] == ["all", "10"] and json.loads(said[-1])["shapes-soft"] == pytest.approx(
        parts["soft"].mean().item())
    assert Image.open(out / "sheet.png").width > 5 * 12


def test_the_protocol(tmp_path, random_model, model, watched):
    bench(tmp_path / "out", *model, "--reward", f"shapes-soft,{watched}", "--resolution", 8, "--solver", "dpm",
          "--shift", 3)
    stamp = json.loads((tmp_path / "out" / "protocol.json").read_text())
    pipe = models.load(str(random_model))
    assert stamp["weights_sha256"] == rewards.digest(pipe.net, *pipe.encoders)
    want = {"steps": 2, "guidance": 1., "resolution": 8, "solver": "dpm", "times": pipe.times(2, "", 3.), "seed": 0,
            "prompts": 5, "per_prompt": 2, "dtype": "float32", "torch": torch.__version__, "device": "cpu"}
    assert {key: stamp[key] for key in want} == want
    assert [stamp["rewards"][name]["sha256"] is None for name in ("shapes-soft", watched)] == [True, False]
    first = rewards.digest(pipe.net)
    with torch.no_grad():
        next(pipe.net.parameters()).view(-1)[0] += 1e-6
    assert rewards.digest(pipe.net) != first


def test_it_goes_on_where_it_was(tmp_path, model, watched, capsys):
    whole = bench(tmp_path / "whole", *model, "--reward", watched)
    out, stop = tmp_path / "out", pathlib.Path(watched.partition(":")[0]).with_name("stop")
    stop.touch()
    with pytest.raises(KeyboardInterrupt):
        bench(out, *model, "--reward", watched)                        # killed in the second batch of three
    stop.unlink()
    lines = (out / "scores.jsonl").read_bytes()
    assert lines.count(b"\n") == 4
    rest = (tmp_path / "whole" / "scores.jsonl").read_bytes()[len(lines):]
    (out / "scores.jsonl").write_bytes(lines + rest[:len(rest) // 2])  # and in the middle of writing its rows
    made = (out / "images" / "00000" / "samples" / "0000.png").stat().st_mtime_ns
    capsys.readouterr()
    assert bench(out, *model, "--reward", watched) == whole
    assert "4 images are there" in capsys.readouterr().out
    assert made == (out / "images" / "00000" / "samples" / "0000.png").stat().st_mtime_ns  # not made again
    assert contents(out) == contents(tmp_path / "whole")
    failed = ["star" in row["prompt"] for row in whole]
    assert [row[watched] is None for row in whole] == failed and any(failed) and not all(failed)
    text = (out / "result.json").read_text()
    scores = json.loads(text)["scores"]
    assert scores["all"]["failed"] == sum(failed) and scores["position"] == {"images": 2, watched: None, "failed": 2}
    assert "NaN" not in text and ["position", "2", "-", "2"] in map(str.split, rewards.table(scores, "").splitlines())


def test_two_processes_make_the_same_folder(tmp_path, model):
    """Three batches on one process and on two; then two go on behind the first batch, and behind half of a row more."""
    def run(out, processes):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        line = [*model, "--reward", "shapes-soft", "--micro-batch", 4, "--eval-steps", 2, "--out", out, "--device",
                "cpu"]
        done = subprocess.run([sys.executable, *launcher, rewards.__file__, "bench", *map(str, line)], text=True,
                              capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return done.stdout
    said = [run(tmp_path / str(n), n) for n in (1, 2)]
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and one["scores.jsonl"].count(b"\n") == 10
    assert [out.replace(str(tmp_path / "2"), str(tmp_path / "1")) for out in said] == [said[0]] * 2        # said once
    lines = one["scores.jsonl"].splitlines(keepends=True)
    for name in ("result.json", "scores.csv", "sheet.png", "images/00004/samples/0001.png"):
        (tmp_path / "2" / name).unlink()
    (tmp_path / "2" / "scores.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:30])
    assert "4 images are there" in run(tmp_path / "2", 2) and contents(tmp_path / "2") == one


def test_some_rewards_and_ops_alone(capsys, monkeypatch):
    rows = speed.score("cpu", True, 1, 0, ["tiny-clip", "shapes"])
    assert [(name, dtype) for name, dtype, _ in rows] == [
        ("tiny-clip", "float32"), ("tiny-clip", "bfloat16"), ("shapes", "float32")]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bench.py", "ops", "group_advantage", "--quick", "--device", "cpu"])
    speed.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if " float32 " in line]
    assert lines and all(line.startswith(("group_advantage", "  by the batch")) for line in lines)
    for words in (["ops", "nope"], ["rewards", "deqa"], ["model", "tiny"]):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        with pytest.raises(SystemExit, match=f"{words[1]}: not one of"):
            speed.main()


def test_one_folder_holds_one_protocol(tmp_path, model, capsys):
    out = tmp_path / "out"
    bench(out, *model, "--reward", "shapes-soft")
    before = contents(out)
    for flags, key in ((["--cfg-eval", 2], "guidance=1.0, not 2.0"), (["--seed", 1], "seed=0, not 1"),
                       (["--eval-steps", 3], "steps=2, not 3"), (["--draw", 4], "prompts=5, not 4"),
                       (["--resolution", 8], "resolution=12, not 8"), (["--reward", "shapes"], "rewards=")):
        said = refused(capsys, "--out", out, "--micro-batch", 4, "--eval-steps", 2, *model, "--reward", "shapes-soft",
                       *flags)
        assert f"{out} holds figures with {key}" in said and "another --out" in said
    assert contents(out) == {**before, ".lock": b""}                   # which the end of a bench takes away
    bench(out, *model, "--reward", "shapes-soft")                      # the same again: only reported again
    assert contents(out) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for taken in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):                    # before anything is loaded
        said = refused(capsys, "--out", taken, "--model", "none", "--benchmark", "shapes", "--reward", "shapes")
        assert "something else" in said


def test_a_damaged_folder(tmp_path, model, capsys):
    """No JSON, no protocol, no rows, or those of other images than the first, in order: one line each."""
    out, flags = tmp_path / "out", [*model, "--reward", "shapes-soft"]
    bench(out, *flags)
    before = contents(out)
    rows, stamp = before["scores.jsonl"].splitlines(keepends=True), before["protocol.json"]
    for content, protocol, why in (
            ([rows[0], b"{\n", *rows[2:]], stamp, "JSONDecodeError"), ([b"\xff\n"], stamp, "UnicodeDecodeError"),
            (rows, None, "FileNotFoundError"), (rows, b"", "JSONDecodeError"), (rows, b"[]", "TypeError"),
            ([b"{}\n", *rows[1:]], stamp, "KeyError"), ([b"1\n"], stamp, "TypeError"),
            ([*rows[:4], *rows[:4]], stamp, "8 rows"), ([*rows, rows[-1]], stamp, "11 rows")):
        (out / "scores.jsonl").write_bytes(b"".join(content))
        (out / "protocol.json").unlink(missing_ok=True)
        if protocol is not None:
            (out / "protocol.json").write_bytes(protocol)
        said = refused(capsys, "--out", out, "--micro-batch", 4, "--eval-steps", 2, *flags)
        assert f"{out} is a damaged benchmark's folder" in said and why in said and "another --out" in said
    (out / "scores.jsonl").write_bytes(before["scores.jsonl"])
    (out / "protocol.json").write_bytes(stamp)
    bench(out, *flags)
    assert contents(out) == before


def test_two_benches_do_not_share_a_folder(tmp_path, model, capsys):
    out = tmp_path / "out"
    out.mkdir()
    hold = "import fcntl; f = open('.lock', 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=out, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as child:
        assert child.stdout.readline() == "held\n"
        said = refused(capsys, "--out", out, *model, "--reward", "shapes-soft")
        assert f"--out {out} is another process's" in said
        child.communicate("\n")
    bench(out, *model, "--reward", "shapes-soft")                      # a lock alone is nobody's benchmark


def test_torchrun_may_start_it_again(tmp_path, model, monkeypatch):
    """A benchmark goes on by itself: --max-restarts has no --resume to type."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert len(bench(tmp_path / "out", *model, "--reward", "shapes-soft")) == 10


def test_prompts_without_a_tag(tmp_path, random_model):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "tag": null}\n{"prompt": "a dog", "tag": "dogs"}\n')
    (tmp_path / "mine.py").write_text("def mean(images, prompts, metas):\n    return images.mean((1, 2, 3))\n")
    rows = bench(tmp_path / "out", "--model", random_model, "--benchmark", file, "--reward", f"{tmp_path}/mine.py:mean")
    assert [row["tag"] for row in rows] == ["all", "dogs"]
    scores = json.loads((tmp_path / "out" / "result.json").read_text())["scores"]
    assert {tag: row["images"] for tag, row in scores.items()} == {"all": 2, "dogs": 1}
    assert rewards.summary([{"tag": None, "a": 1.}], ["a"])["all"]["images"] == 1
    answer = {"correct": 1, "strict": 1, "score": 1., "details": {}}
    assert rewards.geneval_row("a.png", {"prompt": "a", "tag": None}, answer, "e")["tag"] == "all"


def test_what_is_refused(tmp_path, capsys, model, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    assert "add --reward" in refused(capsys, "--benchmark", file)
    assert "unknown prompts 'beauty'" in refused(capsys, "--benchmark", "beauty", "--reward", "shapes")
    assert "none.txt: No such file" in refused(capsys, "--benchmark", tmp_path / "none.txt")
    assert "leave the weights away" in refused(capsys, *model, "--reward", "shapes:2")
    assert "unknown reward" in refused(capsys, *model, "--reward", "beauty")
    assert "--per-prompt -1" in refused(capsys, "--per-prompt", -1)
    assert "no weights for --model sd35m" in refused(capsys, "--model", "sd35m")
    assert "--beta" in refused(capsys, "--beta", 1)
    assert "--eval-steps 0: 1 or more" in refused(capsys, "--eval-steps", 0)
    assert "--solver ddim does not suit" in refused(capsys, "--solver", "ddim", "--out", tmp_path / "a")
    assert "--guidance 5 is told to FLUX.1-dev alone; tiny's is --cfg-eval" in refused(capsys, "--guidance", 5)
    assert not (tmp_path / "a").exists()
    assert "cannot check" in refused(capsys, "--benchmark", file, "--reward", "shapes", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()                               # before anything is painted
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"no LoRA")
    assert "is damaged" in refused(capsys, "--lora", lora)
    assert "GPU(s) on this machine" in refused(capsys, "--device", "cuda:99")
    assert "No such file" in refused(capsys, "--lora", tmp_path / "none.safetensors")
    monkeypatch.setitem(rewards.BENCHMARKS, "drawbench", (tmp_path / "none.txt", *rewards.BENCHMARKS["drawbench"][1:]))
    assert "curl -fL" in refused(capsys, "--benchmark", "drawbench")


def test_a_runs_folder(tmp_path, capsys, monkeypatch, random_model, reward_file):
    flags = ["--model", random_model, "--reward", f"{reward_file}:red", "--eval-reward", f"{reward_file}:red",
             "--steps", "1", "--groups", "2", "--group-size", "4", "--eval-every", "0", "--eval-images", "5",
             "--cfg-also", "0", "--eval-steps", "3", "--cfg-eval", "2", "--lr", ".01"]
    for script, own in ((dgpo, []), (grpo, ["--lora-rank", "2"])):
        run = tmp_path / script.__name__
        script.main([*map(str, flags), *own, "--out", str(run)])
        after = json.loads(capsys.readouterr().out.splitlines()[-1])["eval_after"]
        out = tmp_path / f"{run.name}-bench"
        rewards.main(["bench", "--model", str(run), "--benchmark", "shapes", "--draw", "5", "--out", str(out),
                      "--reward", f"{reward_file}:red"])
        stamp = json.loads((out / "protocol.json").read_text())
        assert (stamp["steps"], stamp["guidance"]) == (3, 2.)          # as the run was evaluated
        got = json.loads(capsys.readouterr().out.splitlines()[-1])[f"{reward_file}:red"]
        assert got == pytest.approx(after, abs=1.5 / 255)              # rounded weights, images and figures
        start = tmp_path / f"{run.name}-start"
        rewards.main(["bench", "--model", str(random_model), "--benchmark", "shapes", "--draw", "5", "--out",
                      str(start), "--reward", f"{reward_file}:red", "--eval-steps", "3", "--cfg-eval", "2"])
        assert not torch.equal(painted(start)[0], painted(out)[0])
    lora = tmp_path / "with"
    bench(lora, "--model", random_model, "--lora", tmp_path / "grpo" / "lora.safetensors", "--benchmark", "shapes",
          "--draw", 5, "--reward", "shapes", "--eval-steps", 3, "--cfg-eval", 2, "--micro-batch", 96)
    assert torch.equal(painted(lora)[0], painted(tmp_path / "grpo-bench")[0])
    for file in ("lora.safetensors", "transformer"):
        shutil.rmtree(tmp_path / "dgpo" / file, ignore_errors=True)
    assert refused(capsys, "--model", tmp_path / "dgpo").strip().endswith("so --resume it first")
    (tmp_path / "grpo" / "lora.safetensors").unlink()
    now = tmp_path / "grpo" / "last" / "lora.safetensors"
    assert f"--lora {now}" in refused(capsys, "--model", tmp_path / "grpo")
    early = tmp_path / "early"
    bench(early, "--model", tmp_path / "grpo", "--lora", now, "--benchmark", "shapes", "--draw", 5, "--reward",
          "shapes", "--eval-steps", 3, "--micro-batch", 96)
    assert torch.equal(painted(early)[0], painted(tmp_path / "grpo-bench")[0])
    monkeypatch.chdir(tmp_path)                                        # the folder of its own is one for each LoRA
    rewards.main(["bench", "--model", "grpo", "--lora", str(now), "--benchmark", "shapes", "--draw", "1", "--reward",
                  "shapes", "--eval-steps", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == "runs/bench-shapes-grpo-last-lora"


def test_any_number_of_processes(random_model, monkeypatch):
    """DGPO's preset for SD3.5 has 8 groups, which three processes cannot share: a benchmark samples no groups."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = argparse.Namespace(model=str(random_model), weights="", lora="", device="cpu", preset="official")
    _, cfg, _ = rewards.bench_model(args)
    assert cfg.groups == 3 and cfg.eval_steps == dgpo.PRESETS["official"]["sd3"]["eval_steps"]


@pytest.mark.parametrize("lam", (True, False))
def test_a_u_vit(tmp_path, lam):
    pipe = models.fresh_uvit("tiny", None, lam, torch.float32, "cpu", 0)
    models.save_uvit(pipe, tmp_path / "model", torch.float32)
    bench(tmp_path / "out", "--model", tmp_path / "model", "--benchmark", "shapes", "--draw", 3, "--reward", "shapes")
    images, rows = painted(tmp_path / "out")
    method, sampler = ("prox", "hybrid") if lam else ("score", "dpm")
    cfg = proxt2i.Config(eval_steps=2, micro_batch=4, method=method)
    pipe = models.load(str(tmp_path / "model"))
    want = proxt2i.sample(pipe, [row["prompt"] for row in rows], [("eval", j) for j in range(3)], cfg, 1.)
    assert torch.equal(images, rounded(want))
    assert json.loads((tmp_path / "out" / "protocol.json").read_text())["solver"] == sampler


def test_euler_by_the_papers_gamma(tmp_path):
    """--score-gamma is a setting of the sampler like any other: of evaluation, and so of a benchmark's protocol."""
    found = {}
    for how in ("integral", "start"):
        bench(tmp_path / how, "--model", "tiny-score", "--benchmark", "shapes", "--draw", 2, "--reward", "shapes",
              "--sampler", "sde", "--score-gamma", how)
        assert json.loads((tmp_path / how / "protocol.json").read_text())["score_gamma"] == how
        found[how], rows = painted(tmp_path / how)
        cfg = proxt2i.Config(eval_steps=2, micro_batch=4, method="score", sampler="sde", score_gamma=how)
        want = proxt2i.sample(models.load("tiny-score"), [row["prompt"] for row in rows], [("eval", j) for j in (0, 1)],
                              cfg, 1.)
        assert torch.equal(found[how], rounded(want))
    assert not torch.equal(*found.values())


def test_a_u_vit_of_the_other_scheme(tmp_path, capsys, reward_file):
    """Trained for PDA's lambdas, it is sampled by pda, be it a model or a run, and refused for another scheme's."""
    line = ["--scheme", "pda", "--candidates", "25", "--steps", "1", "--batch", "4", "--eval-every", "0",
            "--eval-images", "2", "--cfg-also", "0", "--eval-steps", "25", "--eval-reward", f"{reward_file}:red",
            "--dtype", "float32"]
    proxt2i.main(["train", "--model", "tiny", *line, "--out", str(tmp_path / "run")])
    proxt2i.main(["finetune", "--lora-rank", "1", "--optimizer", "adamw", *line, "--out", str(tmp_path / "lora")])
    few = ["--benchmark", "shapes", "--draw", "2", "--reward", "shapes", "--eval-steps"]
    for name, model in (("a", tmp_path / "run" / "model"), ("b", tmp_path / "run"), ("lora run", tmp_path / "lora")):
        capsys.readouterr()
        rewards.main(["bench", "--model", str(model), *few, "26", "--out", str(tmp_path / name)])
        assert "--eval-steps 26: the proximal model was trained for" in capsys.readouterr().out
        assert json.loads((tmp_path / name / "protocol.json").read_text())["solver"] == "pda"
        said = refused(capsys, "--model", model, *few, 26, "--scheme", "hybrid", "--out", tmp_path / "c")
        assert "trained for the lambdas of --scheme pda" in said
        assert "4 steps of PDA" in refused(capsys, "--model", model, *few, 4, "--out", tmp_path / "c")
    assert torch.equal(painted(tmp_path / "a")[0], painted(tmp_path / "b")[0])


@pytest.mark.parametrize("name", ("tiny", "tiny-prox"))
@torch.no_grad()
def test_a_pass_to_be_captured(name):
    """It depends on what a graph is given anew, x and t."""
    net, (x, t, *rest) = speed.network(name, 3, 28, "cpu")
    out = net(x, t, *rest)
    assert out.shape == x.shape == (3, 3, 28, 28) and out.dtype == torch.bfloat16 and out.isfinite().all()
    assert not torch.equal(net(x / 2, t, *rest), out) and not torch.equal(net(x, t / 2, *rest), out)


@pytest.mark.parametrize("what", ("model", "graphs"))
def test_what_only_a_gpu_can_tell(what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", what])
    with pytest.raises(SystemExit, match=f"csrc/bench.py {what} wants an NVIDIA GPU"):
        speed.main()
    monkeypatch.setattr(sys, "argv", ["bench.py", what, "sd53m"])
    with pytest.raises(SystemExit, match="sd53m: not one of flux, sd14, sd35m, "):
        speed.main()


def test_rewards_are_timed():
    """Of random small networks, and of the verifier; a reward whose files are missing is said and has no time.

    One that fails ends the table with an error, once the others have their time.
    """
    root, names = pathlib.Path(rewards.__file__).parent, ("shapes", "hpsv2", "aesthetic", "tiny-clip", "imagereward")
    code = f"""import contextlib, io, json, sys
sys.path[:0] = ["{root}/csrc", "{root}"]
import bench
make = bench.random_rewards

def refuse(weights, device):
    raise ValueError("no weights for it")

def few(*args):
    module = make(*args)
    module.REWARDS = {{name: module.REWARDS[name] for name in {names}}} | {{"ocr": refuse}}
    return module

def fails(*args):
    module = few(*args)
    module.REWARDS = {{"clip": lambda weights, device: lambda *args: [][1], "shapes": module.REWARDS["shapes"]}}
    return module
bench.random_rewards = few
rows = bench.score("cpu", True, 2, 0)
bench.random_rewards = fails
try:
    with contextlib.redirect_stdout(io.StringIO()) as table:
        bench.score("cpu", True, 2, 0)
except SystemExit as error:
    print(json.dumps([rows, str(error), table.getvalue()]))"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    *said, last = done.stdout.splitlines()
    rows, error, table = json.loads(last)
    assert error == "failed: clip float32" and table.count("IndexError") == 1
    assert table.splitlines()[-1].startswith("shapes")
    both = [[name, dtype] for name in names[1:] for dtype in ("float32", "bfloat16")]
    assert [row[:2] for row in rows] == [["shapes", "float32"], *both, ["ocr", "float32"]]
    assert all(ms > 0 for *_, ms in rows[:-1]) and rows[-1][2] is None
    assert len(said) == 3 + len(rows) and "small random networks" in said[1] and "no weights for it" in said[-1]


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch, capsys):
    """Of csrc/bench.py model: diffusers and peft have a line without numbers, and ours still has its own."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    measured, own = speed.measured, dict(rollout=1., update=2., seconds=36., peak=3., reserved=4.)
    monkeypatch.setattr(speed, "measured", lambda *args: own if args[3] == "ours" else measured(*args))
    rows = speed.model([("dgpo", "sd35m", 80, ("bfloat16",))])
    assert [(row["seconds"], row.get("error")) for row in rows] == [(36., None), (None, "")]
    said = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert said == [["dgpo", "sd35m", "80", "ours", "1.00", "2.00", "36.00", "3.0", "4.0"],
                    ["dgpo", "sd35m", "80", "bfloat16", *"-----"]]


def test_a_run_ends_with_the_benchmark_that_started_it(tmp_path):
    """kill -9 of it, too: a script that goes on would keep a GPU busy."""
    (tmp_path / "sleeper.py").write_text(
        "import fcntl, os, time\n\n\ndef main(flags):\n    lock = open('lock', 'w')\n"
        "    fcntl.lockf(lock, fcntl.LOCK_EX)\n    os.mkdir('locked')\n    time.sleep(60)\n")
    line = [sys.executable, str(pathlib.Path(speed.__file__).with_name("peer.py")), "ours", "sleeper"]
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({line})"], cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
    wait_for((tmp_path / "locked").exists)

    def runs():                                                        # a lock goes with its process, even a zombie's
        with open(tmp_path / "lock", "w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False
    assert runs()
    parent.kill()
    parent.wait()
    wait_for(lambda: not runs())


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(.02)
