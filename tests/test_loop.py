"""Whole runs of dgpo.py and grpo.py on a very small random model: processes, kills, counters, guards, every mode, a
lift."""
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dgpo
import grpo
import models
import slas

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("alone")
BOTH = pytest.mark.parametrize("module", (dgpo, grpo), ids=("dgpo", "grpo"))
SMALL = dict(groups=2, group_size=4, sample_steps=4, eval_steps=2, eval_images=6, val_images=4, eval_every=0, steps=2,
             cfg_also=0, minutes=60, lr=1e-3)


@pytest.fixture
def flags(random_model, reward_file):
    """flags(out="a", steps=3, ...) -> the command line of a small run; reward="red" names one of the tests' rewards."""
    def make(**settings):
        settings = {"weights": random_model, "reward": "red", "eval_reward": "red", "out": "out", **SMALL, **settings}
        line = []
        for name, value in settings.items():
            flag = name.replace("_", "-")
            if name in ("reward", "eval_reward"):
                value = f"{reward_file}:{value}"
            line += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return line
    return make


def run(module, line):
    """Run in this process. Returns the final JSON object, the rows of metrics.jsonl and last/state.pt."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.main(line)
    last = json.loads(said.getvalue().splitlines()[-1])
    out = Path(last["out"])
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    return last, rows, torch.load(out / "last" / "state.pt", weights_only=True)


def evals(out):
    """The rows of a run's evals.jsonl."""
    return [json.loads(row) for row in (Path(out) / "evals.jsonl").read_text().splitlines()]


def process(script, line, torchrun=False, **more):
    """The same in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *launcher, str(script), *line], env=env, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a, b):
    """Are two states equal, bit for bit (all but the clock)?"""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("seconds", "written"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ============================================================================================================ processes

@BOTH
def test_two_processes_train_the_same_weights(module, flags, tmp_path):
    """torchrun with 2 processes and one process: float64, equal to 1e-9.

    The second process comes late: it first looks at OUT when the other has made it, had that not waited. The threads of
    Gloo end before main does: one that drops a tensor while Python ends aborts the process.
    """
    settings = dict(dtype="float64", steps=3, groups=4, eval_every=2, eval_images=5)
    if module is dgpo:                                                 # each term's advantages, of all processes
        settings |= dict(reward="red:0.2,shapes-soft", reward_mix="advantage")
    late = tmp_path / "late.py"
    late.write_text(f"""import os, pathlib, time
import torch.distributed as dist
import {module.__name__}

exists, tries = pathlib.Path.exists, list(range(60)) if "{module.__name__}" == "dgpo" else []
def slowly(path):
    while str(path) == "two" and tries and not os.path.isdir(path):
        time.sleep(tries.pop() and .1)
    return exists(path)
if os.environ["RANK"] == "1":
    pathlib.Path.exists = slowly
def gloo(task):
    try:
        return "gloo" in task.read_text()
    except OSError:                                                    # that thread has just ended
        return False
def threads():
    return sum(map(gloo, pathlib.Path("/proc/self/task").glob("*/comm")))
counts, destroy = [], dist.destroy_process_group
dist.destroy_process_group = lambda: (counts.append(threads()), destroy(), counts.append(threads()))
{module.__name__}.main()
assert counts[0] > 0 == counts[1], counts
""")
    two = process(late, flags(out="two", **settings), torchrun=True)
    _, rows, one = run(module, flags(out="one", **settings))
    out, err = two.communicate(timeout=600)
    assert two.returncode == 0, err
    last = json.loads(out.splitlines()[-1])
    other = torch.load("two/last/state.pt", weights_only=True)
    moved = 0
    start = models.load("", flags()[1], torch.float64).net.parameters()
    for a, b, c in zip(one["params"], other["params"], start):
        assert a.dtype == torch.float64 and (a - b).abs().max() < 1e-9
        moved = max(moved, (a - c).abs().max().item())
    assert moved > 1e-3
    assert last["steps"] == 3 and last["images"] == 48
    for a, b in zip(rows, map(json.loads, open("two/metrics.jsonl")), strict=True):
        assert a.keys() == b.keys() and a["stats"] == pytest.approx(b["stats"], abs=1e-6)
        assert all(a[key] == b[key] for key in ("step", "updates", "images", "forwards", "backwards", "skipped"))
        assert all(abs(a[key] - b[key]) < 1e-5 for key in ("reward", "grad_norm"))
    for a, b in zip(evals("one"), evals("two"), strict=True):
        assert all(a[key] == b[key] for key in ("split", "guidance", "step")) and abs(a["eval"] - b["eval"]) < 1e-5


@BOTH
def test_a_reward_that_fails_on_one_process_ends_them_all(module, flags):
    two = process(ROOT / f"{module.__name__}.py", flags(reward="raises_on_one_rank"), torchrun=True)
    out, err = two.communicate(timeout=600)
    assert two.returncode != 0 and "exitcode:2" in err.replace(" ", "") and "the judge of one rank is gone" in err
    assert len(re.findall(r"^error \(process 1 of 2, .+\): the reward", err, re.M)) == 1, err
    assert len(re.findall(r"^stopped \(process 0 of 2, .+\): another process ended", err, re.M)) == 1, err
    assert "[rank0]" not in err and "rank : 1" in " ".join(err.split()), err               # torchrun's root cause


def test_processes_that_are_not_alike_are_refused(flags, tmp_path):
    """Other flags, code or weights; where they compute may differ, but for shards, which want the same passes."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "models.py").write_text("")
    script = tmp_path / "start.py"
    script.write_text(f"""import dataclasses, os, sys
import data, dgpo, models, torch

odd = os.environ["RANK"] == "1"
cfg = data.cli(dgpo.Config, dgpo.PRESETS)
def tried(name, **more):
    run, text = None, ""
    try:
        run = data.Run(dataclasses.replace(cfg, **(more if odd else {{}})), "dgpo")
    except ValueError as error:
        text = str(error)
    with open(f"{{name}}-{{int(odd)}}", "w") as file:
        file.write(text)
    return run
tried("lr", lr=5e-3)
tried("resume", resume=True)
tried("where", micro_batch=3, reward_device="cpu", text_cache="there")
here, models.__file__ = models.__file__, {str(tmp_path / "old" / "models.py")!r} if odd else models.__file__
tried("code")
models.__file__ = here
run, load = tried("weights"), models.load
def other(*args):
    pipe = load(*args)
    with torch.no_grad():
        list(pipe.net.parameters())[-1].add_(.01 * odd)
    return pipe
models.load = other
try:
    data.load_policy(cfg, run)
except ValueError as error:
    with open(f"weights-{{int(odd)}}", "w") as file:
        file.write(str(error))
cfg.fsdp = True
tried("shards", micro_batch=3)
data.leave()
""")
    two = process(script, flags(), torchrun=True)
    _, err = two.communicate(timeout=600)
    assert two.returncode == 0, err
    words = {"lr": "--lr is 0.001 in process 0 and 0.005 in 1: start all", "resume": "--resume is False", "where": "",
             "code": "models.py is ", "weights": "give every machine the same --weights",
             "shards": "--micro-batch is "}
    for name, said in words.items():
        texts = {Path(f"{name}-{rank}").read_text() for rank in (0, 1)}
        assert len(texts) == 1 and said in (text := texts.pop()) and bool(said) == bool(text), (name, texts)


