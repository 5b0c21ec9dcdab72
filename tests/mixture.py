"""Samplers on a mixture of Gaussians in the plane, with exact answers in place of a network: distance and picture.

    python tests/mixture.py tests/mixture.png           # clouds after 4 and 10 steps; prints the table of distances

The proximal operator of a mixture has no closed form. It is found by minimisation, from every mode, by a map that never
increases the objective; the score is exact. Distances are W2 between 1200 samples and 1200 of the data, by optimal
assignment (scipy). Both are drawn symmetric under the mixture's rotations, so that no mode has more of them by chance;
two draws of the data itself are still apart, the last rows.
"""
import math
import pathlib
import sys

import torch
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import proxt2i  # noqa: E402

STEPS, SAMPLERS = (4, 6, 10, 25), ("hybrid", "pda", "sde", "sde-mean", "ode", "dpm")
MODES = torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(6) * math.pi / 3], dtype=torch.float64) * 1.5


def turned(points):
    """(n, 2) points and their turns by 60, 120, ... degrees, onto which the mixture maps itself: (6 n, 2)."""
    a = torch.arange(6, dtype=torch.float64) * math.pi / 3
    turns = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1).view(6, 2, 2)
    return (points @ turns.mT).flatten(0, 1)


def data_samples(std, n, seed):
    """n points of the mixture of six equal modes on a circle of radius 1.5: (n, 2) float64."""
    g = torch.Generator().manual_seed(seed)
    return turned(MODES[0] + std * torch.randn(n // 6, 2, generator=g, dtype=torch.float64))


def answers(std):
    """prox(y, t, lam) and score(x, t) of the diffused mixture, for points as images (n, 2, 1, 1)."""
    def moments(t):
        a = proxt2i.alpha_bar(t)
        return math.sqrt(a) * MODES, a * std ** 2 + 1 - a

    def share(x, means, var):                                          # of each mode in a point's density (n, modes)
        return (-(x[:, None] - means).square().sum(2) / (2 * var)).softmax(1)

    def score(x, t):
        x, (means, var) = x[:, :, 0, 0], moments(t)
        return ((share(x, means, var) @ means - x) / var)[:, :, None, None]

    def prox(y, t, lam):
        y, (means, var) = y[:, :, 0, 0], moments(t)
        best, least = y, torch.full((len(y),), math.inf, dtype=y.dtype)
        for mean in means:
            x = (var * y + lam * mean) / (var + lam)                   # where this mode alone would put it
            for _ in range(200):                                       # EM: the objective never rises
                x = (var * y + lam * share(x, means, var) @ means) / (var + lam)
            value = (x - y).square().sum(1) / (2 * lam) - (
                -(x[:, None] - means).square().sum(2) / (2 * var)).logsumexp(1)
            best = torch.where((value < least)[:, None], x, best)
            least = torch.minimum(value, least)
        return best[:, :, None, None]
    return {"prox": prox, "score": score}


def cloud(name, std, steps, n=1200, seed=0):
    """n points after so many steps of a sampler: (n, 2)."""
    g = torch.Generator().manual_seed(seed)

    def draw(_):
        return turned(torch.randn((n // 6, 2), generator=g, dtype=torch.float64))[:, :, None, None]
    return proxt2i.run_chain(name, answers(std)[proxt2i.SAMPLERS[name]], draw("start"), steps, draw)[:, :, 0, 0]


def w2(a, b):
    """The Wasserstein-2 distance of two clouds of as many points."""
    cost = torch.cdist(a, b).square().numpy()
    return math.sqrt(cost[linear_sum_assignment(cost)].mean())


def main(path):
    side, left, top = 150, 90, 24
    rows = [(std, steps) for std in (.1, .6) for steps in (4, 10)]
    columns = (*SAMPLERS, "data")
    sheet = Image.new("RGB", (left + side * len(columns), top + side * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, name in enumerate(columns):
        pen.text((left + c * side + 55, 6), name, fill="black")
    for r, (std, steps) in enumerate(rows):
        pen.text((6, top + r * side + side // 2), f"std {std}\n{steps} steps", fill="black")
        for c, name in enumerate(columns):
            if name == "pda" and steps < 10:                           # gamma >= 2: the step has no solution
                continue
            points = data_samples(std, 1200, 1) if name == "data" else cloud(name, std, steps)
            for x, y in points.tolist():
                x, y = side * (x + 3) / 6, side * (y + 3) / 6
                if 0 <= x < side and 0 <= y < side:
                    pen.point((left + c * side + x, top + r * side + y), fill=(31, 98, 180))
    sheet.save(path)
    print("std sampler   " + "".join(f"{n:>8}" for n in STEPS))
    for std in (.1, .6):
        for name in SAMPLERS:
            line = ["       -" if name == "pda" and n < 10 else
                    f"{w2(cloud(name, std, n), data_samples(std, 1200, 1)):8.3f}" for n in STEPS]
            print(f"{std:3} {name:10}" + "".join(line), flush=True)
        print(f"{std:3} data      {w2(data_samples(std, 1200, 2), data_samples(std, 1200, 1)):8.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])
