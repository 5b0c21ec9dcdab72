"""The race (tests/race.py), its csv and tables; and every method's learning on a short slice."""
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves
import data
import dgpo
import grpo
import race

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("alone")
MODULES = {"grpo.py": "train", "slas.py": "train", "dgpo.py": "train", "proxt2i.py": "train_rl"}   # what main starts


# ============================================================================================================ learning

# The shipped checkpoints, at the tiny preset but for fewer images and higher rates, learn to paint red where the prompt
# leaves the colour open: smooth, so that a few rollouts show it. {method: (flags, mean, std)} of the validation score's
# rise over seeds 0 to 4 (0 to 3: slas and both of proxt2i), as `python tests/test_race.py 5` prints it: PyTorch 2.13.0,
# one thread of an AMD EPYC. With the reward's sign flipped seed 0 gives -.05 to -.23, of every method.
SLICE = ("--prompts prompts.txt --eval-reward red.py:red --groups 4 --group-size 12 --sample-steps 5 --eval-steps 5 "
         "--steps 5 --eval-every 5 --val-images 32 --eval-images 1 --cfg-also 0 --ema 0.5 --minutes 600")
RISE = {"flow-grpo": ("--lr 2e-4", .075, .008),
        "dancegrpo": ("--lr 2e-4", .078, .016),
        "slas": ("--lr 2e-4 --fisher-every 0 --method flow", .069, .012),
        "dgpo": ("", .260, .027),
        "diffusion-dpo": ("", .271, .029),
        "proxt2i": ("--lr 4e-4 --hold 0 --kl-beta 0", .132, .010),
        "proxt2i-score": ("--lr 4e-4 --hold 0 --kl-beta 0 --sample-steps 8 --eval-steps 8", .272, .090)}