def test_processes_that_do_not_come_are_not_awaited_as_long_as_a_judge(monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    code = """import data, datetime
data.MEETING = datetime.timedelta(seconds=1)
with data.exit_codes():
    data.join("cpu")"""
    one = process("-c", [code])
    _, err = one.communicate(timeout=100)
    assert one.returncode == 1 and "Traceback" not in err
    assert re.search(r"^stopped \(process 0 of 2, .+\): another process ended, or hangs: .*(1/2|timeout)", err, re.M)


def test_processes_stop_after_a_torchrun_that_is_killed(flags):
    two = process(ROOT / "dgpo.py", flags(steps=100000, minutes=2, out="out"), torchrun=True)
    until, file = time.time() + 60, Path("out/metrics.jsonl")
    while two.poll() is None and time.time() < until and not (file.exists() and file.stat().st_size):
        time.sleep(.05)
    two.kill()
    out, err = two.communicate(timeout=60)                             # they have the other ends of these pipes
    steps = json.loads(out.splitlines()[-1])["steps"]
    assert torch.load("out/last/state.pt", weights_only=True)["count"]["step"] == steps < 100000, err


# ============================================================================================================= overlap

def scoring_of(score, overlap, device="cpu"):
    """data.Scoring of one process, and what it says in a list."""
    said = []
    run = types.SimpleNamespace(device=torch.device(device), constant=False, gather=lambda x: x, say=said.append,
                                lap=id, cfg=types.SimpleNamespace(reward="mine", reward_mix="reward", group_size=4,
                                                               overlap=overlap))
    return data.Scoring(run, score), said


@pytest.mark.parametrize("module", (dgpo, grpo, slas))
def test_overlap_changes_no_number(module, flags):
    """Four chunks of a group each, scored by the thread and between the rollouts: equal, bit for bit."""
    settings = dict(groups=4, micro_batch=4, steps=3, reward="slow", eval_every=2)
    (_, rows, state), (_, plain, other) = (run(module, flags(out=str(overlap), overlap=overlap, **settings))
                                           for overlap in (True, False))
    assert same(without_seconds(rows), without_seconds(plain)) and same(state, other)
    assert [row["rewards"] != {} for row in rows] == [True] * 3


@pytest.mark.parametrize("overlap", (True, False))
def test_a_chunk_is_scored_while_the_next_is_sampled(overlap):
    """In the order of the chunks, one at a time; NaN stays where it is, for two rollouts in a row."""
    sampled, seen, main = threading.Event(), [], threading.current_thread()

    def score(images, prompts, metas):
        if overlap and prompts == ["0", "0"]:
            assert sampled.wait(60)
        seen.append((prompts[0], threading.current_thread() is main))
        score.values = {"a": images[:, 0, 0, 0], "b": images[:, 1, 0, 0]}
        return images[:, 0, 0, 0]
    score.weights, score.rewards = {"a": 1.0, "b": 0.0}, {}
    scoring, said = scoring_of(score, overlap)
    for start in (0, 100):
        seen.clear()
        chunks = [torch.arange(24.).view(2, 3, 2, 2) + start + 24 * i for i in range(6)]
        chunks[1][1, 0, 0, 0] = math.nan
        for i, chunk in enumerate(chunks):
            scoring.add(chunk, [str(i)] * 2, [{}] * 2)
            assert len(seen) == i + 1 if not overlap else start or not seen        # the first waits for the last
        sampled.set()
        reward, images = scoring.result(), scoring.images
        assert seen == [(str(i), not overlap) for i in range(6)]
        assert same([images.nan_to_num(-1), reward.nan_to_num(-1)],
                    [torch.cat(chunks).nan_to_num(-1), torch.cat(chunks)[:, 0, 0, 0].nan_to_num(-1)])
        terms, first = scoring.terms(), torch.cat(chunks)[:, :2, 0, 0]
        assert terms["b"] == {"mean": first[:, 1].mean().item(), "weight": 0.0,
                              "std": pytest.approx(first[:, 1].std(correction=0).item())}
        assert terms["a"]["mean"] == pytest.approx(first[:, 0].nanmean().item())
    assert not said
    for _ in range(2):
        scoring.add(torch.ones(2, 3, 2, 2), ["x"] * 2, [{}] * 2)
        assert scoring.result().tolist() == [1, 1]
    assert len(said) == 1 and "the reward mine is 1 for every image" in said[0]


def test_rewards_are_mixed_by_their_advantages():
    """--reward-mix advantage: sum_k w_k (r_k - mean_g) / (std_g + 1e-4), in float64 numpy; scales say nothing."""
    rng = np.random.default_rng(0)
    raw = {"a": rng.normal(size=12), "b": 100 * rng.normal(size=12), "c": np.repeat([1., 2., 3.], 4)}
    raw["b"][5], weights = np.inf, {"a": .5, "b": 2., "c": 7.}         # an image that one of the terms could not score
    terms = {name: torch.tensor(value, dtype=torch.float32) for name, value in raw.items()}

    def score(images, prompts, metas):
        images = [int(prompt) for prompt in prompts]
        score.values = {name: value[images] for name, value in terms.items()}
        return sum(weights[name] * value for name, value in score.values.items())
    score.weights, expected = weights, np.zeros(12)
    for name, value in raw.items():
        value = np.where(np.isfinite(value), value, np.nan).reshape(3, 4)
        std = np.nanstd(value, 1, keepdims=True) + 1e-4
        expected += weights[name] * ((value - np.nanmean(value, 1, keepdims=True)) / std).flatten()
    scoring, _ = scoring_of(score, False)
    scoring.run.cfg.reward_mix = "advantage"
    for some in (range(8), range(8, 12)):                              # two chunks, of two groups and of one
        scoring.add(torch.zeros(len(some), 3, 2, 2), [str(i) for i in some], [{}] * len(some))
    mixed = scoring.result()
    np.testing.assert_allclose(mixed.numpy(), expected, rtol=1e-5, atol=1e-5)              # NaN at 5 in both
    torch.testing.assert_close(grpo.group_advantage(mixed, 4, "none")[8:], mixed[8:])      # as MixGRPO's, by no std
    assert scoring.terms()["b"]["std"] > 50 and scoring.reward[0] == pytest.approx(        # what is logged stays raw
        sum(weights[name] * raw[name][0] for name in raw), rel=1e-5)


def test_a_failure_in_the_thread_is_the_same_and_stops_the_next_chunk():
    def score(images, prompts, metas):
        if prompts == ["bad"]:
            raise KeyError("no such judge")
        return images[:, 0, 0, 0]
    image, said = torch.zeros(1, 3, 2, 2), []
    for overlap in (True, False):
        scoring, _ = scoring_of(score, overlap)
        scoring.add(image, ["good"], [{}])
        with pytest.raises(ValueError) as error:
            scoring.add(image, ["bad"], [{}])
            while not scoring.parts[-1].done():
                time.sleep(.01)
            scoring.add(image, ["good"], [{}])
        said.append(str(error.value))
    scoring, _ = scoring_of(score, True)
    scoring.add(image, ["bad"], [{}])                                  # the last chunk: no other one finds it
    with pytest.raises(ValueError) as error:
        scoring.result()
    line = score.__code__.co_firstlineno + 2
    assert {*said, str(error.value)} == {f"the reward mine failed: KeyError: 'no such judge' ({__file__}:{line})"}


def test_a_reward_that_is_long_in_coming_is_said(capsys, monkeypatch):
    monkeypatch.setattr(data.Scoring, "LONG", .2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for seconds in (1, 0):
        scoring, _ = scoring_of(lambda images, prompts, metas: time.sleep(seconds) or images[:, 0, 0, 0], True)
        scoring.add(torch.rand(2, 3, 2, 2), ["a", "a"], [{}, {}])
        assert len(scoring.result()) == 2
        assert ("waiting (process 0 of 2" in capsys.readouterr().err) == (seconds == 1)


@pytest.mark.parametrize("overlap", (True, False))
def test_a_reward_that_runs_out_of_memory_says_so(overlap):
    """In its own kind, for which exit_codes knows what helps, from the thread, too."""
    def score(images, prompts, metas):
        raise torch.OutOfMemoryError("CUDA out of memory")
    scoring, _ = scoring_of(score, overlap)
    with pytest.raises(torch.OutOfMemoryError):
        scoring.add(torch.zeros(1, 3, 2, 2), ["a"], [{}])
        scoring.result()


def test_a_failure_with_chunks_in_the_queue_is_an_error_like_others(flags, capsys):
    """The process is not ended under its caller, a notebook say, where no reward runs any more."""
    Path("fails.py").write_text("import time\n\n\ndef score(images, prompts, metas):\n    time.sleep(.2)\n"
                                "    raise KeyError\n")
    with pytest.raises(SystemExit) as end:
        dgpo.main([*flags(overlap=True, micro_batch=4, groups=8), "--reward", "fails.py:score"])
    assert end.value.code == 2 and "the reward fails.py:score failed: KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("ends, status, words", (
    ("lambda self: data.masked('mine', torch.full((8,), torch.nan))", 2, "error: the reward mine gave NaN"),
    ("lambda self: (_ for _ in ()).throw(KeyboardInterrupt)", 130, "interrupted"),
    ("lambda self: (_ for _ in ()).throw(RuntimeError('a bug'))", 1, "RuntimeError: a bug")))
