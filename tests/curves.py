"""Draw validation curves of runs against images, network passes and seconds, and print a table of their ends.

    python tests/curves.py tests/curves.png dgpo=runs/dgpo-00* grpo=runs/grpo-00*
    python tests/curves.py --gold out.png dance=runs/grpo-00* slas=runs/slas-00*       # --eval-reward and --gold-reward

Each argument after the picture is LABEL=FOLDER, or LABEL=FOLDER FOLDER ... as a shell expands it: the folders of one
label are its seeds, drawn thin, their mean over the common range drawn thick. FOLDER@N is cut after N rollouts.
"""
import json
import pathlib
import statistics
import sys

from PIL import Image, ImageDraw, ImageFont

PANELS = (("images", "eval", "images"), ("forwards", "eval", "network passes (forward)"),    # x, y, title
          ("seconds", "eval", "training seconds"))
GOLD = (("step", "eval", "proxy against rollouts"), ("step", "eval_gold", "gold against rollouts"),
        ("eval", "eval_gold", "gold against proxy"))
COLORS = [(31, 98, 180), (214, 90, 30), (40, 140, 70), (130, 70, 170), (90, 90, 90)]


def curve(folder):
    """The validation points of one run: a list of metrics rows that hold `eval`, seconds counted from the first
    step."""
    folder, _, last = str(folder).partition("@")
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not last or row["step"] <= int(last)]
    start = next(row["seconds"] for row in rows if row["step"] == 0)
    return [{**row, "seconds": row["seconds"] - start} for row in rows if "eval" in row]


def at(rows, step, key):
    """The value of a key at a step by linear interpolation, the step inside the curve."""
    for a, b in zip(rows, rows[1:]):
        if a["step"] <= step <= b["step"]:
            return a[key] + (b[key] - a[key]) * (step - a["step"]) / (b["step"] - a["step"])
    return rows[-1][key]


def bounds(runs, key):
    """The least and the largest value of a key, a margin around scores."""
    values, margin = [row[key] for curves in runs.values() for rows in curves for row in rows], .02 * ("eval" in key)
    return min(values) - margin, max(values) + margin


def draw(runs, file, panels=PANELS, width=420, height=300):
    """runs: {label: [curve, ...]}; panels: (x, y, title), keys of the rows."""
    font, left, pad = ImageFont.load_default(12), 46, 40
    sheet = Image.new("RGB", (3 * width, height + 30), "white")
    pen = ImageDraw.Draw(sheet)
    for panel, (across, up, title) in enumerate(panels):
        (start, end), (low, high) = bounds(runs, across), bounds(runs, up)
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 14, height - pad, 12

        def point(x, y):
            return x0 + (x1 - x0) * (x - start) / (end - start), y0 + (y1 - y0) * (y - low) / (high - low)
        for i in range(5):
            x, y = start + (end - start) * i / 4, low + (high - low) * i / 4
            pen.line([point(start, y), point(end, y)], fill=(228, 228, 228))
            pen.text((x0 - 34, point(start, y)[1] - 7), f"{y:.2f}", fill="black", font=font)
            pen.text((point(x, low)[0] - 12, y0 + 4), f"{x:,.0f}" if end > 5 else f"{x:.2f}", fill="black", font=font)
        pen.text(((x0 + x1) // 2 - 50, y0 + 20), title, fill="black", font=font)
        for color, (label, curves) in zip(COLORS, runs.items()):
            pale = tuple((c + 2 * 255) // 3 for c in color)
            for rows in curves:
                pen.line([point(row[across], row[up]) for row in rows], fill=pale, width=1)
            first, last = max(rows[0]["step"] for rows in curves), min(rows[-1]["step"] for rows in curves)
            steps = [first + (last - first) * i / 60 for i in range(61)]
            pen.line([point(*(statistics.mean(at(rows, step, key) for rows in curves) for key in (across, up)))
                      for step in steps], fill=color, width=3)
    for i, (color, label) in enumerate(zip(COLORS, runs)):
        pen.line([(left + 130 * i, height + 16), (left + 22 + 130 * i, height + 16)], fill=color, width=3)
        pen.text((left + 28 + 130 * i, height + 9), label, fill="black", font=font)
    sheet.save(file)


def main(*arguments):
    gold, runs = arguments[0] == "--gold", {}
    file, *arguments = arguments[gold:]
    for argument in arguments:
        label, _, folder = argument.rpartition("=")
        label = label or list(runs)[-1]
        runs.setdefault(label, []).append(curve(folder))
    draw(runs, file, GOLD if gold else PANELS)
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


if __name__ == "__main__":
    main(*sys.argv[1:])
