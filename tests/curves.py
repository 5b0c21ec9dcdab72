"""Draw validation curves of runs against images, network passes and seconds, and print a table of their ends.

    python tests/curves.py tests/curves.png dgpo=runs/dgpo-00* grpo=runs/grpo-00*

Each argument after the picture is LABEL=FOLDER, or LABEL=FOLDER FOLDER ... as a shell expands it: the folders of one
label are its seeds, drawn thin, their mean over the common range drawn thick. FOLDER@N is cut after N rollouts.
"""
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402

AXES = {"images": "images", "forwards": "network passes (forward)", "seconds": "training seconds"}


def curve(folder):
    """The validation points of one run: a list of metrics rows that hold `eval`, seconds counted from the first
    step."""
    folder, _, last = str(folder).partition("@")
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not last or row["step"] <= int(last)]
    start = next(row["seconds"] for row in rows if row["step"] == 0)
    return [{**row, "seconds": row["seconds"] - start} for row in rows if "eval" in row]


def main(file, *arguments):
    runs = {}
    for argument in arguments:
        label, _, folder = argument.rpartition("=")
        label = label or list(runs)[-1]
        runs.setdefault(label, []).append(curve(folder))
    data.chart(file, {title: {label: [[(row[axis], row["eval"]) for row in rows] for rows in curves]
                              for label, curves in runs.items()} for axis, title in AXES.items()})
    print("| method | seeds | last | best | images | passes | seconds |\n|---|---|---|---|---|---|---|")
    for label, curves in runs.items():
        ends = [rows[-1] for rows in curves]
        last = ", ".join(f"{end['eval']:.3f}" for end in ends)
        best = ", ".join(f"{max(row['eval'] for row in rows):.3f}" for rows in curves)
        print(f"| {label} | {len(curves)} | {last} | {best} "
              f"| {statistics.mean(end['images'] for end in ends):,.0f} "
              f"| {statistics.mean(end['forwards'] for end in ends):,.0f} "
              f"| {statistics.mean(end['seconds'] for end in ends):.0f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