def test_a_run_that_ends_early_waits_for_no_reward(flags, ends, status, words):
    """Two chunks, a minute each; left to itself the thread would score both before the process may end."""
    Path("hangs.py").write_text("import time\n\n\ndef score(images, prompts, metas):\n    time.sleep(60)\n"
                                "    return images.mean((1, 2, 3))\n")
    code = f"import sys, torch, data, dgpo; data.Scoring.result = {ends}; dgpo.main(sys.argv[1:])"
    line = [*flags(overlap=True, micro_batch=4), "--reward", "hangs.py:score"]
    child = subprocess.Popen([sys.executable, "-c", code, *line], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
    said = child.communicate(timeout=50)[1]
    assert child.returncode == status and words in said and ("Traceback" in said) == (status == 1), said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda device: needs a gpu")
def test_cuda_streams_wait_for_each_other():
    """The thread's stream waits for a chunk that the GPU has still to make, and both ways give the same bits."""
    weight = torch.randn(4096, 4096, device="cuda") / 64

    def chunk(i):                                                      # tens of milliseconds behind the CPU
        x = torch.full((4096, 4096), float(i + 1), device="cuda")
        for _ in range(20):
            x = (x @ weight).tanh()
        return x[:12].reshape(4, 3, 64, 64).clone()

    def score(images, prompts, metas):
        return (images.flatten(1) @ images.flatten(1).T).sum(1)
    results = []
    for overlap in (True, False):
        scoring, _ = scoring_of(score, overlap, "cuda:0")             # with its number, as a run's
        for i in range(8):
            scoring.add(chunk(i), ["a"] * 4, [{}] * 4)
        results.append([scoring.result(), scoring.images])
    assert same(*results) and results[0][0].std() > 0


# ====================================================================================================== kill and resume

class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.mark.parametrize("module, more", ((dgpo, {}), (grpo, {}), (grpo, dict(lora_rank=2))))
def test_killed_at_every_write_and_resumed(module, more, flags, monkeypatch):
    """Killed at each fsync and each replace in turn, resumed each time: the same bits as a run that was left alone."""
    settings = dict(steps=5, save_every=2, eval_every=2, **more)
    _, rows, state = run(module, flags(out="whole", **settings))
    fsync, replace, left = os.fsync, os.replace, 0

    def bomb(function):
        def call(*args):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*args)
        return call
    monkeypatch.setattr(os, "fsync", bomb(fsync))
    monkeypatch.setattr(os, "replace", bomb(replace))
    kills, line = 0, flags(out="killed", **settings)
    while True:                                                        # each life gets one write further than the last
        left = kills // 2 + 1 if kills < 24 else 11 + kills % 8        # a first checkpoint is the writes 7 to 12
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                module.main(line + ["--resume"] * (kills > 0 and Path("killed/config.json").exists()))
            break
        except Killed:
            kills += 1
            if Path("killed/last/state.pt").exists():
                for name in data.Run.FILES:                            # a row that was not written to its end
                    with open(f"killed/{name}", "a") as f:
                        f.write('{"step": 99, "rew')
            elif not Path("killed/config.json").exists():
                for path in sorted(Path("killed").rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
        assert kills < 60
    assert kills >= 20
    assert without_seconds(map(json.loads, open("killed/metrics.jsonl"))) == without_seconds(rows)
    assert without_seconds(evals("killed")) == without_seconds(evals("whole"))
    assert same(torch.load("killed/last/state.pt", weights_only=True), state)


@BOTH
def test_kill_9_at_random_moments_and_resume(module, flags):
    settings = dict(steps=8, save_every=2, eval_every=3, reward="slow")
    _, rows, state = run(module, flags(out="whole", **settings))
    rng, kills, file = random.Random(7), 0, Path("killed/metrics.jsonl")
    line = flags(out="killed", **settings)
    for life in range(4):
        resume = ["--resume"] * Path("killed/config.json").exists()
        child = process(ROOT / f"{module.__name__}.py", line + resume)
        if life < 3:
            wait, end = rng.randrange(1, 3), time.time() + 600
            while child.poll() is None and time.time() < end:          # some rows further on, then any moment
                if file.exists() and file.stat().st_size and \
                        len(file.read_text().splitlines()) >= wait + 2 * life:
                    break
                time.sleep(.005)
            time.sleep(rng.random() * .1)
            child.kill()
        out, err = child.communicate(timeout=600)
        kills += child.returncode == -signal.SIGKILL
    assert child.returncode == 0 and kills == 3, err
    assert json.loads(out.splitlines()[-1])["steps"] == 8
    assert without_seconds(map(json.loads, open(file))) == without_seconds(rows)
    assert without_seconds(evals("killed")) == without_seconds(evals("whole"))
    assert same(torch.load("killed/last/state.pt", weights_only=True), state)


@BOTH
def test_resume_goes_on_with_more_steps(module, flags, capsys):
    _, rows, state = run(module, flags(out="whole", steps=4, eval_every=1))
    run(module, flags(out="parts", steps=1, eval_every=1))
    with open("parts/times.jsonl", "a") as file:
        file.write('{"step": 2, "rest": 1.0}\n{"step": 3, "ro')            # of steps that a kill has lost
    last, again, other = run(module, flags(out="parts", steps=4, eval_every=1) + ["--resume"])
    assert same(state, other) and without_seconds(again) == without_seconds(rows) and last["steps"] == 4
    seconds = [row["seconds"] for row in again]
    assert seconds == sorted(seconds)
    times = [json.loads(line) for line in Path("parts/times.jsonl").read_text().splitlines()]
    assert [row["step"] for row in times] == [1, 2, 3, 4] and all("update" in row for row in times)
    assert without_seconds(evals("parts")) == without_seconds(evals("whole"))
    for name in data.Run.FILES:
        whole = Path("parts", name).read_bytes()
        Path("parts", name).write_bytes(whole[:20])
        with pytest.raises(SystemExit):
            run(module, flags(out="parts", steps=5, eval_every=1) + ["--resume"])
        assert f"parts/{name} lacks rows" in capsys.readouterr().err
        Path("parts", name).write_bytes(whole)


@BOTH
def test_ctrl_c_saves_and_ends_well(module, flags):
    last, rows, state = run(module, flags(steps=100000, save_every=1000, reward="interrupts"))
    assert last["steps"] == 3 and state["count"]["step"] == 3 and rows[-1]["step"] == 3
    assert evals("out")[-1]["split"] == "test" and evals("out")[-1]["step"] == 3
    _, _, whole = run(module, flags(out="whole", steps=3, reward="red"))
    assert same(state["params"], whole["params"])


def test_ctrl_c_at_a_terminal_exits_with_0(flags):
    child = process(ROOT / "grpo.py", flags(steps=100000, out="out"))
    end, file = time.time() + 600, Path("out/metrics.jsonl")
    while time.time() < end and not (file.exists() and len(file.read_text().splitlines()) > 3):
        time.sleep(.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=600)
    last = json.loads(out.splitlines()[-1])
    assert child.returncode == 0 and "Traceback" not in err
    assert torch.load("out/last/state.pt", weights_only=True)["count"]["step"] == last["steps"] >= 3


def test_ctrl_c_before_the_first_step_ends_at_once(flags):
    """There is nothing to save and nothing to evaluate. The process dies of the signal, so that a shell's loop ends."""
    Path("stops.py").write_text("""import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)               # which a shell's background jobs ignore


def score(images, prompts, metas):
    os.kill(os.getpid(), signal.SIGINT)
    return images.mean((1, 2, 3))
""")
    child = process(ROOT / "dgpo.py", [*flags(eval_every=1), "--eval-reward", "stops.py:score"])
    _, err = child.communicate(timeout=600)
    assert child.returncode == -signal.SIGINT and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert not Path("out/evals.jsonl").read_text() and not Path("out/last/state.pt").exists()


@BOTH
def test_resume_takes_what_is_not_typed_from_the_run(module, flags):
    """--out and --resume are enough; what only says where, and in what portions, may change."""
    _, rows, state = run(module, flags(out="whole", steps=3))
    run(module, flags(out="parts", steps=1))
    _, again, other = run(module, ["--out", "parts", "--resume", "--steps", "3"])
    assert same(state, other) and without_seconds(again) == without_seconds(rows)
    last, *_ = run(module, ["--out", "parts", "--resume", "--steps", "4", "--micro-batch", "4", "--offload"])
    assert last["steps"] == 4
    last, *_ = run(module, ["--out", "parts", "--resume"])             # and what was typed then holds, too
    assert last["steps"] == 4 and json.loads(Path("parts/config.json").read_text())["micro_batch"] == 4
    for file, steps in (("evals-1.jsonl", 1), ("evals-3.jsonl", 3), ("evals.jsonl", 4)):   # scores at ends before that
        tests = [row["step"] for row in map(json.loads, open(f"parts/{file}")) if row["split"] == "test"]
        assert tests == [0, steps], file


@BOTH
def test_the_weights_are_written_before_the_last_evaluation(module, flags, monkeypatch):
    """torchrun kills what has not ended half a minute after Ctrl-C, and bench wants the weights."""
    honest, there = data.evaluate, []
    monkeypatch.setattr(data, "evaluate", lambda *args: there.append(Path("out/lora.safetensors").is_file()) or
                        honest(*args))
    run(module, flags(lora_rank=4, eval_every=1))
    assert there == [False, False, False, True, True] and not Path("out/lora.safetensors.new").exists()


def test_a_full_disk_leaves_a_folder_that_can_be_used(flags, monkeypatch, capsys):
    """The write of config.json fails: one line that names the file, nothing half written, and the next start works."""
    def full(*args):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(os, "fsync", full)
        dgpo.main(flags())
    assert end.value.code == 2 and "cannot write out/config.json: No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in Path("out").iterdir()) == ["last", "samples"]
    assert run(dgpo, flags())[0]["steps"] == 2


def test_a_full_disk_in_torch_save(tmp_path):
    """torch.save raises a RuntimeError of its own over the OSError."""
    file = tmp_path / "state.pt"
    data.write_atomic(file, b"old")
    code = ("import resource, sys, torch, data; resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)); "
            "data.write_atomic(sys.argv[1], lambda f: torch.save(torch.zeros(10000), f))")
    done = subprocess.run([sys.executable, "-c", code, file], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert "ValueError: cannot write" in done.stderr.splitlines()[-1] and "File too large" in done.stderr
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*file/state.pt: Not a directory"):
        data.write_atomic(tmp_path / "file" / "state.pt", b"new")


def test_a_full_disk_under_the_metrics():
    run = types.SimpleNamespace(out=Path("/dev"))
    with pytest.raises(ValueError, match="cannot write /dev/full: No space left on device"):
        data.Run._append(run, "full", {"step": 1})


def test_a_sum_over_processes_leaves_what_it_sums(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2))
    run, x = types.SimpleNamespace(world=2, device=torch.device("cpu")), torch.ones(3)
    assert data.Run.sum(run, x).tolist() == [2, 2, 2] and x.tolist() == [1, 1, 1]


def test_what_parts_ways_is_kept_in_memory(tmp_path, monkeypatch):
    """The same as from the whole files at each evaluation, over a resume, and without rows that are not needed."""
    rng, cfg, said, seen = random.Random(0), grpo.Config(reward="a", eval_reward="b", gold_reward="c"), [], []
    run = object.__new__(data.Run)
    run.cfg, run.out, run.rank, run.device, run.before, run.start = cfg, tmp_path, 0, torch.device("cpu"), None, 0
    run.count, run.laps, run.mark = {"step": 0, "seconds": 0.0}, {}, 0
    monkeypatch.setattr(data.Run, "say", lambda self, text: said.append(text))

    def evaluation(step):
        return {"eval": rng.random(), "eval_error": .01, "eval_gold": .5 - .002 * step + .05 * rng.random(),
                "gold_error": 1 / 300, "tags": {"all": 1.0}}
    run.log_evals({"split": "val", **evaluation(0)})
    for step in range(1, 200):
        run.count["step"] = step
        row = {"reward": .001 * step + .02 * rng.random(), "loss": 0.0} | (evaluation(step) if step % 4 == 0 else {})
        if step % 4 == 0:
            start, before = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                             for name in ("evals.jsonl", "metrics.jsonl"))
            seen.append(bool(data.parting(start[:1] + before + [{**run.count, **row}])))
            run.log_evals({"split": "val", **row})
        run.log(row)
        assert len(run.before or ()) < 40
        run.before = None if step == 102 else run.before               # resumed
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["parted"] for row in rows if "parted" in row] == seen and {*seen} == {True, False}
    assert len(said) == sum(b and not a for a, b in zip([False, *seen], seen)) and 30 < len(run.before) < 40


