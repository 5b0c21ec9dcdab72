"""The race: every method on the same prompts, reward and evaluation, against updates, images, network passes, seconds.

    python tests/race.py --tune --minutes 8                  # three settings a method, chosen on validation prompts
    python tests/race.py --seeds 3 --minutes 8               # the race, each method by its choice
    python tests/race.py --methods dgpo --variants all --rollouts 60 --jobs 2 --dtype bfloat16
    python tests/race.py --table                             # from the csv alone: a table and pictures of each race

Every run is a process of the method's own script, its command line printed; flags that are not the race's go to all
of them. Started again after any kill, the race leaves what is finished and resumes what is not. A finished run's
validation points and two test scores, before and after, go to the csv at once. The proxy is the reward that is trained
on, strict the tiny world's own verdict, right or wrong: half of the reward `shapes`, no part of `tiny-clip`.
"""
import argparse
import csv
import fcntl
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from curves import AXES, COLUMNS, curve, read, report, run_of  # noqa: E402

METHODS = {     # the script, and what --tune tries: its defaults, another rate, one more parameter
    "flow-grpo": ("grpo.py --method flow", "", "--lr 1e-4", "--noise-level 0.5"),
    "dancegrpo": ("grpo.py --method dance", "", "--lr 1e-4", "--noise-level 0.5"),
    "slas": ("slas.py", "", "--lr 1e-4", "--gamma 0.5"),
    "dgpo": ("dgpo.py", "", "--lr 4e-4", "--t-min 0.7"),
    "diffusion-dpo": ("dgpo.py --method diffusion-dpo", "", "--lr 1e-4", "--beta 1000"),
    "proxt2i": ("proxt2i.py rl", "", "--lr 1e-4", "--hold 10"),        # these two from tests/tiny-prox and tiny-score,
    "proxt2i-score": ("proxt2i.py rl --method score --model tiny-score", "", "--lr 1e-4", "--hold 10")}  # else tiny
CFG = "--cfg-rollout 3 --cfg-train 3 --cfg-ref 3 --cfg-eval 3"
VARIANTS = {    # ablations, each beside its method's own run, "base"
    "dgpo": {"t-min-0": "--t-min 0",                                   # the paper's: no timestep clip,
             "sde": "--sde",                                           # rollouts by Flow-GRPO's SDE,
             "offline": "--rollout start",                             # groups from the reference model,
             "pairs": "--method diffusion-dpo",                        # best against worst, all else DGPO's,
             "group-8": "--group-size 8 --groups 24",                  # other groups, as many images (base: 24 x 8),
             "group-16": "--group-size 16 --groups 12",
             "ref-start": "--ref start",                               # a frozen reference (base: the moving average),
             "kl-start": "--kl-ref start",                             # the KL to the start, as released
             "beta-10": "--beta 10",                                   # another beta (base: 100),
             "beta-1000": "--beta 1000",
             "clip": "--clip-range 0.01",                              # the released code's PPO-like clip,
             "hold-0": "--hold 0",                                     # nothing holds the sampler's last steps,
             "cfg-rollout": "--cfg-rollout 3",                         # guided rollouts, unguided training.
             "cfg": CFG,                                               # What people ask: guidance everywhere,
             "adv-batch": "--adv-std batch"},                          # the batch's std (base: the group's)
    "flow-grpo": {"cfg": CFG, "adv-batch": "--adv-std batch",
                  "shared-noise": "--shared-noise",                    # a group starts from one noise (base: from many)
                  "kl": "--kl-beta 0.04",                              # the released code's KL (base: none)
                  "kl-gaussian": "--kl-beta 0.04 --kl-form gaussian",  # the exact one, ten times as strong here
                  "kl-velocity": "--kl-beta 0.04 --kl-form velocity",
                  "train-1": "--train-steps 1",                        # SDE steps trained a rollout (base: 3)
                  "train-all": "--train-steps 0"},
    "dancegrpo": {"own-noise": "--no-shared-noise", "adv-batch": "--adv-std batch",
                  "train-1": "--train-steps 1", "train-all": "--train-steps 0"},
    "proxt2i": {"cfg": CFG, "adv-batch": "--adv-std batch",
                "train-1": "--train-steps 1", "train-all": "--train-steps 0 --train-last 0"}}
TUNE_SEED = 1000                                                       # none of the race's


# ============================================================================================================== runs

