"""What dividing by a group's std does to prompts whose rewards hardly differ: SLAS, Prop. 1 and Lemmas 1 and 2.

    python tests/spread.py tests/spread.png             # draws both panels; prints the tables

Left, 16 prompts of 24 images whose rewards are Gaussian with a std of their own, .005 to .4: the mean |advantage| of a
prompt's images. The group's std gives every prompt the same; the batch's keeps the order. Right: the std of G rewards,
over the true one; its mean is below 1 and it scatters, so that small groups' advantages are also too large by chance.
"""
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import slas  # noqa: E402

SPREADS = (.005, .01, .02, .04, .06, .08, .1, .12, .15, .18, .21, .24, .28, .32, .36, .4)
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)


def weights(batches=400, group_size=24):
    """{std used: mean |A| of each prompt of SPREADS}: the group's, the batch's, and SLAS's with gamma 1."""
    g = torch.Generator().manual_seed(0)
    total = {name: torch.zeros(len(SPREADS)) for name in ("group std", "batch std", "SLAS, gamma 1")}
    for _ in range(batches):
        reward = torch.randn(len(SPREADS), group_size, generator=g) * torch.tensor(SPREADS)[:, None] + .5
        for name, adv in (("group std", slas.group_advantage(reward.flatten(), group_size)),
                          ("batch std", slas.slas_advantage(reward.flatten(), group_size, 0.0)),
                          ("SLAS, gamma 1", slas.slas_advantage(reward.flatten(), group_size, 1.0))):
            total[name] += adv.view(-1, group_size).abs().mean(1) / batches
    return {name: values.tolist() for name, values in total.items()}


def bias(draws=100000):
    """{G: (mean, std, mean in closed form)} of the population std of G standard Gaussian rewards. Lemmas 1 and 2."""
    g = torch.Generator().manual_seed(1)
    table = {}
    for size in SIZES:
        s = torch.randn(draws, size, generator=g, dtype=torch.float64).std(1, correction=0)
        exact = math.sqrt(2 / size) * math.exp(math.lgamma(size / 2) - math.lgamma((size - 1) / 2))
        table[size] = s.mean().item(), s.std().item(), exact
    return table


def main(path):
    shares, stds = weights(), bias()
    data.chart(path, {
        "a prompt's true std: mean |A|": {name: [list(zip(SPREADS, values))] for name, values in shares.items()},
        "group size G: std of G / true std": {
            "mean": [[(size, row[0]) for size, row in stds.items()]],
            "mean + scatter": [[(size, row[0] + row[1]) for size, row in stds.items()]],
            "mean - scatter": [[(size, row[0] - row[1]) for size, row in stds.items()]]}})
    print("true std      " + "".join(f"{spread:>8}" for spread in SPREADS))
    for name, values in shares.items():
        print(f"{name:14}" + "".join(f"{value:8.3f}" for value in values))
    for size, row in stds.items():
        print(f"G = {size:3}  mean {row[0]:.3f} (closed form {row[2]:.3f}), scatter {row[1]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])