def test_json_has_no_nan():
    row = data.finite({"a": math.nan, "b": {"c": [1.0], "d": -math.inf, "e": {"f": 2.5}}, "g": "NaN", "h": 1.25e-9,
                       "i": 1 / 3, "j": 3, "k": [1 / 3, math.nan, (math.inf, {"l": 2 / 3})]})
    assert row == {"a": None, "b": {"c": [1.0], "d": None, "e": {"f": 2.5}}, "g": "NaN", "h": 1.25e-9, "i": .333333333,
                   "j": 3, "k": [.333333333, None, [None, {"l": .666666667}]]}
    json.dumps(row, allow_nan=False)


def test_prompts_are_drawn_from_the_rows_at_hand():
    """Sorted by task once for the same rows, anew for others."""
    run = types.SimpleNamespace(tasks=(None, []), cfg=types.SimpleNamespace(groups=5, seed=3))
    for rows in ([{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "c", "tag": "x"}, {"prompt": "d"}]):
        for step in range(3):
            assert data.Run.drawn(run, rows, step) == data.draw_prompts(rows, 5, data.mix(3, step, "prompts"))


def test_a_reward_cannot_change_the_prompts():
    def greedy(images, prompts, metas):
        for meta in metas:
            meta["include"].clear()
        prompts.clear()
        return images.mean((1, 2, 3))
    prompts, metas = ["a", "b"], [{"include": [{"class": "dog"}]}] * 2
    data.scored("greedy", greedy, torch.rand(2, 3, 4, 4), prompts, metas)
    assert prompts == ["a", "b"] and metas == [{"include": [{"class": "dog"}]}] * 2


def test_weights_of_another_model_are_refused():
    for values in ([torch.ones(1)], [torch.ones(1), torch.ones(3)]):
        params = [torch.zeros(2, 3), torch.zeros(3)]
        with pytest.raises(ValueError, match="has its directory changed"):
            data.restore(params, values)
        assert not any(p.any() for p in params)


def test_before_a_run_has_begun_signals_end_it(flags, monkeypatch):
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    seen = []
    for place, name in (data.Run, "prepare"), (data, "evaluate"):     # texts are encoded; the start is scored
        monkeypatch.setattr(place, name, lambda *args, there=getattr(place, name): (seen.append(
            {name: signal.getsignal(name) for name in before}), there(*args))[1])
    done = data.Run.steps
    monkeypatch.setattr(data.Run, "steps", lambda self, *args, **more: (seen.append(signal.getsignal(signal.SIGTERM)),
                                                                        done(self, *args, **more))[1])
    run(dgpo, flags(eval_every=10))
    assert seen[:2] == [before, before] and seen[2] not in before.values()


@BOTH
def test_minutes_end_a_run(module, flags):
    last, *_ = run(module, flags(steps=100000, minutes=.01, reward="slow"))
    assert 1 <= last["steps"] < 100 and last["seconds"] < 600
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.main(flags(steps=9, minutes=1e-9, out="short"))         # over before it began: one step
    assert len(Path("short/metrics.jsonl").read_text().splitlines()) == 1
    assert "--minutes 1e-09 are over, after 1 of --steps 9\n" in said.getvalue()


# ================================================================================================= what a run leaves

@BOTH
def test_outputs(module, flags, random_model):
    last, rows, state = run(module, flags(steps=3, eval_every=2, cfg_also=3.0, updates=2))
    assert set(last) == {"method", "model", "eval_before", "eval_after", "eval_gold_before", "eval_gold_after",
                         "also_before", "also_after", "steps", "images", "seconds", "out"}
    assert last["steps"] == 3 and last["images"] == 24 and last["out"] == "out"
    assert last["method"] == {"dgpo": "dgpo", "grpo": "flow"}[module.__name__]
    counters = {"step", "updates", "images", "forwards", "backwards", "skipped", "seconds"}
    assert all(counters <= set(row) for row in rows)
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["updates"] for row in rows] == [2, 4, 6]
    like = {"dgpo": "dsm", "grpo": "ratio"}[module.__name__]
    assert all({"reward", "failed", "loss", "eval", "kl", like, "grad_norm", "stats"} <= set(row) for row in rows)
    assert [row["eval"] is None for row in rows] == [True, False, True]
    assert {"tags", "eval_error", "eval_gold", "gold_error", "parted"} <= set(rows[1])
    found = evals("out")
    assert [(row["split"], row["guidance"], row["step"]) for row in found] == [
        ("val", 1, 0), ("val", 1, 2), ("test", 1, 0), ("test", 3, 0), ("test", 1, 3), ("test", 3, 3)]
    assert all(counters | {"eval", "eval_error", "eval_gold", "gold_error", "tags"} <= set(row) for row in found)
    assert found[1]["eval"] == rows[1]["eval"] and found[1]["images"] == rows[1]["images"]
    assert [row["eval"] for row in found[2:]] == pytest.approx(
        [last[key] for key in ("eval_before", "also_before", "eval_after", "also_after")], abs=1e-4)
    assert found[2]["seconds"] == 0 < found[0]["seconds"] < found[1]["seconds"] < found[4]["seconds"] <= \
        rows[2]["seconds"] == found[5]["seconds"]
    saved = json.loads(Path("out/config.json").read_text())
    assert saved["steps"] == 3 and set(saved) == set(module.Config.__dataclass_fields__)
    times = [json.loads(line) for line in Path("out/times.jsonl").read_text().splitlines()]
    assert [row["step"] for row in times] == [row["step"] for row in rows]
    for row, before, after in zip(times[1:], rows, rows[1:]):          # the laps are all of the time there is
        taken = sum(value for key, value in row.items() if key != "step")
        assert taken == pytest.approx(after["seconds"] - before["seconds"], abs=.02)
    assert all(set(row) == {"step", "rollout", "reward", "update", "rest"} and min(row.values()) > 0
               for row in times)
    assert Path("out/samples/before_after.png").stat().st_size > 1000
    net = models.MMDiT.from_pretrained("out/transformer")              # the moving average, which was evaluated
    assert all(torch.equal(p, e) for p, e in zip(net.parameters(), state["ema"]))
    assert not list(Path("out").rglob("*.new"))


@pytest.mark.parametrize("module", (grpo, slas))
def test_groups_whose_rewards_are_all_alike_can_be_left_out(module, flags):
    """Every other group's are: left out, the mean is over half as many images, and no pass is made for them."""
    Path("half.py").write_text(
        "import itertools\n\ncalls = itertools.count()\n\n\ndef score(images, prompts, metas):\n"
        "    return images[:, 0].mean((1, 2)) * (next(calls) % 2)\n\n\ndef flat(images, prompts, metas):\n"
        "    return images.new_full((len(images),), .3)\n")
    more = dict(fisher_every=0, adv_std="none") if module is slas else {}
    rows = [run(module, [*flags(groups=4, updates=1, micro_batch=4, steps=1, out=f"out-{drop}", drop_constant=drop,
                                **more), "--reward", "half.py:score"])[1][0] for drop in (False, True)]
    assert rows[1]["grad_norm"] == pytest.approx(2 * rows[0]["grad_norm"], rel=1e-5)
    assert rows[0]["backwards"] == 2 * rows[1]["backwards"] > 0 and rows[1]["ratio"] == pytest.approx(1, abs=1e-5)
    Path("late.py").write_text(                                        # rollout 1's differ, rollout 2's do not
        "def score(images, prompts, metas):\n    score.calls += 1\n"
        "    return images[:, 0].mean((1, 2)) * (score.calls <= 4)\n\n\nscore.calls = 0\n")
    last, rows, _ = run(module, [*flags(groups=4, updates=2, micro_batch=4, steps=2, out="none", drop_constant=True,
                                        save_every=1, eval_every=0, **more), "--reward", "late.py:score"])
    assert last["steps"] == 2 and rows[1]["backwards"] == rows[0]["backwards"] > 0 and rows[1]["grad_norm"] is None
    assert rows[1]["updates"] == rows[0]["updates"] == 2                # AdamW's momentum moves nothing then


def test_the_last_step_of_dgpos_sde_adds_no_noise(random_model):
    pipe, seen = models.load("tiny", str(random_model)), []
    cfg = dgpo.Config(sde=True, sample_steps=4, group_size=2, weights=str(random_model))
    ctx, null = pipe.encode_text(["a ring"] * 2), pipe.encode_text([""])
    real = data.noises
    try:
        data.noises = lambda shape, keys, *more: seen.append(keys[0][-1]) or real(shape, keys, *more)
        dgpo.rollout(pipe, ctx, null, cfg, 0, range(1))
    finally:
        data.noises = real
    assert seen == ["start", "sde 0", "sde 1", "sde 2"]


@BOTH
def test_default_out_is_a_free_folder(module, flags):
    for number in ("001", "002"):
        last, *_ = run(module, [*flags(steps=1), "--out", ""])
        assert last["out"] == f"runs/{module.__name__}-{number}"