def command(run, out):
    """The words of a run's command line, its script first. run: a dict of the columns RUN."""
    (amount, unit), reward = run["budget"].split(), shlex.quote(run["reward"])
    return shlex.split(" ".join((
        METHODS[run["method"]][0], run["settings"], VARIANTS.get(run["method"], {}).get(run["variant"], ""),
        f"--reward {reward} --eval-reward {reward} --gold-reward shapes-strict --cfg-also 0",
        "--eval-images 1" * (run["variant"] == "tune"),                # at the end, by test prompts: not read
        run["flags"], f"--minutes {amount}" if unit == "minutes" else f"--steps {amount} --minutes 1000000",
        f"--seed {run['seed']} --out {shlex.quote(str(out))}")))


def here(jobs):
    """What figures depend on besides the command line: commit (+ if a source has changed since), PyTorch, machine."""
    git = [subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip() for words in
           (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno", "--", "*.py", "csrc"))]
    info = Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "") or [platform.processor()]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu[0]
    return dict(commit=git[0] + "+" * bool(git[1]), torch=torch.__version__,
                machine=f"{machine}, threads: {1 if jobs > 1 else torch.get_num_threads()}, runs at once: {jobs}")


def plan(args, rows):
    """The runs that the command line asks for, seed by seed, as dicts of the columns RUN. rows: the csv's."""
    shared = dict(here(args.jobs), reward=args.reward, budget=args.budget, flags=shlex.join(args.flags))
    if args.tune:
        return [dict(shared, method=method, variant="tune", settings=METHODS[method][i], seed=TUNE_SEED)
                for i in (1, 2, 3) for method in args.methods]
    tuned = dict(shared, budget=args.tuned or args.budget)
    return [dict(shared, method=method, variant=variant, settings=chosen(rows, method, tuned), seed=seed)
            for seed in range(args.first_seed, args.first_seed + args.seeds) for method in args.methods
            for variant in ("base", *(v for v in VARIANTS.get(method, ()) if {v, "all"} & set(args.variants)))]


def perform(run, args, children):
    """Start a run, resume it, or find it finished; then it is in the csv. Returns None, or what went wrong.

    The run's process holds the lock on its log, too: one that a killed race left behind is waited for.
    """
    name = f"{run['method']}-{run['variant']}-{run['seed']}-{data.mix(*command(run, '')) % 16 ** 6:06x}"
    folder, card = args.out / name, args.out / f"{name}.json"          # the card: where and how the run began
    with open(args.out / f"{name}.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        begun, evals = (folder / "config.json").exists(), folder / "evals.jsonl"
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
            data.write_atomic(card, json.dumps(run, indent=2).encode())
        if not (evals.exists() and '"split": "test"' in evals.read_text()):
            words = command(run, folder) + ["--resume"] * begun
            tqdm.write(f"python {shlex.join(words)}")
            child = subprocess.Popen([sys.executable, ROOT / words[0], *words[1:]], stdin=subprocess.DEVNULL,
                                     stdout=log, stderr=log, start_new_session=True,
                                     env=os.environ | ({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {}))
            children.append(child)
            if child.wait():
                return f"{name}: exit code {child.returncode}, see {log.name}"
        append(args.csv, points(json.loads(card.read_text()), folder))


# =============================================================================================================== csv

def points(run, folder):
    """A finished run's rows of the csv: its validation points, and, but for tuning, the test prompts' before and after.

    Seconds count from the first step, validation included, the evaluation at the end not.
    """
    rows, found = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()], curve(folder)
    if run["variant"] != "tune":
        before, after = (row for row in rows if row["split"] == "test")
        found += [before, dict(after, seconds=after["seconds"] - rows[0]["seconds"])]
    return [{**run, **{key: round(row[key], 3) for key in ("step", *AXES)}, "split": row["split"],
             "strict": row["eval_gold"], "proxy": row["eval"]} for row in found]


def append(file, rows):
    """Add a run's rows to the csv, all or none, and none if the run is there; races that share the file take turns."""
    turn = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        old, text = read(file), io.StringIO(newline="")
        if run_of(rows[0]) not in map(run_of, old):
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(old + rows)
            data.write_atomic(file, text.getvalue().encode())
    finally:
        os.close(turn)


def tried(rows, method, race):
    """{settings: the last validation score, strict} of a method's tuning runs, the last in the file of each.

    race: its reward, flags and the tuning's budget: the race's own, unless --tuned names another, since what is ahead
    after two minutes may have collapsed after five.
    """
    return {row["settings"]: row["strict"] for row in rows if (row["method"], row["variant"]) == (method, "tune")
            and all(row[key] == race[key] for key in ("reward", "budget", "flags"))}


def chosen(rows, method, race):
    """The best settings in METHODS by `tried`, once all three were; else "", the script's defaults."""
    found = tried(rows, method, race)
    return max(METHODS[method][1:], key=found.__getitem__) if found.keys() >= set(METHODS[method][1:]) else ""


# ============================================================================================================== main

def parsed(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--methods", default=",".join(METHODS), help="a comma between")
    add("--variants", default="", help="ablations of these methods by name, a comma between, or all")
    add("--seeds", type=int, default=3, help="how many")
    add("--first-seed", type=int, default=0, help="where another race, or another machine, left off")
    add("--minutes", type=float, default=0, help="of each run, validation included (8)")
    add("--rollouts", type=int, default=0, help="the same number for all, in place of minutes")
    add("--reward", default="shapes", help="what is trained on: shapes, tiny-clip, ...")
    add("--jobs", type=int, default=1, help="runs at once; each has one thread if that is more than 1")
    add("--out", type=Path, default=Path("runs/race"), help="the runs' folders and the pictures")
    add("--csv", type=Path, default=ROOT / "tests/race.csv")
    add("--tune", action="store_true", help="the three configurations of each method, one seed")
    add("--tuned", default="", metavar="BUDGET", help='whose choices count: "6 minutes" (of the race\'s own length)')
    add("--table", action="store_true", help="run nothing")
    args, args.flags = parser.parse_known_args(argv)
    args.methods, args.variants = (list(filter(None, text.split(","))) for text in (args.methods, args.variants))
    known = {"all", *(variant for method in args.methods for variant in VARIANTS.get(method, ()))}
    unknown = [*(set(args.methods) - METHODS.keys()), *(set(args.variants) - known)]
    taken = {word.split("=")[0] for word in args.flags} & {"--seed", "--steps", "--out", "--resume", "--eval-reward"}
    tunings = {row["budget"] for row in read(args.csv) if row["variant"] == "tune" and
               (row["reward"], row["flags"]) == (args.reward, shlex.join(args.flags))}
    for wrong, why in ((unknown, f"unknown: {', '.join(unknown)}; there is {', '.join([*METHODS, *sorted(known)])}"),
                        (taken, f"{', '.join(taken)}: the race's own"),
                       (args.minutes and args.rollouts, "--minutes or --rollouts, not both"),
                       (args.first_seed < 0, "--first-seed: 0 or more"),
                       (args.tuned and args.tune, "--tune or --tuned, not both"),
                       (args.tuned and args.tuned not in tunings, f"--tuned {args.tuned!r}: of this reward and these "
                        f"flags {args.csv} has tunings of {', '.join(sorted(tunings)) or 'no length'}"),
                       (min(args.seeds, args.jobs) < 1, "--seeds and --jobs: 1 or more"),
                       (args.table and not args.csv.exists(), f"{args.csv} does not exist: run the race first")):
        if wrong:
            parser.error(why)
    args.budget = f"{args.rollouts} rollouts" if args.rollouts else f"{args.minutes or 8:g} minutes"
    return args


def main(argv=None):
    args, children, failed = parsed(argv), [], []
    for folder in (args.out, args.csv.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.table:
        runs, pool = plan(args, read(args.csv)), ThreadPoolExecutor(args.jobs)
        try:
            done = as_completed([pool.submit(perform, run, args, children) for run in runs])
            failed = [future.result() for future in tqdm(done, "race", len(runs), unit="run", dynamic_ncols=True)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.kill()
            raise
    report(args.csv, args.out)
    rows, kinds = read(args.csv), ("method", "reward", "budget", "flags")
    for kind in dict.fromkeys(tuple(row[key] for key in kinds) for row in rows if row["variant"] == "tune"):
        race = dict(zip(kinds, kind))
        found = [f"{settings or 'defaults'} {score:.3f}" for settings, score in tried(rows, kind[0], race).items()]
        best = chosen(rows, kind[0], race) or "defaults"
        print(f"{' '.join(filter(None, kind))}: {', '.join(found)}; chosen: {best}")
    for line in filter(None, failed):
        print(f"failed: {line}", file=sys.stderr)
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
