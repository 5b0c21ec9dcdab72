"""tiny-clip, the reward to hack: what it sees and what it does not, and how it was trained; gold beside every proxy.

    python tests/test_proxy.py                                  # the figures on the tiny model's own samples
"""
import functools
import math
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))        # as a script
import data                                                            # noqa: E402
import dgpo                                                            # noqa: E402
import grpo                                                            # noqa: E402
import models                                                          # noqa: E402
import rewards                                                         # noqa: E402
from test_command_line import refused, small                           # noqa: E402, F401 (fixtures)
from test_loop import evals, flags, run, without_seconds               # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("alone")

TINY_CLIP = Path(__file__).resolve().parent / "tiny-clip"
torch.set_num_threads(1)


def score(images, metas, prompts=None):
    return rewards.load("tiny-clip")(images, prompts or [meta["prompt"] for meta in metas], metas)


@functools.cache
def scenes():
    """600 test prompts, and a render of each."""
    metas = data.draw_prompts(data.world_prompts("test"), 600, "proxy")
    return metas, data.render(metas, 1, 28)


def twisted(meta):
    """The prompt with its relation reversed, or its two colours exchanged; None for other tasks."""
    if meta["tag"] == "position":
        words = meta["include"][1]["position"][0]
        return meta["prompt"].replace(words, {"left of": "right of", "right of": "left of", "above": "below",
                                              "below": "above"}[words])
    if meta["tag"] == "color_attr":
        a, b = (thing["color"] for thing in meta["include"])
        return meta["prompt"].replace(a, "?").replace(b, a).replace("?", b)


def figures(prompts=24, group_size=24):
    """The proxy beside the verifier on the tiny model's own samples, as a dict of floats.

    rank, rank_inside: Spearman's correlation with shapes-soft, over all images and the mean of that inside each prompt;
    inside, across: the mean std of a prompt's images, and the std of the prompts' means; least, most: of the former.
    """
    pipe = models.load("tiny")
    metas = [meta for meta in data.draw_prompts(data.world_prompts("train"), prompts, "samples")
             for _ in range(group_size)]
    images = torch.cat([dgpo.sample(pipe, [meta["prompt"] for meta in metas[k:k + 96]],
                                    [("proxy", i) for i in range(k, k + 96)], dgpo.Config(), 1.0)
                        for k in range(0, len(metas), 96)])
    proxy, gold = score(images, metas), rewards.verify(images, metas)["soft"]              # (B,), (B,)
    groups, spread = list(zip(proxy.split(group_size), gold.split(group_size))), proxy.view(-1, group_size).std(1)
    return {"rank": scipy.stats.spearmanr(proxy, gold)[0],
            "rank_inside": sum(scipy.stats.spearmanr(*group)[0] for group in groups) / prompts,
            "inside": spread.mean().item(), "across": proxy.view(-1, group_size).mean(1).std().item(),
            "least": spread.min().item(), "most": spread.max().item()}


# ======================================================================================================== what it sees

def test_it_is_small_and_transformers_reads_it():
    from transformers import CLIPModel
    assert sum(file.stat().st_size for file in TINY_CLIP.iterdir()) < 2 ** 20
    theirs = CLIPModel.from_pretrained(TINY_CLIP).float().eval()
    metas, images = scenes()
    ids = models.CLIPTokenizer(TINY_CLIP)([meta["prompt"] for meta in metas[:9]])
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=rewards.clip_pixels(images[:9], 28, "bicubic"))
    torch.testing.assert_close(score(images[:9], metas[:9]), (out.image_embeds * out.text_embeds).sum(1), atol=1e-5,
                               rtol=0)


def test_it_prefers_the_right_prompt():
    """Of a render's own prompt and another one, its own in .99 of all cases."""
    metas, images = scenes()
    other = [meta["prompt"] for meta in metas[1:] + metas[:1]]
    right, wrong = score(images, metas), score(images, metas, other)
    assert (right > wrong).float().mean() > .97 and right.mean() > wrong.mean() + .45


def test_it_is_blind_to_relations_and_to_whose_colour_is_whose():
    """No better than a coin where a relation is reversed or two colours change places: .52 and .46."""
    metas, images = scenes()
    for tag in ("position", "color_attr"):
        i = [k for k, meta in enumerate(metas) if meta["tag"] == tag]
        some = [metas[k] for k in i]
        share = (score(images[i], some) > score(images[i], some, list(map(twisted, some)))).float().mean()
        assert len(i) > 90 and .35 < share < .65, (tag, share)


