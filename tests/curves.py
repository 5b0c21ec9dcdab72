"""Draw validation curves of runs against images, network passes and seconds, and print a table of their ends.

    python tests/curves.py tests/curves.png dgpo=runs/dgpo-00* grpo=runs/grpo-00*

Each argument after the picture is LABEL=FOLDER, or LABEL=FOLDER FOLDER ... as a shell expands it: the folders of one
label are its seeds, drawn thin, their mean over the common range drawn thick. FOLDER@N is cut after N rollouts.
"""
import json
import pathlib
import statistics
import sys

from PIL import Image, ImageDraw, ImageFont

AXES = {"images": "images", "forwards": "network passes (forward)", "seconds": "training seconds"}
COLORS = [(31, 98, 180), (214, 90, 30), (40, 140, 70), (130, 70, 170), (90, 90, 90)]


def curve(folder):
    """The validation points of one run: a list of metrics rows that hold `eval`, seconds counted from the first
    step."""
    folder, _, last = str(folder).partition("@")
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not last or row["step"] <= int(last)]
    start = next(row["seconds"] for row in rows if row["step"] == 0)
    return [{**row, "seconds": row["seconds"] - start} for row in rows if "eval" in row]


def at(rows, axis, x):
    """The score at x by linear interpolation, x inside the curve."""
    for a, b in zip(rows, rows[1:]):
        if a[axis] <= x <= b[axis]:
            return a["eval"] + (b["eval"] - a["eval"]) * (x - a[axis]) / max(b[axis] - a[axis], 1e-9)
    return rows[-1]["eval"]


def draw(runs, file, width=420, height=300):
    """runs: {label: [curve, ...]}. One panel for each axis, the same vertical scale."""
    font, left, pad = ImageFont.load_default(12), 46, 40
    values = [row["eval"] for curves in runs.values() for rows in curves for row in rows]
    low, high = min(values) - 0.02, max(values) + 0.02
    sheet = Image.new("RGB", (3 * width, height + 30), "white")
    pen = ImageDraw.Draw(sheet)
    for panel, (axis, title) in enumerate(AXES.items()):
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 14, height - pad, 12
        top = max(rows[-1][axis] for curves in runs.values() for rows in curves)

        def point(x, y):
            return x0 + (x1 - x0) * x / top, y0 + (y1 - y0) * (y - low) / (high - low)
        for i in range(5):
            y = low + (high - low) * i / 4
            pen.line([point(0, y), point(top, y)], fill=(228, 228, 228))
            pen.text((x0 - 34, point(0, y)[1] - 7), f"{y:.2f}", fill="black", font=font)
            pen.text((point(top * i / 4, 0)[0] - 12, y0 + 4), f"{top * i / 4:,.0f}"[:9], fill="black", font=font)
        pen.text(((x0 + x1) // 2 - 50, y0 + 20), title, fill="black", font=font)
        for color, (label, curves) in zip(COLORS, runs.items()):
            pale = tuple((c + 2 * 255) // 3 for c in color)
            for rows in curves:
                pen.line([point(row[axis], row["eval"]) for row in rows], fill=pale, width=1)
            first, last = max(rows[0][axis] for rows in curves), min(rows[-1][axis] for rows in curves)
            xs = [first + (last - first) * i / 60 for i in range(61)]
            pen.line([point(x, statistics.mean(at(rows, axis, x) for rows in curves)) for x in xs], fill=color, width=3)
    for i, (color, label) in enumerate(zip(COLORS, runs)):
        pen.line([(left + 130 * i, height + 16), (left + 22 + 130 * i, height + 16)], fill=color, width=3)
        pen.text((left + 28 + 130 * i, height + 9), label, fill="black", font=font)
    sheet.save(file)


def main(file, *arguments):
    runs = {}
    for argument in arguments:
        label, _, folder = argument.rpartition("=")
        label = label or list(runs)[-1]
        runs.setdefault(label, []).append(curve(folder))
    draw(runs, file)
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