def test_evaluation_uses_the_moving_average(flags):
    """With a decay of almost 1 the average has not moved: neither has what is evaluated and saved. --ema 0: it has."""
    still, rows, _ = run(dgpo, flags(out="still", ema=1 - 1e-12, lr=1e-2, eval_every=1))
    assert still["eval_after"] == still["eval_before"] and rows[0]["eval"] == rows[1]["eval"]
    moved, rows, state = run(dgpo, flags(out="moved", ema=0, ref="start", lr=1e-2, eval_every=1))
    assert moved["eval_after"] != moved["eval_before"] and state["ema"] == []
    net = models.MMDiT.from_pretrained("moved/transformer")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), state["params"]))


def watched(monkeypatch):
    """A list that fills with (gradients, parameters after the step), float64 copies, one pair an update."""
    seen, update = [], data.Run.update

    def call(run, opt, params, *args):
        grads = [p.grad.double().clone() for p in params]
        norm = update(run, opt, params, *args)
        seen.append((grads, [p.detach().double().clone() for p in params]))
        return norm
    monkeypatch.setattr(data.Run, "update", call)
    return seen


@pytest.mark.parametrize("module, settings, decays", (
    (dgpo, dict(ema=.6), (.6, .6)), (dgpo, dict(ema=.1, ema_ramp=.2, steps=3), (0, .1, .1)),
    (grpo, dict(ema=.6), (.6, .6)), (grpo, dict(ema=.6, ema_every=2), (1, .6))),
    ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_the_moving_average(module, settings, decays, flags, random_model, monkeypatch):
    seen = watched(monkeypatch)
    _, _, state = run(module, flags(updates=1, dtype="float64", **settings))
    truth = list(models.load("", random_model, torch.float64).net.parameters())
    for decay, (_, params) in zip(decays, seen, strict=True):
        truth = [decay * e + (1 - decay) * p for e, p in zip(truth, params)]
    assert all((e - t).abs().max() < 1e-12 for e, t in zip(state["ema"], truth))
    assert any((e - p).abs().max() > 1e-4 for e, p in zip(state["ema"], state["params"]))


def test_the_updates_of_one_rollout_share_its_groups(flags, monkeypatch):
    """Flow-GRPO's gradient over all groups is the mean of those of its disjoint parts, where the weights stand
    still."""
    seen = watched(monkeypatch)
    for name, updates in (("one", 1), ("two", 2)):
        run(grpo, flags(out=name, steps=1, dtype="float64", lr=1e-14, updates=updates, micro_batch=4,
                        max_grad_norm=1e9))
    (whole, _), (a, _), (b, _) = seen
    assert all((w - (x + y) / 2).abs().max() < 1e-9 * w.abs().max() + 1e-12 for w, x, y in zip(whole, a, b))
    assert max((x - y).abs().max() for x, y in zip(a, b)) > 1e-3


@pytest.mark.parametrize("kind, form, detach", (
    ("flow", "gaussian", False), ("flow", "flow-grpo", True), ("dance", "velocity", False), ("cps", "gaussian", False)))
def test_an_update_of_grpo_by_hand(kind, form, detach, flags, random_model, monkeypatch):
    """Gradients of the whole guided objective of two updates, the Gaussians by torch.distributions; then AdamW."""
    seen, kept, honest = watched(monkeypatch), {}, {}
    for owner, name in ((data.Run, "groups"), (grpo, "rollout"), (grpo, "group_advantage")):
        honest[name] = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name: kept.setdefault(name, []).append(
            honest[name](*args)) or kept[name][-1])
    _, [row], state = run(grpo, flags(
        steps=1, groups=2, group_size=3, updates=2, micro_batch=2, sample_steps=5, train_steps=2, sde=kind,
        kl_form=form, cfg_detach=detach, kl_beta=3, clip_range=.01, noise_level=.5, cfg_rollout=2, cfg_train=2,
        cfg_ref=2, lr=1e-2, weight_decay=.1, max_grad_norm=.05, ema=.6, dtype="float64", schedule="sd3", shift=3.0))
    x = torch.cat([part[0] for part in kept["rollout"]], 1)
    (prompts, _), adv = kept["groups"][0], kept["group_advantage"][0]
    choice = data.uniform(5, 0, 0, "steps")
    trained = sorted(range(4), key=choice.__getitem__)[:2]             # never the last
    policy, reference = (models.load("", random_model, torch.float64) for _ in range(2))
    ts, null = policy.times(5, "sd3", 3.0), policy.encode_text([""])
    weights = list(policy.net.requires_grad_().parameters())
    hand, average = ([p.detach().clone() for p in weights] for _ in range(2))
    opt = torch.optim.AdamW(hand, lr=1e-2, weight_decay=.1)

    def gaussian(net, x, i, ctx):
        """The step's Gaussian, and v, as in Flow-GRPO, Eq. 9, DanceGRPO and Flow-CPS."""
        t, dt = ts[i], ts[i + 1] - ts[i]
        times = torch.full((len(x),), t, dtype=x.dtype)
        uncond = net(x, times, *(n.expand_as(c) for n, c in zip(null, ctx)))
        uncond = uncond.detach() if detach else uncond
        v = uncond + 2 * (net(x, times, *ctx) - uncond)
        clean, noise = x - t * v, x + (1 - t) * v
        if kind == "cps":
            std, rest = (ts[i + 1] * f(.25 * math.pi) for f in (math.sin, math.cos))
            return torch.distributions.Normal((1 - ts[i + 1]) * clean + rest * noise, std), v
        s = .5 * math.sqrt(t / (1 - (ts[1] if t == 1 else t))) if kind == "flow" else .5
        return torch.distributions.Normal(x + (v + s ** 2 / (2 * t) * noise) * dt, s * (-dt) ** .5), v
    sums = [0, 0]
    for u, (grads, after) in enumerate(seen):                          # each trains on one of the two groups
        own = slice(3 * u, 3 * u + 3)
        ctx, losses, kls = policy.encode_text(prompts[own]), [], []
        for i in trained:
            ours, v = gaussian(policy.net, x[i, own], i, ctx)
            with torch.no_grad():
                theirs, v_ref = gaussian(reference.net, x[i, own], i, ctx)             # it sampled, too
            ratio = (ours.log_prob(x[i + 1, own]) - theirs.log_prob(x[i + 1, own])).flatten(1).mean(1).exp()
            losses.append(-torch.minimum(ratio * adv[own], ratio.clamp(.99, 1.01) * adv[own]).mean())
            kls.append((v - v_ref).square().mean() if form == "velocity" else
                       torch.distributions.kl_divergence(ours, theirs).mean() *
                       (ts[i] - ts[i + 1] if form == "flow-grpo" else 1))
        loss, kl = sum(losses) / 2, sum(kls) / 2
        assert u == 0 or kl > 1e-6
        for p, want, g in zip(hand, torch.autograd.grad(loss + 3 * kl, weights, materialize_grads=True), grads):
            torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-9)
            p.grad = want
        sums = [total + value.item() / 2 for total, value in zip(sums, (loss, kl))]
        norm = torch.nn.utils.clip_grad_norm_(hand, .05).item()
        opt.step()
        for p, mine, a, b in zip(weights, hand, average, after):
            torch.testing.assert_close(b, mine)
            p.data.copy_(mine)
            a += .4 * (mine - a)
    assert [row["loss"], row["kl"]] == pytest.approx(sums, rel=1e-6) and row["grad_norm"] == pytest.approx(norm)
    assert all((a - e).abs().max() < 1e-9 for a, e in zip(average, state["ema"]))


# ============================================================================================================ counters

@contextlib.contextmanager
def counting(module, monkeypatch):
    """Count the images that pass the network forward and backward, outside evaluation and drawing."""
    seen, load, quiet = {"forwards": 0, "backwards": 0}, models.load, 0

    def forward(net, inputs, output):
        if not quiet:
            seen["forwards"] += len(inputs[0])
            if output.requires_grad:
                output.register_hook(lambda grad: seen.__setitem__("backwards", seen["backwards"] + len(grad)))

    def hooked(*args, **more):
        pipe = load(*args, **more)
        pipe.net.register_forward_hook(forward)
        return pipe

    def silent(function):
        def call(*args, **more):
            nonlocal quiet
            quiet += 1
            try:
                return function(*args, **more)
            finally:
                quiet -= 1
        return call
    with monkeypatch.context() as m:
        m.setattr(models, "load", hooked)
        m.setattr(module, "sample", silent(module.sample))
        yield seen


@pytest.mark.parametrize("settings", (
    dict(), dict(cfg_rollout=2.0), dict(cfg_train=2.0, cfg_ref=3.0, timesteps=2), dict(clip_range=.1, cfg_train=1.5),
    dict(method="diffusion-dpo", kl_beta=.1, updates=3, cfg_rollout=0.0), dict(sde=True, eval_every=1),
    dict(solver="dpm"), dict(hold=0.0), dict(t_min=0.0), dict(group_size=6, micro_batch=4),
    dict(kl_ref="start", cfg_ref=2.0)),
    ids=str)
def test_dgpo_counts_network_passes(settings, flags, monkeypatch):
    with counting(dgpo, monkeypatch) as seen:
        _, rows, _ = run(dgpo, flags(**settings))
    assert {key: rows[-1][key] for key in seen} == seen and seen["backwards"] > 0
    if not settings:                                                   # two rollouts of 8 images in 4 steps; 4 updates
        held = 2                                                       # each, policy and reference, one held in four
        assert seen == {"forwards": 2 * (8 * 4 + 4 * 2 * (8 + held)), "backwards": 2 * 4 * (8 + held)}


