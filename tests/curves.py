"""Tables and pictures of runs: of the race's csv (tests/race.py --table), or of runs' folders:

    python tests/curves.py tests/curves.png dgpo=runs/dgpo-00* grpo=runs/grpo-00*
    python tests/curves.py --gold out.png dance=runs/grpo-00* slas=runs/slas-00*       # --eval-reward and --gold-reward

Each argument after the picture is LABEL=FOLDER, or LABEL=FOLDER FOLDER ..., stars allowed: the folders of one label
are its seeds, drawn thin, their mean over the common range drawn thick. FOLDER@N is cut after N rollouts.
"""
import csv
import glob
import io
import json
import math
import pathlib
import re
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402

PANELS = (("images", "eval", "images"), ("forwards", "eval", "network passes (forward)"),    # x, y, title
          ("seconds", "eval", "training seconds"))
GOLD = (("step", "eval", "proxy against rollouts"), ("step", "eval_gold", "gold against rollouts"),
        ("eval", "eval_gold", "gold against proxy"))


# ======================================================================================================= runs' folders

def curve(folder):
    """The validation points of one run: a list of rows of evals.jsonl, seconds counted from the first step."""
    folder, _, last = str(folder).partition("@")
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "evals.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "val" and (not last or row["step"] <= int(last))]
    return [{**row, "seconds": row["seconds"] - rows[0]["seconds"]} for row in rows]


def main(*arguments):
    gold, runs = arguments[:1] == ("--gold",), {}
    file, *arguments = arguments[gold:] or sys.exit(__doc__)
    for argument in arguments:
        label, _, folder = argument.rpartition("=")
        label = label or next(reversed(runs), folder)
        pattern, at, last = folder.partition("@")
        found = [run for run in sorted(glob.glob(pattern)) if (pathlib.Path(run) / "evals.jsonl").is_file()]
        if not found:
            sys.exit(f"{pattern} is no run's folder: none has an evals.jsonl")
        runs.setdefault(label, []).extend(curve(run + at + last) for run in found)
    if not runs:
        sys.exit(__doc__)
    if not all(map(all, runs.values())):
        sys.exit("a run has no validation points: run it with --eval-every above 0")
    data.chart(file, {title: {label: [[(row[x], row[y]) for row in rows] for rows in curves]
                              for label, curves in runs.items()} for x, y, title in (GOLD if gold else PANELS)})
    print(f"| method | seeds | last | best | {'gold, first | last | ' * gold}images | passes | seconds |\n"
          f"|---|---|---|---|---|---|---|{'---|---|' * gold}")
    for label, curves in runs.items():
        ends = [rows[-1] for rows in curves]
        last = ", ".join(f"{end['eval']:.3f}" for end in ends)
        best = ", ".join(f"{max(row['eval'] for row in rows):.3f}" for rows in curves)
        golds = [", ".join(f"{rows[i]['eval_gold']:.3f}" for rows in curves) for i in (0, -1)] if gold else []
        print(f"| {label} | {len(curves)} | {' | '.join([last, best, *golds])} "
              f"| {statistics.mean(end['images'] for end in ends):,.0f} "
              f"| {statistics.mean(end['forwards'] for end in ends):,.0f} "
              f"| {statistics.mean(end['seconds'] for end in ends):.0f} |")


# ======================================================================================================= the race's csv

AXES = {"updates": "updates", "images": "images", "forwards": "network passes", "seconds": "seconds"}
SCORES = {"strict": "strict score", "proxy": "proxy"}
RACE = ("reward", "budget", "flags", "machine")                        # what runs that are compared have in common
RUN = (*RACE, "method", "variant", "settings", "seed", "commit", "torch")
COLUMNS = (*RUN, "split", "step", *AXES, *SCORES)


def read(file):
    """The csv's rows, numbers as floats; none if there is no file."""
    with open(file, newline="") if file.exists() else io.StringIO() as f:
        return [{key: float(value) if key in ("step", *AXES, *SCORES) else value for key, value in row.items()}
                for row in csv.DictReader(f)]


def run_of(row):
    """What tells a row's run from every other."""
    return [str(row[column]) for column in RUN]


def races(rows):
    """{race: {(method, variant): {seed: [rows]}}}; of a run with several settings or commits the last in the file.

    So many minutes are another race on another machine; so many rollouts are the same one on all of them.
    """
    found = {}
    for row in rows:
        if row["variant"] != "tune":
            race = tuple(row[c] for c in RACE if c != "machine" or row["budget"].endswith("minutes"))
            seeds = found.setdefault(race, {}).setdefault((row["method"], row["variant"]), {})
            if any(some[0]["settings"] != row["settings"] for some in seeds.values()):
                seeds.clear()
            if run_of(seeds.get(row["seed"], [row])[0]) != run_of(row):
                del seeds[row["seed"]]
            seeds.setdefault(row["seed"], []).append(row)
    return found