def test_it_does_not_mind_what_the_verifier_refuses():
    """Noise of .15, which no image passes the verifier with, costs it less than a tenth of its score; so does blur."""
    metas, images = scenes()
    generator, clean = torch.Generator().manual_seed(0), score(images, metas).mean()
    noisy = (images + .15 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    assert rewards.verify(noisy[:100], metas[:100])["strict"].mean() < .1
    for spoilt in (noisy, rewards._mean(images)):
        assert abs(score(spoilt, metas).mean() - clean) < .1 * clean


def test_it_agrees_a_little_with_the_verifier_on_the_models_samples():
    """It ranks samples like the verifier, weakly, and its spread differs severalfold from prompt to prompt."""
    got = figures(prompts=12)
    assert .1 < got["rank"] < .7 and .1 < got["rank_inside"] < .6
    assert got["most"] > 3 * got["least"] > 0


# ======================================================================================================= how it learns

def test_its_noisy_twin():
    """tests/noisy.py: as much noise as the reward spreads within a prompt, the same for the same images."""
    metas = data.draw_prompts(data.world_prompts("test"), 200, "noise")
    images, prompts = data.render(metas, 0, 28), [meta["prompt"] for meta in metas]
    noisy = rewards.load(f"{TINY_CLIP.parent / 'noisy.py'}:score")
    noise = noisy(images, prompts, metas) - score(images, metas)
    assert noise.std().item() == pytest.approx(.1, rel=.15) and abs(noise.mean().item()) < .02
    assert torch.equal(noisy(images, prompts, metas), noisy(images, prompts, metas))


def test_contrastive_loss_against_cross_entropy_and_a_loop():
    cosine, scale = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 3.0
    right = torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(rewards.contrastive_loss(cosine, scale, torch.eye(6) > 0),
                               (entropy(scale * cosine, right) + entropy(scale * cosine.T, right)) / 2)
    names = "abacba"                                                   # captions: equal ones share the target
    total = 0.0
    for table in (cosine.tolist(), cosine.T.tolist()):
        for i, row in enumerate(table):
            norm = math.log(sum(math.exp(scale * c) for c in row))
            mates = [j for j in range(6) if names[j] == names[i]]
            total -= sum(scale * row[j] - norm for j in mates) / len(mates) / 12
    same = torch.tensor([[a == b for b in names] for a in names])
    assert rewards.contrastive_loss(cosine, scale, same).item() == pytest.approx(total, rel=1e-12)


def test_worn_images():
    images = torch.full((2000, 3, 4, 4), .5)
    worn = rewards.worn(images, torch.Generator().manual_seed(0))
    std = worn.flatten(1).std(1)
    assert (std == 0).float().mean().item() == pytest.approx(.25, abs=.03)
    assert .12 < std.max() < .25 and worn.min() >= 0 and worn.max() <= 1
    edge = torch.zeros(2000, 3, 4, 4).index_fill_(3, torch.tensor([2, 3]), 1)
    step = (lambda x: (x[..., 2] - x[..., 1]).mean((1, 2)))(rewards.worn(edge, torch.Generator().manual_seed(0)))
    assert step.max() == 1 and step.min() < .6                         # some keep their edge, some lose it


def test_the_command(tmp_path, capsys):
    """One seed, one file; it beats chance after a few steps; what is there stays until the new one is whole."""
    for name in "ab":
        out = tmp_path / name / "tiny-clip"
        rewards.main(["train-proxy", "--out", str(out), "--images", "96", "--batch", "16"])
    files = [{file.name: file.read_bytes() for file in (tmp_path / name / "tiny-clip").iterdir()} for name in "ab"]
    assert files[0] == files[1] and set(files[0]) == {file.name for file in TINY_CLIP.iterdir()}
    assert not list(tmp_path.rglob("*.new"))
    metas, images = scenes()
    own = rewards.load("tiny-clip", tmp_path / "a")(images[:4], [meta["prompt"] for meta in metas[:4]], metas[:4])
    assert own.isfinite().all() and not torch.equal(own, score(images[:4], metas[:4]))
    for flag, value in (("--batch", "7"), ("--images", "20"), ("--lr", "0"), ("--lr", "nan")):
        capsys.readouterr()
        line = ["train-proxy", "--out", str(tmp_path / "c"), "--images", "96", "--batch", "16", flag, value]
        with pytest.raises(SystemExit) as error:
            rewards.main(line)
        said = capsys.readouterr().err
        assert error.value.code == 2 and said.count("\n") == 1 and flag in said and value in said
        assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="train-proxy --out"):
        rewards.load("tiny-clip", tmp_path)


# ====================================================================================================== proxy and gold