@pytest.mark.parametrize("settings", (
    dict(), dict(train_steps=0, cfg_rollout=2.0), dict(kl_beta=.1, cfg_ref=2.0, updates=1),
    dict(cfg_train=2.0, kl_beta=.1), dict(cfg_train=2.0, cfg_rollout=2.0, cfg_detach=True),
    dict(cfg_train=2.0, cfg_rollout=2.0), dict(window=2, eval_every=1), dict(sde="cps", window=4, train_steps=0)),
    ids=str)
def test_grpo_counts_network_passes(settings, flags, monkeypatch):
    """All but the check before the first update, which a resume repeats: each trained step scored once more."""
    with counting(grpo, monkeypatch) as seen:
        _, rows, _ = run(grpo, flags(**settings))
    train = 1 + (settings.get("cfg_train", 1) != 1)
    passes = 1 + settings.get("cfg_detach", False)                     # of a step scored, for each that is trained
    seen["forwards"] -= rows[0]["backwards"] * passes                  # 8 images, the first rollout's trained steps
    assert {key: rows[-1][key] for key in seen} == seen and seen["backwards"] % train == 0 and seen["backwards"] > 0
    if not settings:                                                   # two rollouts of 8 images; 3 of 4 steps trained
        assert seen == {"forwards": 2 * 8 * (4 + 3), "backwards": 2 * 8 * 3}


# ============================================================================================================== guards

@BOTH
@pytest.mark.parametrize("reward", ("some_nan", "some_inf"))
def test_a_few_failed_rewards_are_masked(module, reward, flags):
    settings = dict(groups=4, steps=2)
    last, rows, state = run(module, flags(reward=reward, eval_reward="some_nan", eval_images=32, **settings))
    assert [row["failed"] for row in rows] == [1, 1]
    assert all(math.isfinite(last[key]) for key in ("eval_before", "eval_after"))
    assert all(p.isfinite().all() for p in state["params"])
    _, _, clean = run(module, flags(out="clean", **settings))
    assert not same(state["params"], clean["params"])


@BOTH
def test_a_nan_gradient_is_skipped_and_training_goes_on(module, flags, monkeypatch):
    name = {"dgpo": "dgpo_loss", "grpo": "policy_loss"}[module.__name__]
    honest, updates = getattr(module, name), []
    step = torch.optim.AdamW.step

    def broken(*args):
        out = honest(*args)
        if len(updates) == 1:
            return out * math.nan if module is dgpo else (out[0] * math.nan, out[1])
        return out
    monkeypatch.setattr(module, name, broken)
    update = data.Run.update
    monkeypatch.setattr(data.Run, "update", lambda *args: (update(*args), updates.append(1))[0])
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    last, rows, state = run(module, flags(steps=3, updates=1))
    assert [row["skipped"] for row in rows] == [0, 1, 1] and len(steps) == 2 and state["count"]["updates"] == 3
    assert rows[1]["grad_norm"] is None and math.isfinite(rows[2]["grad_norm"])
    assert all(p.isfinite().all() for p in state["params"]) and math.isfinite(last["eval_after"])
    assert all(s["step"] == 2 for s in state["opt"]["state"].values())


def test_a_spike_is_skipped_and_the_norm_is_clipped(flags):
    """Run.update on its own: norms 1, then 19 (taken, clipped to 1), 21 and inf (skipped), each beside a median of
    1."""
    run = data.Run.__new__(data.Run)
    run.rank, run.world, run.norms, run.lap, run.count = 0, 1, [1.0] * 10, id, {"updates": 0, "skipped": 0}
    p = torch.nn.Parameter(torch.zeros(2))
    opt, skipped = torch.optim.SGD([p], lr=1.0), []
    for norm in (1.0, 19.0, 21.0, math.inf, math.nan, 1.0):
        p.data.zero_()
        p.grad = torch.tensor([norm, 0.0])
        assert run.update(opt, [p], 1.0) == pytest.approx(norm, nan_ok=True)
        skipped.append(run.count["skipped"])
        assert p[0].item() == pytest.approx(0.0 if norm > 20 or math.isnan(norm) else -1.0, abs=1e-5) and p.grad is None
    assert skipped == [0, 0, 1, 2, 3, 3] and run.count["updates"] == 6
    for _ in range(60):                                                # a rise that lasts is let through in the end
        p.grad = torch.tensor([100.0, 0.0])
        run.update(opt, [p], 1.0)
    assert 5 < run.count["skipped"] - 3 < 40 and statistics.median(run.norms) == 100
    with pytest.raises(ValueError, match="50 updates in a row were skipped, the last for a gradient norm of nan"):
        for _ in range(60):
            p.grad = torch.tensor([math.nan, 0.0])
            run.update(opt, [p], 1.0)
    assert run.in_a_row == 50


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not(capsys):
    """torchrun and job managers send SIGTERM twice, and a process that waits for its GPU handles both late."""
    run = data.Run.__new__(data.Run)
    run.stopping, run.rank = False, 0
    for name in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        run._stop(name, None)
    assert "stopping after this step" in capsys.readouterr().out
    run.stopping -= 2                                                  # two seconds ago
    run._stop(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        run._stop(signal.SIGINT, None)


def test_grpo_says_that_another_policy_is_trained_than_sampled(flags, capsys):
    for guidance, said in ((1.0, "before the first update the worst |ratio - 1| is"),
                           (2.0, "--cfg-train 1 is not --cfg-rollout 2")):
        grpo.main(flags(out=str(guidance), cfg_rollout=guidance))
        out = capsys.readouterr().out
        assert out.count("|ratio - 1|") == 1 and said in out


def test_grpo_says_that_the_reference_has_another_guidance(flags, capsys):
    for settings, said in (({}, False), (dict(cfg_ref=3.0), False), (dict(kl_beta=.1), False),
                           (dict(kl_beta=.1, cfg_ref=3.0), True)):
        grpo.main(flags(out=str(settings), steps=1, **settings))
        assert ("--cfg-ref 3 is not --cfg-train 1" in capsys.readouterr().out) == said


def test_a_resume_by_other_ops_says_so(flags, capsys):
    dgpo.main(flags(steps=1))
    state = torch.load("out/last/state.pt", weights_only=True)
    torch.save(state | {"ops": "fused ops: of another machine"}, "out/last/state.pt")
    capsys.readouterr()
    dgpo.main(flags(steps=2) + ["--resume"])
    assert "until here fused ops: of another machine, from here fused ops: " in capsys.readouterr().out


@BOTH
def test_few_steps_encode_their_prompts_alone(module, flags, monkeypatch):
    """FLUX takes 4 MB a prompt: 2 steps of 2 groups want 4 of the training prompts, many steps all of them."""
    prepared, asked, encode = [], set(), models.TextToImage.encode_text
    monkeypatch.setattr(models.TextToImage, "prepare", lambda self, prompts, *_: prepared.append(set(prompts)))
    monkeypatch.setattr(models.TextToImage, "encode_text", lambda self, prompts: (asked.update(prompts),
                                                                                  encode(self, prompts))[1])
    run(module, flags())
    assert asked <= prepared[0] and len(prepared[0]) < 40
    run(module, flags(out="b", steps=10000, minutes=1e-9))
    assert {row["prompt"] for row in data.prompts("shapes", "train")} <= prepared[1]


def test_features_that_another_machine_keeps_to_itself(monkeypatch):
    monkeypatch.setattr(data.dist, "barrier", lambda: None)
    one = data.Run.__new__(data.Run)
    one.cfg, one.rank, one.world = types.SimpleNamespace(text_cache=""), 0, 2
    one.pipe = types.SimpleNamespace(prepare=lambda *_: None, is_kept=lambda prompt: prompt != "a", folder="here")
    with pytest.raises(ValueError, match="here lacks what another process encoded"):
        one.prepare([{"prompt": "b"}, {"prompt": "a"}])
    one.pipe.is_kept = lambda prompt: True
    one.prepare([{"prompt": "b"}, {"prompt": "a"}])


def test_groups_that_keep_processes_waiting_are_said(monkeypatch, capsys):
    """Of 16 processes with a group each, each update is eight's; DGPO's updates are on all groups."""
    monkeypatch.setattr(data.Run, "prepare", lambda *_: None)
    monkeypatch.setattr(data.Run, "make_out", lambda *_: None)
    for groups, more, said in ((16, {"train_steps": 3}, True), (32, {"train_steps": 3}, False), (16, {}, False)):
        one = data.Run.__new__(data.Run)
        one.cfg = types.SimpleNamespace(groups=groups, updates=2, steps=10 ** 6, eval_every=0, **more)
        one.rank, one.world, one.state, one.test, one.val = 0, 16, None, [], []
        one.begin(None, None, None, None, None, [{"prompt": "a"}])
        assert ("with --groups 32 none would" in capsys.readouterr().out) == said


def test_no_pass_is_larger_than_the_micro_batch(flags, monkeypatch):
    """Of the network, training and rolling out, even where a group is larger."""
    sizes, forward = set(), models.MMDiT.forward
    monkeypatch.setattr(models.MMDiT, "forward", lambda net, x, *args: sizes.add(len(x)) or forward(net, x, *args))
    for module in (dgpo, grpo, slas):
        for settings in {dgpo: (dict(), dict(sde=True)), grpo: (dict(),), slas: (dict(fisher_every=0),)}[module]:
            sizes.clear()
            run(module, flags(out=f"{module.__name__}{settings}", steps=1, group_size=5, micro_batch=2, **settings))
            assert sizes == {1, 2}


def test_pairs_are_chosen_before_advantages_are_cut(flags):
    one, two = (run(dgpo, flags(out=f"{cut}", method="diffusion-dpo", adv_clip=cut))[2] for cut in (5.0, .1))
    assert same(one["params"], two["params"])


def test_grpo_refuses_ratios_that_are_off(flags, monkeypatch, capsys):
    """Log-probs that the same weights do not give again: the run must not start to learn from them."""
    honest = grpo.rollout

    def off(*args):
        x, logp, clean = honest(*args)
        return x, {i: v + 1e-3 for i, v in logp.items()}, clean
    monkeypatch.setattr(grpo, "rollout", off)
    with pytest.raises(SystemExit) as end:
        grpo.main(flags())
    err = capsys.readouterr().err
    assert end.value.code == 2 and all(word in err for word in ("|ratio - 1|", "1.0e-03", "--clip-range"))


# =============================================================================================================== modes

def moved(state, random_model):
    start = models.load("", random_model).net.parameters()
    return max((p - q).abs().max().item() for p, q in zip(state["params"], start))


DGPO_MODES = (
    dict(), dict(solver="dpm"), dict(solver="dpm", schedule="dpm", shift=3.0),
    dict(sde=True, schedule="sd3", shift=3.0),
    dict(ref="ema"), dict(ref="old"), dict(rollout="ema"), dict(rollout="ema", rollout_after=2, ema_ramp=.01),
    dict(rollout="start"), dict(method="diffusion-dpo"), dict(method="diffusion-dpo", rollout="start"),
    dict(clip_range=.01), dict(clip_range=.01, clip_old="ema"), dict(kl_beta=1.0), dict(grid=True), dict(timesteps=2),
    dict(grid=True, timesteps=3, t_min=0.0), dict(dsm="x0"), dict(dsm="elbo", t_min=.1), dict(cfg_rollout=3.0),
    dict(cfg_train=2.0), dict(cfg_ref=2.0), dict(cfg_eval=2.0), dict(adv_std="batch"), dict(adv_std="none"),
    dict(updates=1), dict(ema=0, ref="start"), dict(micro_batch=4), dict(resolution=8), dict(dtype="bfloat16"),
    dict(fused=False))
GRPO_MODES = (
    dict(), dict(sde="dance"), dict(sde="cps"), dict(schedule="sd3", shift=3.0), dict(schedule="dpm", shift=3.0),
    dict(window=1), dict(window=2), dict(window=4), dict(window=1, sde="cps"), dict(train_steps=0), dict(train_steps=1),
    dict(train_steps=0, sde="cps"), dict(sample_steps=1, train_steps=1), dict(kl_beta=.1),
    dict(kl_beta=.1, kl_form="gaussian"), dict(kl_beta=.1, kl_form="velocity"), dict(updates=1), dict(updates=2),
    dict(adv_std="batch"), dict(adv_std="none"), dict(cfg_rollout=2.0, cfg_train=2.0), dict(cfg_rollout=2.0),
    dict(cfg_ref=2.0, kl_beta=.1), dict(cfg_eval=2.0), dict(ema=0), dict(ema_every=2), dict(micro_batch=4),
    dict(solver="dpm"), dict(resolution=8), dict(fused=False))


@pytest.mark.parametrize("module, settings", [(dgpo, s) for s in DGPO_MODES] + [(grpo, s) for s in GRPO_MODES],
                         ids=lambda value: getattr(value, "__name__", None) or str(value))
def test_every_mode_trains(module, settings, flags, random_model):
    settings = {"eval_steps": 1, "eval_images": 2, **settings}
    last, rows, state = run(module, flags(**settings))
    assert last["steps"] == 2 and rows[1]["failed"] == 0 and rows[1]["skipped"] == 0
    assert all(math.isfinite(rows[1][key]) for key in ("loss", "kl", "grad_norm")) and rows[1]["grad_norm"] > 0
    assert all(p.isfinite().all() for p in state["params"])
    assert moved({"params": [p.float() for p in state["params"]]}, random_model) > 1e-4


@BOTH
def test_compiled_ops_and_their_twins_train_the_same(module, flags):
    (_, a, _), (_, b, _) = (run(module, flags(out=str(fused), fused=fused, cfg_rollout=2.0, cfg_train=2.0, steps=1))
                            for fused in (True, False))
    assert a[0]["reward"] == pytest.approx(b[0]["reward"], abs=1e-5)
    assert a[0]["grad_norm"] == pytest.approx(b[0]["grad_norm"], rel=1e-3)


@BOTH
def test_micro_batches_do_not_change_the_gradient(module, flags):
    states = [run(module, flags(out=str(n), micro_batch=n, dtype="float64", groups=3,
                                updates=1))[2] for n in (3, 4, 8, 96)]
    for other in states[1:]:
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(states[0]["params"], other["params"]))


