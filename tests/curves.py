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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402

PANELS = (("images", "eval", "images"), ("forwards", "eval", "network passes (forward)"),    # x, y, title
          ("seconds", "eval", "training seconds"))
GOLD = (("step", "eval", "proxy against rollouts"), ("step", "eval_gold", "gold against rollouts"),
        ("eval", "eval_gold", "gold against proxy"))


def curve(folder):
    """The validation points of one run: a list of metrics rows that hold `eval`, seconds counted from the first
    step."""
    folder, _, last = str(folder).partition("@")
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not last or row["step"] <= int(last)]
    start = next(row["seconds"] for row in rows if row["step"] == 0)
    return [{**row, "seconds": row["seconds"] - start} for row in rows if "eval" in row]


def main(*arguments):
    gold, runs = arguments[0] == "--gold", {}
    file, *arguments = arguments[gold:]
    for argument in arguments:
        label, _, folder = argument.rpartition("=")
        label = label or list(runs)[-1]
        runs.setdefault(label, []).append(curve(folder))
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


if __name__ == "__main__":
    main(*sys.argv[1:])