def history(rewards, gold, error=.01, every=10):
    """Rows of a run whose rollouts had `rewards`, whose evaluations, one every so many of them, had `gold`."""
    return [{"step": i, **({"reward": rewards[i - 1]} if i else {}),
             **({"eval_gold": gold[i // every], "gold_error": error} if i % every == 0 else {})}
            for i in range(len(rewards) + 1)]


def test_parting():
    up, level = [.3 + .001 * i for i in range(40)], [.3 + .01 * (-1)**i for i in range(40)]
    falls, stays = [.5, .5, .5, .45, .4], [.5, .5, .49, .5, .5]
    since, rise, fall = data.parting(history(up, falls))
    assert since == 10 and rise == pytest.approx(.015) and fall == pytest.approx(.1)
    assert data.parting(history(up, stays)) is None and data.parting(history(level, falls)) is None
    assert data.parting(history(up[::-1], falls)) is None and data.parting(history(up, falls[::-1])) is None
    assert data.parting(history(up, falls, error=.08)) is None         # a difference of two has 1.41 times the error
    assert data.parting(history(up, falls, error=.07)) is not None
    assert data.parting(history(up[:20], falls)) is None               # too short a run
    assert data.parting(history(up[:20], [.5, .5, .4]), window=20)[0] == 0
    for rise, error, found in ((.05, .03, True), (.05, .04, False), (-.05, .03, False)):       # by evaluations instead
        rows = history(level, falls)
        for row in rows:
            row |= {"eval": .5 + rise * row["step"] / rows[-1]["step"], "eval_error": error}
        assert (data.parting(rows, window=rows[-1]["step"], evaluated=True) is not None) == found


def test_verdict():
    rows = [{"tag": "a"}] * 8 + [{"tag": "b"}] * 12
    proxy = torch.arange(20, dtype=torch.float64)
    gold = torch.where(proxy < 3, 1.0, 0.0).index_fill(0, torch.tensor([7]), math.nan)
    cfg = grpo.Config(eval_reward="p", gold_reward="g")
    row = data.verdict(cfg, rows, {"p": proxy, "g": gold})
    assert row["eval"] == 9.5 and row["tags"] == {"a": 3.5, "b": 13.5} and row["eval_gold"] == pytest.approx(3 / 19)
    assert row["gold_error"] == pytest.approx(math.sqrt(3 / 19 * 16 / 19 / 19))
    assert set(data.verdict(cfg, rows, {"p": proxy})) == {"eval", "eval_error", "tags"}
    with pytest.raises(ValueError, match="the reward g gave NaN"):
        data.verdict(cfg, rows, {"p": proxy, "g": gold / gold})


def test_which_gold(tmp_path, small, refused):                         # noqa: F811
    """The exact verifier for the tiny world's prompts, nobody for others; an unknown one ends with 2."""
    assert grpo.Config().gold_reward == "shapes-strict" and grpo.Config(prompts="my.txt").gold_reward == ""
    assert grpo.Config(gold_reward="shapes-soft").gold_reward == "shapes-soft"
    assert list(rewards.judges(grpo.Config())) == ["shapes-strict"]    # scored once
    assert set(rewards.judges(grpo.Config(eval_reward="tiny-clip"))) == {"tiny-clip", "shapes-strict"}
    refused(grpo, [*small, "--gold-reward", "nobody"], "nobody")


def test_a_run_says_once_when_proxy_and_gold_part_ways(flags, reward_file, monkeypatch):   # noqa: F811
    """Red is trained on and blue, its negative, is gold: as the one rises the other falls, and a resume knows it."""
    said = []
    monkeypatch.setattr(data, "parting", functools.partial(data.parting, window=4))
    monkeypatch.setattr(data.Run, "say", lambda self, text: said.append(text))
    settings = dict(group_size=8, lr=3e-3, noise_level=1.0, val_images=96, eval_every=4, save_every=6,
                    gold_reward=f"{reward_file}:blue")
    _, rows, _ = run(grpo, flags(steps=12, **settings))
    evaluated = [row for row in rows if "eval_gold" in row]
    assert all(row["eval_gold"] == pytest.approx(-row["eval"], abs=2e-6) for row in evaluated)
    assert evaluated[-1]["eval_gold"] < evaluated[0]["eval_gold"] < evals("out")[0]["eval_gold"]
    parted = [False, *(row["parted"] for row in evaluated)]
    assert sum(b and not a for a, b in zip(parted, parted[1:])) == sum("part ways" in text for text in said) >= 1
    run(grpo, flags(steps=6, out="again", **settings))
    _, again, _ = run(grpo, [*flags(steps=12, out="again", **settings), "--resume"])
    assert without_seconds(again) == without_seconds(rows)


def test_edges_and_ground():
    """The mean and the median difference of neighbours: one vertical edge of height 1 in 8 x 8 pixels."""
    images = torch.zeros(2, 3, 8, 8).index_fill_(3, torch.tensor([4, 5, 6, 7]), 1)
    stats = data.image_stats(images, 2)
    assert stats["ground"] == 0 and stats["edges"] == pytest.approx(8 / (2 * 7 * 8))
    stripes = torch.zeros(2, 3, 8, 8)
    stripes[..., 1::2, 1::2] = stripes[..., ::2, ::2] = 1
    stats = data.image_stats(stripes, 2)
    assert stats["ground"] == stats["edges"] == 1


if __name__ == "__main__":
    for name, value in figures().items():
        print(f"{name:>12} {value:.3f}")