def test_the_first_step_of_one_mode_is_that_of_another(flags):
    """Modes that must agree: a clip too wide to matter, a reference or a rollout that has not moved, a window of
    all."""
    def first(module, name, **settings):
        return run(module, flags(out=name, **{"steps": 1, "updates": 1, **settings}))[2]["params"]
    plain = first(dgpo, "plain")
    for name, settings in dict(clip=dict(clip_range=50.0), ema=dict(ref="ema"), old=dict(ref="old"),
                               offline=dict(rollout="start"), later=dict(rollout="ema", rollout_after=5)).items():
        assert same(first(dgpo, name, **settings), plain), name
    for name, settings in dict(dpo=dict(method="diffusion-dpo"), two=dict(timesteps=2), grid=dict(grid=True),
                               x0=dict(dsm="x0"),
                               batch=dict(adv_std="batch"), scale=dict(cfg_ref=2.0), noisy=dict(sde=True)).items():
        assert not same(first(dgpo, name, **settings), plain), name
    for ref, alike in (("start", True), ("ema", False)):               # the KL's anchor, once the two have parted
        pair = [first(dgpo, ref + kl, steps=3, ref=ref, kl_beta=1.0, kl_ref=kl) for kl in ("ref", "start")]
        assert same(*pair) == alike
    whole = first(dgpo, "three", steps=3)                              # the rollout's weights: the ratio is exactly 1
    assert same(first(dgpo, "close", steps=3, clip_range=1e-6), whole)
    assert not same(first(dgpo, "far", steps=3, clip_range=1e-6, clip_old="ema"), whole)
    plain = first(grpo, "grpo", train_steps=0)
    assert same(first(grpo, "window", train_steps=0, window=4), plain)
    for name, settings in dict(part=dict(train_steps=1), some=dict(window=2), dance=dict(sde="dance"),
                               std=dict(adv_std="batch")).items():
        assert not same(first(grpo, name, **{"train_steps": 0, **settings}), plain), name


def test_a_kl_holds_the_velocity(flags):
    """The distance to the reference, measured alike in both runs, ends far lower where it is in the loss."""
    settings = dict(steps=10, lr=3e-3, updates=2, ref="start")
    free, held = (run(dgpo, flags(out=str(beta), kl_beta=beta, **settings))[1][-2]["kl"] for beta in (0, 100.0))
    assert 0 < held < free / 10, (free, held)
    settings = dict(steps=10, lr=3e-3, updates=2)
    for form in ("flow-grpo", "gaussian", "velocity"):
        free, held = (run(grpo, flags(out=form + str(beta), kl_beta=beta, kl_form=form, **settings))[1][-2]["kl"]
                      for beta in (1e-9, 100.0))
        assert 0 < held < free / 10, (form, free, held)


def test_the_times_below_the_clip_are_held(flags, random_model, monkeypatch):
    """hold sees a quarter of each group at times below hold_below, is 0 until the weights move, and keeps them near the
    start where it is in the loss."""
    seen, honest, start = [], dgpo.guided, models.load("", random_model).net

    def spy(net, x_t, t, ctx, null, scale):
        v = honest(net, x_t, t, ctx, null, scale)
        if v.requires_grad and t.max() < .5:                           # of learn's draws none is
            with torch.no_grad():
                seen.append((t, (v - start(x_t, t, *ctx)).pow(2).mean((1, 2, 3))))
        return v
    monkeypatch.setattr(dgpo, "guided", spy)
    settings = dict(steps=10, lr=3e-3, updates=2, group_size=6, micro_batch=4, hold_below=.4)
    free, held = (run(dgpo, flags(out=str(hold), hold=hold, **settings))[1] for hold in (1e-9, 100.0))
    means = torch.cat([error for _, error in seen]).view(2, 10, -1).mean(2)            # of a step, by the formula
    assert torch.allclose(means, torch.tensor([[row["hold"] for row in rows] for rows in (free, held)]), atol=2e-6)
    assert 0 < held[-2]["hold"] < free[-2]["hold"] / 5
    t = torch.cat([t for t, _ in seen])
    assert len(t) == 2 * 10 * 2 * 2 * 2 and 0 <= t.min() < .05 and .35 < t.max() < .4  # runs, steps, updates, groups
    assert (seen[0][1] == 0).all() and (seen[-1][1] > 0).all()
    monkeypatch.setattr(dgpo, "hold", None)
    for name, settings in dict(off=dict(hold=0.0), all=dict(t_min=0.0)).items():       # no time that is not trained
        assert run(dgpo, flags(out=name, **settings))[1][-2]["hold"] == 0