def rise(method, seed, out, reward="red.py:red"):
    """How much the slice lifts the validation score, images of the same prompts and noise; written in this folder."""
    Path("red.py").write_text("def red(images, prompts, metas):\n"
                              "    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))\n")
    Path("prompts.txt").write_text("a photo of a circle\na photo of a star\na photo of two squares\na heart\n")
    script, *words = race.METHODS[method][0].split()
    words += [*SLICE.split(), *RISE[method][0].split(), "--reward", reward, "--seed", str(seed), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(script.removesuffix(".py")).main(words)
    before, after = (row["eval"] for row in curves.curve(out))
    return after - before


@pytest.mark.parametrize("method", RISE)
def test_every_method_learns(method):
    """Within three standard deviations over the seeds, and by half of their mean at least."""
    _, mean, std = RISE[method]
    assert max(mean / 2, mean - 3 * std) < rise(method, 0, "out") < mean + 3 * std


@pytest.mark.parametrize("method, module", (("flow-grpo", grpo), ("diffusion-dpo", dgpo)))
def test_a_flipped_advantage_does_not(method, module, monkeypatch):
    right = module.group_advantage
    monkeypatch.setattr(module, "group_advantage", lambda *values: -right(*values))
    assert rise(method, 0, "out") < 0


def measure(seeds, *methods):
    """Print what RISE holds, of seeds 0 to seeds - 1, and what the flipped reward gives."""
    torch.set_num_threads(1)
    for method in methods or RISE:
        start = time.process_time()
        found = [rise(method, seed, f"{method}-{seed}") for seed in range(seeds)]
        end = time.process_time()
        flipped = rise(method, 0, f"{method}-flipped", "red.py:red:-1")
        print(f"{method:>14} mean {statistics.mean(found):.3f} std {statistics.stdev(found):.3f}, {min(found):.3f} to "
              f"{max(found):.3f}, flipped {flipped:.3f}; {(end - start) / seeds:.0f} core seconds each", flush=True)


# ======================================================================================================= command lines

def lines_of(method):
    """{name: the words of the command line} of every run that the race can start by this method."""
    shared = dict(reward="shapes", flags="", method=method, seed=1)
    runs = {("base", budget): dict(variant="base", settings="", budget=budget)
            for budget in ("3 rollouts", "8 minutes")}
    runs |= {name: dict(variant=name, settings="", budget="3 rollouts") for name in race.VARIANTS.get(method, ())}
    runs |= {("tune", settings): dict(variant="tune", settings=settings, budget="3 rollouts")
             for settings in race.METHODS[method][1:]}
    return {name: race.command({**shared, **run}, "an out") for name, run in runs.items()}


@pytest.mark.parametrize("method", race.METHODS)
def test_scripts_accept_every_command_line(method, monkeypatch):
    """Each by its script's own main, up to where it would train. Equal where all are; no two say the same."""
    script = race.METHODS[method][0].split()[0]
    module, taken = importlib.import_module(script.removesuffix(".py")), []
    monkeypatch.setattr(module, MODULES[script], lambda cfg: taken.append(dataclasses.asdict(cfg)))
    lines = lines_of(method)
    for name, words in lines.items():
        assert words[0] == script
        module.main(words[1:])
    found = dict(zip(lines, taken, strict=True))
    for name, cfg in found.items():
        assert cfg["groups"] * cfg["group_size"] == 192 and cfg["sample_steps"] == cfg["eval_steps"] == 10, name
        assert cfg["prompts"] == "shapes" and (cfg["val_images"], cfg["eval_every"], cfg["cfg_also"]) == (240, 10, 0)
        assert (cfg["eval_reward"], cfg["gold_reward"]) == ("shapes", "shapes-strict")
        assert (cfg["seed"], cfg["out"]) == (1, "an out")
        assert cfg["eval_images"] == (1 if name[0] == "tune" else 600)
        assert cfg["model"] == {"proxt2i": "tiny-prox", "proxt2i-score": "tiny-score"}.get(method, "tiny")
    assert found["base", "8 minutes"]["minutes"] == 8 and found["base", "3 rollouts"]["steps"] == 3
    different = [cfg for name, cfg in found.items() if name != ("tune", "")]       # that one is base, but for its test
    assert all(a != b for a, b in itertools.combinations(different, 2))


def test_bad_input_is_refused(capsys):
    for line in ("--methods dgop", "--methods slas --variants sde", "--minutes 1 --rollouts 1", "--seed 3", "--jobs 0",
                 "--first-seed -1", "--tuned never", "--table --csv gone.csv"):
        with pytest.raises(SystemExit) as end:
            race.main(line.split())
        assert end.value.code == 2 and capsys.readouterr().err


# ============================================================================================================== table

def rows_of(method, seed, points, test, **more):
    """A run's rows of the csv. points: (seconds, forwards, strict) each 10 rollouts; test: strict before and after."""
    run = dict(reward="shapes", budget="8 minutes", flags="", machine="abacus", method=method, variant="base",
               settings="", seed=str(seed), commit="c0ffee", torch="2") | more
    val = [dict(run, split="val", step=10. * i, updates=20. * i, images=1920. * i, forwards=f, seconds=s, strict=y,
                proxy=y / 2) for i, (s, f, y) in enumerate(points)]
    return val + [dict(row, split="test", strict=score, proxy=score / 2) for row, score in zip((val[0], val[-1]), test)]


FLOW = [*rows_of("flow-grpo", 0, [(0, 0, .2), (100, 5000, .3), (200, 10000, .4)], (.28, .38)),
        *rows_of("flow-grpo", 1, [(0, 0, .2), (120, 5000, .4), (240, 10000, .3)], (.28, .40))]
OTHERS = [*rows_of("dgpo", 0, [(0, 0, .2), (60, 6000, .5), (120, 12000, .6)], (.28, .5)),
          *rows_of("diffusion-dpo", 0, [(0, 0, .2), (60, 6000, .3)], (.28, .3)),
          *rows_of("proxt2i", 0, [(0, 0, .4), (60, 6000, .5)], (.35, .5))]


def test_table_from_a_csv_by_hand(tmp_path, capsys):
    """Flow-GRPO's mean curve is .2, .35, .35, so the target is .35, reached after (100 + 120) / 2 seconds; DGPO has it
    halfway to its first point, Diffusion-DPO never, ProxT2I from the start."""
    file = tmp_path / "race.csv"
    for row in range(0, len(FLOW), 5):
        race.append(file, FLOW[row:row + 5])
    race.append(file, OTHERS[:5])
    race.append(file, OTHERS[5:9])
    race.append(file, OTHERS[9:])
    assert race.main(["--table", "--csv", str(file), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "shapes, 8 minutes, abacus; target 0.350"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in said[2:] if line]
    assert table[2:] == [
        ["flow-grpo", "defaults", "2", "0.280 ± 0.000", "0.390 ± 0.014", "0.140 ± 0.000", "0.195 ± 0.007", "110",
         "5,000", "1.00"],
        ["dgpo", "defaults", "1", "0.280", "0.500", "0.140", "0.250", "30", "3,000", "3.67"],
        ["diffusion-dpo", "defaults", "1", "0.280", "0.300", "0.140", "0.150", "-", "-", "-"],
        ["proxt2i", "defaults", "1", "0.350", "0.500", "0.175", "0.250", "-", "-", "-"]]
    assert {len(row) for row in table} == {10}
    for score in curves.SCORES:
        assert Image.open(tmp_path / f"race-shapes-8-minutes-abacus-{score}.png").width == 4 * 420


def test_rollouts_are_one_race_on_all_machines(tmp_path):
    """Their seconds are not compared: no such target, no such picture. Minutes are a race for each machine. Flow-GRPO's
    mean curve is .2, 1/3, 1.1/3, so DGPO, from .2 to .5 in 6000 passes, has its best after 6000 x .5/.9."""
    here = [*FLOW, *OTHERS[:5]]
    there = [dict(row, machine="loom", seed="2") for row in FLOW[:5] + OTHERS[:5]]
    assert len(curves.races(here + there)) == 2
    budget = {"budget": "20 rollouts"}
    (key, runs), = curves.races([row | budget for row in here + there]).items()
    assert list(runs["flow-grpo", "base"]) == ["0", "1", "2"] and list(runs["dgpo", "base"]) == ["0", "2"]
    flow, dgpo = ([cell.strip() for cell in line.split("|")[3:-1]]
                  for line in curves.table(key, runs).splitlines()[4:])
    assert flow[0] == "3" and dgpo[0] == "2" and flow[-3] == dgpo[-3] == dgpo[-1] == "-" and dgpo[-2] == "3,333"
    curves.pictures(tmp_path / "x", runs)
    assert Image.open(tmp_path / "x-strict.png").width == 3 * 420
    (key, alone), = curves.races([row | budget for row in here]).items()
    assert list(curves.axes_of(alone)) == list(curves.AXES) and "| 110 | 5,000 | 1.00 |" in curves.table(key, alone)


def test_points_of_a_run(tmp_path):
    """Seconds count from the first step to the last; a tuning run's test score is not read."""
    none, end = dict(step=0, updates=0, images=0, forwards=0), dict(step=2, updates=4, images=16, forwards=80)
    evals = [dict(none, split="val", seconds=5.0, eval=.1, eval_gold=.2),
             dict(split="val", step=1, updates=2, images=8, forwards=40, seconds=9.0, eval=.3, eval_gold=.4),
             dict(none, split="test", seconds=0, eval=.15, eval_gold=.25),
             dict(end, split="test", seconds=12.0, eval=.35, eval_gold=.45)]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    found = race.points({"variant": "base"}, tmp_path)
    assert [[row[key] for key in ("split", "step", "forwards", "seconds", "strict", "proxy")] for row in found] == [
        ["val", 0, 0, 0, .2, .1], ["val", 1, 40, 4, .4, .3], ["test", 0, 0, 0, .25, .15], ["test", 2, 80, 7, .45, .35]]
    assert [row["split"] for row in race.points({"variant": "tune"}, tmp_path)] == ["val", "val"]


def test_curves_of_folders(alone, capsys):
    """A star is every seed's folder; @N cuts a run after N rollouts; seconds count from a run's first step."""
    for k, last in enumerate((.5, .7)):
        rows = [dict(split="val", step=n, images=8 * n, forwards=80 * n, seconds=3.0 + n, eval=score,
                     eval_gold=score / 2) for n, score in ((0, .1), (10, .4 + k), (20, last))]
        rows.append(dict(rows[-1], split="test", eval=9.0))
        Path(f"runs/dgpo-00{k}").mkdir(parents=True)
        Path(f"runs/dgpo-00{k}/evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves.main("out.png", "all=runs/dgpo-*", "cut=runs/dgpo-000@10", "runs/dgpo-001")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| all | 2 | 0.500, 0.700 | 0.500, 1.400 | 160 | 1,600 | 20 |",
        "| cut | 2 | 0.400, 0.700 | 0.400, 1.400 | 120 | 1,200 | 15 |"]
    curves.main("--gold", "gold.png", "one=runs/dgpo-000")
    assert "| one | 1 | 0.500 | 0.500 | 0.050 | 0.250 | 160 | 1,600 | 20 |" in capsys.readouterr().out
    assert all(Image.open(file).width == 3 * 420 for file in ("out.png", "gold.png"))


def test_reach():
    line = [(0, .1), (10, .3), (20, .2), (30, .5)]
    found = [curves.reach(line, target) for target in (.1, .2, .3, .4)]
    assert found == pytest.approx([0, 5, 10, 80 / 3]) and math.isnan(curves.reach(line, .6))
    assert math.isnan(curves.reach(line, math.nan)) and math.isnan(curves.reach([], .1))


def test_a_race_without_flow_grpo_has_no_target():
    (key, runs), = curves.races(OTHERS[:5]).items()
    table = curves.table(key, runs)
    assert "no Flow-GRPO, so no target" in table and table.endswith("| - | - | - |") and "nan" not in table


def test_the_csv_has_no_run_twice(tmp_path):
    file = tmp_path / "race.csv"
    race.append(file, FLOW[:5])
    once = file.read_bytes()
    race.append(file, [dict(row, seconds=1.0) for row in FLOW[:5]])    # the same run, made again
    assert file.read_bytes() == once and curves.read(file) == FLOW[:5]
    with ThreadPoolExecutor(8) as pool:                                # races that share the file
        list(pool.map(lambda seed: race.append(file, rows_of("slas", seed, [(0, 0, .2)], (.2, .3))), range(20)))
    assert len(curves.read(file)) == 5 + 20 * 3 and not file.with_name("race.csv.new").exists()


def test_the_last_commit_and_settings_count():
    new = [dict(row, commit="feed", strict=.9) for row in FLOW[:5]]
    (_, runs), = curves.races(FLOW + new).items()
    assert {seed: rows[0]["commit"] for seed, rows in runs["flow-grpo", "base"].items()} == {"0": "feed", "1": "c0ffee"}
    (_, runs), = curves.races(FLOW + [dict(row, settings="--lr 1") for row in new]).items()
    assert list(runs["flow-grpo", "base"]) == ["0"]


def test_a_variant_has_its_base_beside_it(tmp_path):
    rows = OTHERS[:5] + [row for i in range(7) for row in rows_of("dgpo", 0, [(0, 0, .2)], (.2, .3), variant=f"v{i}")]
    (_, runs), = curves.races(rows).items()
    curves.pictures(tmp_path / "x", runs)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"x{group}-{score}.png" for group in ("", "-dgpo-1", "-dgpo-2") for score in curves.SCORES}


def test_the_choice_is_by_validation_once_all_were_tried(tmp_path):
    settings = race.METHODS["dgpo"][1:]
    rows = [row for text, points in zip(settings, ([.2, .4], [.2, .5], [.6, .3]))
            for row in rows_of("dgpo", 1000, [(0, 0, y) for y in points], (0, 0), variant="tune", settings=text)[:2]]
    here = dict(reward="shapes", budget="8 minutes", flags="")
    assert race.chosen(rows, "dgpo", here) == settings[1] == "--lr 4e-4"           # not .6, which did not last
    assert race.chosen(rows[:4], "dgpo", here) == "" == race.chosen(rows, "dgpo", here | {"reward": "tiny-clip"})
    assert race.chosen(rows, "dgpo", here | {"budget": "6 minutes"}) == ""         # not tuned for as long
    args = race.parsed(["--methods", "dgpo,slas", "--seeds", "2", "--variants", "sde"])
    assert [(run["method"], run["variant"], run["settings"], run["seed"]) for run in race.plan(args, rows)] == [
        ("dgpo", "base", "--lr 4e-4", 0), ("dgpo", "sde", "--lr 4e-4", 0), ("slas", "base", "", 0),
        ("dgpo", "base", "--lr 4e-4", 1), ("dgpo", "sde", "--lr 4e-4", 1), ("slas", "base", "", 1)]
    args = race.parsed(["--methods", "slas", "--seeds", "2", "--first-seed", "1"])
    assert [run["seed"] for run in race.plan(args, rows)] == [1, 2]
    line = ["--methods", "dgpo", "--seeds", "1", "--minutes", "9", "--csv", str(tmp_path / "race.csv")]
    race.append(tmp_path / "race.csv", rows)
    assert [run["settings"] for run in race.plan(race.parsed(line), rows)] == [""]
    args = race.parsed([*line, "--tuned", "8 minutes"])
    assert [(run["settings"], run["budget"]) for run in race.plan(args, rows)] == [("--lr 4e-4", "9 minutes")]
    for more in (["--reward", "tiny-clip"], ["--dtype", "bfloat16"], ["--tune"]):      # no such tuning; one that begins
        with pytest.raises(SystemExit):
            race.parsed([*line, "--tuned", "8 minutes", *more])


# =============================================================================================================== runs

@pytest.fixture
def flags(random_model, tmp_path):
    """A race of two short runs, one after the other, whose rollouts last long enough to be killed in."""
    (tmp_path / "slow.py").write_text("""import time


def red(images, prompts, metas):
    time.sleep(.5)
    return images[:, 0].mean((1, 2))
""")
    return (f"--methods flow-grpo,dgpo --seeds 1 --rollouts 3 --out runs --csv race.csv --reward slow.py:red --weights "
            f"{random_model} --groups 2 --group-size 4 --sample-steps 3 --eval-steps 2 --eval-images 8 --val-images 8 "
            f"--eval-every 1 --save-every 1").split()


def steps(method):
    """The steps in the metrics of a method's run, as far as it is; a line that is being written is left out."""
    files = Path("runs").glob(f"{method}-*/metrics.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines(True)]
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def race_until(flags, method, step):
    """A race in a process of its own, killed as its run of this method has that step. Returns what it had said."""
    with open("said", "w+") as said:
        child = subprocess.Popen([sys.executable, ROOT / "tests/race.py", *flags], stdin=subprocess.DEVNULL,
                                 stdout=said, stderr=said)
        while step not in steps(method):
            assert child.poll() is None, Path("said").read_text()
            time.sleep(.01)
        child.kill()
        child.wait()
    return Path("said").read_text()


def kill_run(method):
    """kill -9 of the process that a dead race left running."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):                             # ended meanwhile
            if f"{method}.py" in cmdline.read_text() and os.readlink(cmdline.parent / "cwd") == os.getcwd():
                os.kill(int(cmdline.parent.name), signal.SIGKILL)


def test_kills_lose_nothing(flags, capsys):
    """kill -9 of the race in its first run, which goes on; of race and run in the second; then it ends as if nothing
    had been, and a last start finds all done."""
    first = race_until(flags, "flow-grpo", 1)
    assert "python grpo.py --method flow" in first and "dgpo.py" not in first and not Path("race.csv").exists()
    second = race_until(flags, "dgpo", 1)                              # it waits for the run that the first left
    assert "python dgpo.py" in second and "grpo.py --method" not in second.replace("dgpo.py", "")
    assert {row["method"] for row in curves.read(Path("race.csv"))} == {"flow-grpo"}
    kill_run("dgpo")
    capsys.readouterr()
    assert '"test"' not in next(Path("runs").glob("dgpo-*/evals.jsonl")).read_text()
    assert race.main(flags) == 0
    said = capsys.readouterr().out
    assert said.count("python ") == 1 and "python dgpo.py" in said and "--resume" in said
    rows, whole = curves.read(Path("race.csv")), Path("race.csv").read_bytes()
    for method in ("flow-grpo", "dgpo"):
        mine = [row for row in rows if row["method"] == method]
        assert [row["step"] for row in mine] == [0, 1, 2, 3, 0, 3] and steps(method) == [1, 2, 3]
        assert [row["split"] for row in mine] == ["val"] * 4 + ["test"] * 2
        assert all(a["seconds"] <= b["seconds"] for a, b in zip(mine[:4], mine[1:4]))
        assert mine[-1]["images"] == 24 and mine[-1]["forwards"] > 0
    assert race.main(flags) == 0 and "python " not in capsys.readouterr().out
    assert Path("race.csv").read_bytes() == whole
    Path("race.csv").unlink()
    assert race.main(flags) == 0
    assert Path("race.csv").read_bytes() == whole                      # all of it lies in the runs' folders


def test_a_run_that_fails_is_named_and_the_others_go_on(flags, capsys):
    assert race.main([*flags, "--kl-form", "nonsense", "--jobs", "2"]) == 1
    err = capsys.readouterr().err
    assert err.count("failed: ") == 2 and "failed: flow-grpo-base-0-" in err and "exit code 2" in err
    assert not Path("race.csv").exists()


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        measure(int(sys.argv[1]), *sys.argv[2:])


@pytest.mark.parametrize("low, high, ticks", (
    (.27, .59, [.2, .3, .4, .5, .6]), (0, 228000, [0, 50000, 100000, 150000, 200000, 250000]),
    (.5, .5, [.4, .6, .8, 1, 1.2, 1.4, 1.6]), (-.3, .2, [-.3, -.2, -.1, 0, .1, .2]), (4, 25, [0, 5, 10, 15, 20, 25])))
def test_an_axis_has_round_numbers(low, high, ticks):
    assert data.rounds(low, high) == ticks