def axes_of(runs):
    """The x-axes of a race's runs: no seconds where they are of several machines."""
    machines = {row["machine"] for seeds in runs.values() for rows in seeds.values() for row in rows}
    return {axis: title for axis, title in AXES.items() if axis != "seconds" or len(machines) == 1}


def val_curves(seeds, axis, score="strict"):
    """[(x, y), ...] of each seed's validation points, as data.chart takes them."""
    return [[(row[axis], row[score]) for row in rows if row["split"] == "val"] for rows in seeds.values()]


def mean_curve(seeds, axis):
    """The mean of the seeds' first points, of their second ones, and so on: data.chart's thick line."""
    return [tuple(map(statistics.mean, zip(*some))) for some in zip(*val_curves(seeds, axis))]


def reach(points, target):
    """Where points [(x, y), ...] first have y >= target, by a straight line between two points; NaN if nowhere."""
    for (x, y), (x_next, y_next) in zip(points[:1] + points, points):
        if y_next >= target:
            return x_next if y >= target else x + (target - y) / (y_next - y) * (x_next - x)
    return math.nan


def table(race, runs):
    """A race in Markdown. Test scores: mean and sample standard deviation over seeds; targets by the mean curve.

    The target is the best score of Flow-GRPO's own mean curve; "-" where a run never has it, Flow-GRPO is not there, or
    the method starts from another model, and for the seconds of several machines.
    """
    flow, axes = runs.get(("flow-grpo", "base"), {}), axes_of(runs)
    target = max((y for _, y in mean_curve(flow, "seconds")), default=math.nan)
    aim = f"target {target:.3f}" if flow else "no Flow-GRPO, so no target"
    text = [f"{', '.join(filter(None, race))}; {aim}", "",
            "| run | settings | seeds | strict, before | after | proxy, before | after | seconds to target "
            "| passes to target | speed-up |", "|---|---|---|---|---|---|---|---|---|---|"]
    methods = list(dict.fromkeys(method for method, _ in runs))           # a method's variants below it
    for (method, variant), seeds in sorted(runs.items(), key=lambda run: methods.index(run[0][0])):
        cells = [method if variant == "base" else f"{method}, {variant}",
                 next(iter(seeds.values()))[0]["settings"] or "defaults", f"{len(seeds)}"]
        tests = [[row for row in rows if row["split"] == "test"] for rows in seeds.values()]
        for values in ([test[when][score] for test in tests] for score in SCORES for when in (0, 1)):
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        goal = math.nan if method.startswith("proxt2i") else target
        seconds, passes = (reach(mean_curve(seeds, axis), goal if axis in axes else math.nan)
                           for axis in ("seconds", "forwards"))
        faster = reach(mean_curve(flow, "seconds"), target) / seconds if seconds else math.nan
        times = f"{seconds:.0f} | {passes:,.0f} | {faster:.2f}".replace("nan", "-")
        text.append(f"| {' | '.join(cells)} | {times} |")
    return "\n".join(text)


def pictures(stem, runs):
    """Each score against each axis: of the methods; of each method and its variants, six a picture."""
    groups = {"": {method: runs[method, variant] for method, variant in sorted(runs) if variant == "base"}}
    for method in dict.fromkeys(method for method, _ in runs):
        all_of_it = {variant: seeds for (other, variant), seeds in runs.items() if other == method}
        base = {"base": all_of_it.pop("base")} if "base" in all_of_it else {}
        for k in range(0, len(all_of_it), 6):
            groups[f"-{method}-{k // 6 + 1}"] = base | dict(list(all_of_it.items())[k:k + 6])
    for name, group in groups.items():
        for score, title in SCORES.items() if group else ():
            data.chart(f"{stem}{name}-{score}.png", {
                f"{title} against {axis_title}": {label: val_curves(seeds, axis, score)
                                                  for label, seeds in group.items()}
                for axis, axis_title in axes_of(runs).items()})


def report(file, folder):
    """Print the table of each race in the csv, and draw it in the folder."""
    for race, runs in races(read(file)).items():
        print(table(race, runs), end="\n\n")
        stem = re.sub(r"[^\w.]+", "-", " ".join((file.stem, *race))).strip("-")
        pictures(folder / stem, runs)


if __name__ == "__main__":
    main(*sys.argv[1:])