@BOTH
def test_lora(module, flags, random_model):
    """Only the LoRA is trained, from an unchanged network; the file gives another network the trained one's weights."""
    last, rows, state = run(module, flags(lora_rank=4, lora_alpha=8.0, lr=1e-2, steps=3, ema=.1))
    assert not Path("out/transformer").exists() and last["eval_after"] != last["eval_before"]
    x, t, context, pooled = (torch.randn(2, 3, 12, 12), torch.tensor([.3, .9]), torch.randn(2, 16, 32),
                             torch.randn(2, 32))
    net = models.load("", random_model).net
    base = net(x, t, context, pooled)
    params = models.add_lora(net, 4, 8.0, models.MMDiT.lora_targets)
    assert torch.equal(net(x, t, context, pooled), base)
    for p, value in zip(params, state["ema"], strict=True):            # what was evaluated
        p.data.copy_(value)
    trained = net(x, t, context, pooled)
    assert (trained - base).abs().max() > 1e-3
    other = models.load("", random_model).net                          # what was written
    models.add_lora(other, 4, 8.0, models.MMDiT.lora_targets)
    models.load_lora(other, "out/lora.safetensors")
    torch.testing.assert_close(other(x, t, context, pooled), trained, rtol=1e-5, atol=1e-6)
    assert Path("out/last/lora.safetensors").read_bytes() == Path("out/lora.safetensors").read_bytes()


@BOTH
def test_a_checkpoint_holds_the_lora_that_the_run_would_end_with(module, flags, monkeypatch):
    save, found = data.Run.save, []
    run(module, flags(lora_rank=4, out="short"))
    monkeypatch.setattr(data.Run, "save", lambda self, *args: (save(self, *args), found.append(
        (self.out / "last" / "lora.safetensors").read_bytes())))
    run(module, flags(lora_rank=4, out="long", steps=3, save_every=2))
    assert found[0] == Path("short/lora.safetensors").read_bytes() != found[1]


def no_swap_before_backward(network, monkeypatch):
    """Fail where other weights come and go between a network's pass with gradients and its backward pass: FSDP2 gathers
    shards again for that one, on a stream that waits for no copy. Returns a list: how many passes each backward had."""
    waiting, backwards, swap, forward, back = [], [], models._swap, network.forward, torch.Tensor.backward

    def passing(net, *args):
        out = forward(net, *args)
        waiting.extend([out] * out.requires_grad)
        return out

    def swapping(params, values):
        assert not waiting
        swap(params, values)

    def backing(loss):
        backwards.append(len(waiting))
        waiting.clear()
        back(loss)
    for owner, name, f in ((network, "forward", passing), (models, "_swap", swapping),
                           (torch.Tensor, "backward", backing)):
        monkeypatch.setattr(owner, name, f)
    return backwards


@pytest.mark.parametrize("module, settings", (
    (dgpo, dict(ref="start", kl_ref="start", clip_range=.01, cfg_ref=2.0)), (dgpo, dict(micro_batch=2)),
    (grpo, dict(kl_beta=.1)), (slas, dict(kl_beta=.1, method="flow", fisher_every=0))))
def test_no_swap_before_a_backward_pass(module, settings, flags, monkeypatch):
    backwards = no_swap_before_backward(models.MMDiT, monkeypatch)
    run(module, flags(**settings))
    assert set(backwards) == {1}


def test_prompts_from_a_file(flags, monkeypatch):
    """It is read once for all splits."""
    Path("prompts.txt").write_text("a red circle\na blue square and a star\n", encoding="utf-8")
    read, rows = [], data._rows
    monkeypatch.setattr(data, "_rows", lambda *some: read.append(some) or rows(*some))
    last, *_ = run(dgpo, [*flags(), "--prompts", "prompts.txt"])
    assert last["steps"] == 2 and evals("out")[-1]["tags"].keys() == {"all"} and len(read) == 1


def test_a_long_title_is_not_cut(tmp_path):
    """Of two that differ in their last word each keeps it, left of the images."""
    for name in ("sde-mean 4", "sde-mean 10"):
        data.picture(tmp_path / name, [torch.zeros(1, 3, 28, 28)], ["a ring"], [name])
    one, two = (np.asarray(Image.open(tmp_path / name)) for name in ("sde-mean 4", "sde-mean 10"))
    assert not np.array_equal(one[:, :56], two[:, :56]) and np.array_equal(one[:, 56:], two[:, 56:])


def test_a_strip_of_many_sheets_keeps_the_first_and_the_last(tmp_path):
    for n in (1, 2, 60, 150):
        for i in range(n):
            Image.new("RGB", (9, data.HEADER + 3), (i, 0, 0)).save(tmp_path / f"{i * 10:06d}.png")
        data.strip(tmp_path)
        with Image.open(tmp_path / "strip.png") as page:
            assert page.height == data.HEADER + 3 * min(n, 60)
            seen = [page.getpixel((4, data.HEADER + 3 * i + 1))[0] for i in range(min(n, 60))]
        assert seen[0] == 0 and seen[-1] == n - 1 and {b - a for a, b in zip(seen, seen[1:])} <= {1, 2, 3}


def test_a_picture_shows_its_images_as_they_are(tmp_path):
    """Small ones thrice as large, pixel by pixel, in the order of rows and captions; large ones at less than 256."""
    rows = [torch.rand(2, 3, 28, 28).mul(255).round() / 255 for _ in range(2)]
    data.picture(tmp_path / "a.png", rows, ["a ring", "a star"], ["one", "two"])
    page = np.asarray(Image.open(tmp_path / "a.png"))
    for i, j in itertools.product(range(2), repeat=2):
        y, x = data.HEADER + i * 90, 58 + j * 90
        shown = torch.tensor(page[y:y + 84, x:x + 84] / 255).permute(2, 0, 1).view(3, 28, 3, 28, 3)
        torch.testing.assert_close(shown, rows[i][j].double()[:, :, None, :, None].expand_as(shown), atol=1e-6, rtol=0)
    grey = torch.linspace(0, 1, 512).expand(1, 3, 512, 512)
    data.picture(tmp_path / "b.png", [grey], ["a ring"], ["one"])
    shown = np.asarray(Image.open(tmp_path / "b.png"))[data.HEADER:-6, 58:-6]              # 6: between two images
    assert shown.shape == (170, 170, 3) and abs(shown - np.linspace(0, 255, 170)[:, None]).max() < 2


def test_a_curve_goes_where_its_axis_says(tmp_path):
    """The ends of each panel, from its least to its greatest x, and the lowest and highest tick; the mean of two."""
    data.chart(tmp_path / "a.png", {
        "steps": {"up": [[(0, 0), (1, 1)]] * 2, "mean": [[(0, 1), (1, 1)], [(0, 0), (1, 0)]]},
        "minutes": {"mean": [[(2, 4), (6, 0)]]}})
    page = np.asarray(Image.open(tmp_path / "a.png"))[:300]            # without the legend
    for ink, left, ends in ((0, 0, (260, 12)), (1, 0, (136, 136)), (1, 420, (12, 260))):
        y, x = (page[:, left:left + 420] == data.INKS[ink]).all(2).nonzero()
        assert abs(min(x) - 46) <= 1 and abs(max(x) - 406) <= 1
        for column in range(50, 404, 25):                              # none of them at the crossing of two curves
            assert abs(np.interp(column, (46, 406), ends) - y[x == column].mean()) < 1.5


# =============================================================================================================== lift

@pytest.mark.parametrize("module, settings", (
    (dgpo, dict(lr=1e-3, ema=.1, steps=8, ref="start")), (grpo, dict(lr=1e-3, ema=.1, steps=12))), ids=("dgpo", "grpo"))
def test_lift(module, settings, flags):
    """Red images, rewarded, become more frequent: the mean of 64 fixed noises rises by far more than it varies."""
    last, rows, _ = run(module, flags(groups=4, group_size=16, eval_images=64, **settings))
    assert last["eval_after"] > last["eval_before"] + .03, last
    worse, *_ = run(module, flags(groups=4, group_size=16, eval_images=64, **settings, out="worse", reward="blue"))
    assert worse["eval_after"] < worse["eval_before"] - .03, worse     # the reward decides, not the training


def test_dance_grpo_shares_a_groups_noise_and_scores_the_clean_estimate(flags, monkeypatch):
    """--method dance: its SDE at .3, each group from one noise; --clean-final: the reward sees the last x_0hat."""
    seen = []
    honest = grpo.rollout

    def spy(pipe, ctx, null, ts, window, cfg, *rest):
        x, logps, clean = honest(pipe, ctx, null, ts, window, cfg, *rest)
        seen.append((cfg, x, logps, clean, ts, grpo.guided(pipe.net, x[-2], ts[-2], ctx, null, 1)))
        return x, logps, clean
    monkeypatch.setattr(grpo, "rollout", spy)
    for settings in (dict(method="dance"), dict(method="dance", clean_final=True), dict(shared_noise=False)):
        run(grpo, flags(out=str(len(seen)), steps=1, groups=2, **settings))
    (cfg, x, _, clean, ts, _), (_, x_2, _, clean_2, _, v_2), (plain, x_3, *_) = seen[0], seen[1], seen[-1]
    group = x[0].unflatten(0, (-1, cfg.group_size))
    assert (cfg.noise_level, cfg.kl_beta) == (.3, 0) and plain.noise_level == .7
    assert torch.equal(group, group[:, :1].expand_as(group)) and not torch.equal(group[0, 0], group[-1, 0])
    assert not torch.equal(x[1].unflatten(0, (-1, cfg.group_size))[:, 0], x[1].unflatten(0, (-1, cfg.group_size))[:, 1])
    assert not torch.equal(x_3[0][0], x_3[0][1])
    assert torch.equal(clean, x[-1]) and torch.allclose(clean_2, x_2[-2] - ts[-2] * v_2, atol=1e-6)
