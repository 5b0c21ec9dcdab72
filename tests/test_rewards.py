"""The exact verifier of the tiny world, and how rewards are loaded and called.

Share of 1200 training scenes that are strictly right, and of 400 test scenes after damage, by image size:

    size                                  32      28      24
    clean                              1.000   1.000   1.000
    Gaussian noise, std .06             .999   1.000    .999
    Gaussian noise, std .1              .988    .984    .984
    3 x 3 box blur                     1.000   1.000    .991
    bent by .3 pixels                  1.000    .999    .999
    bent by .5 pixels                   .989    .989    .989
    paired with a prompt that differs   .000    .000    .000
    checker of 2 or 4 pixels, +-.05     .000    .000    .000
    half in another colour              .000    .000    .002
    a hole of 3 x 3 pixels inside       .000    .000    .000
    an extra blob of 5 pixels           .000    .000    .000
    split by a gap of 2 pixels          .000    .000    .000
    split by a gap of 1 pixel           .050    .043    .045   rings, whose strokes are two or three pixels wide

At an edge, a nick of 3 x 3 pixels passes for a bent edge in a third of the images.
"""
import csv
import json
import math
import sys

import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image

import data
import rewards

torch.set_num_threads(1)
PALETTE = torch.tensor(list(data.COLORS.values()))


def scenes(n, seed=1, split="train", size=32):
    metas = data.draw_prompts(data.world_prompts(split), n, seed)
    return metas, data.render(metas, seed + 1, size)


def rate(images, metas, key="strict", batch=200):
    starts = range(0, len(metas), batch)
    return torch.cat([rewards.verify(images[i:i + batch], metas[i:i + batch])[key] for i in starts]).mean().item()


def gauss(images, std, seed=0):
    return images + std * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def bend(images, amplitude, seed=0):
    """Move every pixel by a smooth random field with a standard deviation of about `amplitude` pixels at size 32."""
    n, size = len(images), images.shape[-1]
    field = torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * amplitude / 16
    field = F.interpolate(field, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    axis = (torch.arange(size) + .5) / size * 2 - 1
    return F.grid_sample(images, torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2) + field,
                         padding_mode="border", align_corners=False)


def differ(a, b):
    """Whether no image can be right for both metas."""
    def classes(meta):
        return {o["class"]: o["count"] for o in meta["include"]}

    def colors(meta):
        return {o["class"]: o["color"] for o in meta["include"] if "color" in o}
    return classes(a) != classes(b) or any(colors(b).get(k, c) != c for k, c in colors(a).items())


HONEST = {"clean": lambda x: x, "noise .06": lambda x: gauss(x, .06), "noise .1": lambda x: gauss(x, .1),
          "blur": rewards._mean, "bend .3": lambda x: bend(x, .3), "bend .5": lambda x: bend(x, .5)}
FLOOR = {"clean": (.995, .995, .995), "noise .06": (.98, .98, .98), "noise .1": (.95, .95, .95),
         "blur": (.98, .98, .95), "bend .3": (.99, .99, .99), "bend .5": (.97, .97, .97)}


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("size", [32, 28, 24])
def test_honest_images_are_right(name, size):
    n = 1200 if name == "clean" and size == 32 else 300
    metas, images = scenes(n, size=size)
    images = HONEST[name](images)
    assert rate(images, metas) >= FLOOR[name][(32, 28, 24).index(size)]
    if name == "clean":
        for task in data.TASKS:
            some = [i for i, m in enumerate(metas) if m["tag"] == task]
            assert rate(images[some], [metas[i] for i in some]) >= .99
        soft = rewards.verify(images[:300], metas[:300])["soft"]
        assert soft.min() > .96 and soft.mean() > .99


@pytest.mark.parametrize("size", [32, 24])
def test_images_of_other_prompts_are_wrong(size):
    metas, images = scenes(1200, size=size)
    other = metas[1:] + metas[:1]
    pairs = [i for i in range(len(metas)) if differ(metas[i], other[i])]
    assert len(pairs) > 1000
    asked = [other[i] for i in pairs]
    assert rate(images[pairs], asked) <= .005
    assert rate(images[pairs], asked, "soft") < .3


def variants(meta):
    """Metas that a scene of this one is nearly, but not, right for."""
    include = meta["include"]
    if meta["tag"] == "counting":
        for n in {2, 3, 4} - {include[0]["count"]}:
            yield [{**include[0], "count": n}]
    if meta["tag"] == "colors":
        yield [{**include[0], "color": "red" if include[0]["color"] != "red" else "pink"}]
    if meta["tag"] == "color_attr":
        yield [{**a, "color": b["color"]} for a, b in (include, include[::-1])]
    if meta["tag"] == "position":
        for relation in set(data.RELATIONS) - {include[1]["position"][0]}:
            yield [include[0], {**include[1], "position": [relation, 0]}]
    if len(include) == 2:
        yield include[:1]
    if meta["tag"] == "single_object":
        yield [{**include[0], "class": "heart" if include[0]["class"] != "heart" else "circle"}]
        yield [{**include[0], "count": 2}]


def test_near_misses_are_wrong_and_their_soft_score_is_lower():
    metas, images = scenes(300)
    right = rewards.verify(images, metas)["soft"]
    rows = [(i, {**m, "include": v}) for i, m in enumerate(metas) for v in variants(m)]
    index, wrong = [i for i, _ in rows], [m for _, m in rows]
    scores = rewards.verify(images[index], wrong)
    assert scores["strict"].sum() == 0
    assert (scores["soft"] < right[index] - .1).all()
    assert scores["soft"].mean() > .2                                  # graded: a near miss is worth something


def checker(images, period, amplitude):
    i = torch.arange(images.shape[-1])
    return images + amplitude * ((i[:, None] // period + i // period) % 2 * 2 - 1)


def test_a_ground_that_is_not_plain_and_light_is_wrong():
    metas, images = scenes(200, split="test")
    ground, rest, far, *_ = rewards._objects(images)
    far, size = far[:, None], images.shape[-1]
    ramp = torch.arange(size) / size
    patch = .04 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(1, size // 4, size // 4)
    grounds = {f"checker {p}": torch.where(far > 0, checker(images, p, .05), images) for p in (1, 2, 4, 8)}
    grounds |= {"checker over all": checker(images, 2, .05),
                "stripes": images + .05 * (torch.arange(size) // 2 % 2 * 2 - 1),
                "patch grid": images + patch * far, "ramp": images - .15 * ramp * far, "noise .15": gauss(images, .15),
                "white": torch.where(far > 0, 1., images), "grey": torch.where(far > 0, .75, images),
                "tinted": torch.where(far > 0, torch.tensor([.96, .88, .86])[:, None, None], images)}
    for name, bad in grounds.items():
        assert rate(bad, metas) <= .005, name
        assert rate(bad, metas, "soft") < rate(images, metas, "soft") - .1, name


def test_images_that_show_nothing_are_wrong():
    metas, images = scenes(100)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    for bad in (noise, noise.round(), torch.zeros_like(images), torch.ones_like(images), torch.full_like(images, .9),
                1 - images, rewards._mean(noise, 7)):
        assert rate(bad, metas) == 0
        assert rate(bad, metas, "soft") < .1
    assert rate(rewards._objects(images)[0][:, :, None, None].expand_as(images), metas, "soft") == 0


def test_colours_that_are_not_the_worlds_are_wrong():
    """Paint that is clipped, stronger or paler by so much that even pink and black are .12 away from themselves."""
    metas, images = scenes(200, split="test")
    ground, rest, far, *_ = rewards._objects(images)
    paint = 1 - far[:, None]
    for bad in (torch.where(paint > 0, (images - .5) * 1.6 + .5, images),
                torch.where(paint > 0, (images > .5).float(), images),
                ground[:, :, None, None] + 1.6 * rest, ground[:, :, None, None] + .5 * rest):
        assert rate(bad, metas) <= .005
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    colored = [i for i, m in enumerate(metas) if m["tag"] == "colors" and m["include"][0]["color"] != "black"]
    assert rate(grey[colored], [metas[i] for i in colored]) == 0


def damaged(images, damage):
    """Apply damage(image (3, S, S), mask (S, S) of its largest object, ground (3, 1, 1), i) to each image."""
    ground, _, _, _, b, k, own, _ = rewards._objects(images)
    first = own[k == 0]
    rows = zip(images, first, ground[:, :, None, None])
    return torch.stack([damage(image, mask > 0, g, i) for i, (image, mask, g) in enumerate(rows)])


def grown(mask, n=1):
    return rewards._grow(mask[None].float(), n)[0] > 0


def split(width):
    def damage(image, mask, ground, i):
        start = mask.nonzero()[:, 1].float().mean().round() - width // 2
        x = torch.arange(len(mask))
        return torch.where((x >= start) & (x < start + width) & grown(mask), ground, image)
    return damage


def half(image, mask, ground, i, paint=None):
    y = mask.nonzero()[:, 0].float().mean()
    lower = (torch.arange(len(mask)) > y)[:, None].expand_as(mask)
    return torch.where(lower & (grown(mask, 2) if paint is None else mask), ground if paint is None else paint, image)


def half_other(image, mask, ground, i):
    mean = image[:, mask].mean(1)
    return half(image, mask, ground, i, PALETTE[(PALETTE - mean).norm(dim=1).argsort()[1 + i % 7]][:, None, None])


def hollow(image, mask, ground, i):
    """A hole of 3 x 3 pixels, a pixel or more inside the edge, where there is room for one."""
    room = (~grown(~mask, 2)).nonzero()
    y, x = room[len(room) // 2].tolist() if len(room) else (0, 0)
    hole = torch.zeros_like(mask)
    hole[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2] = True
    return torch.where(hole, ground, image) if len(room) else ground.expand_as(image)


def blob(radius):
    def damage(image, mask, ground, i):
        objects = (image - ground).norm(dim=0) > .1
        y, x = (~grown(objects, math.ceil(radius) + 2)).nonzero()[i % 7 * 11].tolist()
        axis = torch.arange(len(mask))
        spot = (axis[:, None] - y)**2 + (axis - x)**2 <= radius**2
        return torch.where(spot, PALETTE[i % 8][:, None, None], image)
    return damage


def bridge(image, mask, ground, i):
    """A line, two pixels wide, from the largest object to the further border."""
    y, x = mask.nonzero().float().mean(0).round().long().tolist()
    image = image.clone()
    image[:, y:y + 2, slice(x) if 2 * x > len(mask) else slice(x, None)] = image[:, mask].mean(1)[:, None, None]
    return image


def erase(image, mask, ground, i):
    return torch.where(grown(mask, 2), ground, image)


def double(image, mask, ground, i):
    """A copy of the largest object, two pixels beside it where there is room; else an empty image."""
    at = mask.nonzero().T                                              # (2, n): y, x
    extent = at.amax(1) - at.amin(1) + 3
    for move in torch.cat((extent.diag(), -extent.diag())):
        y, x = to = at + move[:, None]
        if to.min() >= 0 and to.max() < len(mask) and (image[:, y, x] - ground[:, 0]).abs().max() < .1:
            image = image.clone()
            image[:, y, x] = image[:, at[0], at[1]]
            return image
    return ground.expand_as(image)


@pytest.mark.parametrize("damage, limit", [
    (split(1), .08), (split(2), 0), (split(3), 0), (half_other, 0), (hollow, .01), (bridge, 0), (erase, 0), (double, 0),
    (blob(1), 0), (blob(1.5), 0), (blob(3), 0)], ids=[
    "split by 1", "split by 2", "split by 3", "half in another colour", "hollow", "bridge", "erased", "doubled",
    "5 px blob", "9 px blob", "29 px blob"])
def test_damaged_objects_are_wrong(damage, limit):
    metas, images = scenes(200, split="test")
    bad = damaged(images, damage)
    assert rate(bad, metas) <= limit
    assert rate(bad, metas, "soft") < .75


def test_half_an_object_is_wrong_unless_it_is_a_smaller_one():
    metas, images = scenes(300, split="test")
    whole = [i for i, m in enumerate(metas) if all(o["class"] != "triangle" for o in m["include"])]
    assert rate(damaged(images[whole], half), [metas[i] for i in whole]) <= .01


def test_sizes_outside_the_world_are_wrong():
    metas, images = scenes(100)
    ground = rewards._objects(images)[0]
    tiny = ground[:, :, None, None].repeat(1, 1, 32, 32)
    tiny[:, :, 8:18, 8:18] = F.interpolate(images, size=10, mode="area")
    assert rate(tiny, metas) == 0


def test_values_outside_the_range_nan_and_other_sizes():
    metas, images = scenes(8)
    images[3, 0, 0, 0] = math.nan
    scores = rewards.load("shapes")(images, [m["prompt"] for m in metas], metas)
    assert scores.dtype == torch.float32 and scores.shape == (8,)
    assert scores.isnan().tolist() == [i == 3 for i in range(8)]
    metas, images = scenes(60, size=48)
    assert rate(images, metas) >= .98
    ring, star = {"class": "ring", "count": 1}, {"class": "star", "count": 1}
    for meta in ({"prompt": "a dog"}, {"include": [{"class": "dog", "count": 1}]}, {"include": []},
                 {"include": [{"class": "ring"}]}, {"include": [{**ring, "color": "mauve"}]}, {"include": "ring"},
                 {"include": [{**ring, "count": 5}]}, {"include": [ring, {**ring, "color": "red"}]},
                 {"include": [ring, {**star, "position": ["inside", 0]}]},
                 {"include": [ring, {**star, "position": ["above", 1]}]}):
        with pytest.raises(ValueError, match="cannot check"):
            rewards.verify(images[:1], [meta])


def test_images_that_are_not_square_are_refused():
    metas, images = scenes(2)
    with pytest.raises(ValueError, match=r"\(2, 3, 28, 32\): make them square"):
        rewards.load("shapes")(images[:, :, 2:-2], ["", ""], metas)


def test_components_of_a_spiral_and_of_many_dots():
    mask = torch.zeros(2, 24, 24)
    top, bottom, left, right = 0, 23, 0, 23
    while top + 2 < bottom:                                            # one long path, a worst case for propagation
        mask[0, top, left:right + 1] = mask[0, top:bottom + 1, right] = mask[0, bottom, left:right + 1] = 1
        mask[0, top + 2:bottom + 1, left] = 1
        mask[0, top + 2, left:left + 3] = 1
        top, bottom, left, right = top + 2, bottom - 2, left + 2, right - 2
    mask[1, ::2, ::2] = 1
    random = (torch.rand(6, 24, 24, generator=torch.Generator().manual_seed(0)) > .6).float()
    mask = torch.cat((mask, random))
    for m, labels in zip(mask, rewards.components(mask)):
        want, n = scipy.ndimage.label(m.numpy(), structure=[[1] * 3] * 3)
        pairs = set(zip(want.ravel().tolist(), labels.tolist()))
        assert len(pairs) == len(labels.unique()) == n + (m == 0).any().int().item()


def test_load_names_sums_and_functions(tmp_path):
    metas, images = scenes(6)
    prompts = [m["prompt"] for m in metas]
    parts = rewards.verify(images, metas)
    call = lambda spec: rewards.load(spec)(images, prompts, metas)     # noqa: E731
    assert torch.equal(call("shapes-strict"), parts["strict"]) and torch.equal(call("shapes-soft"), parts["soft"])
    torch.testing.assert_close(call("shapes"), (parts["soft"] + parts["strict"]) / 2)
    torch.testing.assert_close(call("shapes-soft:0.5, shapes-strict:-2"), .5 * parts["soft"] - 2 * parts["strict"])
    file = tmp_path / "mine.py"
    file.write_text("def red(images, prompts, meta):\n    return images[:, 0].mean((1, 2)).tolist()\n"
                    "def short(images, prompts, meta):\n    return images[1:, 0, 0, 0]\n")
    torch.testing.assert_close(call(f"{file}:red:2"), 2 * images[:, 0].mean((1, 2)))
    with pytest.raises(RuntimeError, match=r"short.*\(5,\) for 6 images"):
        call(f"{file}:short")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    for spec in ("shape", "", "shapes:x", "shapes:nan", "shapes,", f"{file}:blue", f"{tmp_path}/none.py:red", f"{file}",
                 f"{tmp_path}/broken.py:red"):
        with pytest.raises(ValueError) as e:
            rewards.load(spec)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="shapes, shapes-soft, shapes-strict"):
        rewards.load("pretty")
    for dtype in ("float16", "bf16", None, torch.bfloat16):
        with pytest.raises(ValueError, match="dtype=.*'float32'.*'bfloat16'"):
            rewards.load("tiny-clip", dtype=dtype)


def test_a_file_with_dataclasses(tmp_path):
    """They look their module up by its name, which is no other module's, nor that of a file that failed."""
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Mine:\n"
        "    share: float = .5\n    def __call__(self, images, prompts, meta):\n"
        "        return [self.share] * len(images)\nmine = Mine()\n")
    (tmp_path / "broken.py").write_text("raise AttributeError('none')")
    for name in ("with_a_class", "json"):
        (tmp_path / f"{name}.py").write_text(text)
        assert rewards.load(f"{tmp_path}/{name}.py:mine")(torch.zeros(2, 3, 4, 4), ["", ""]).tolist() == [.5, .5]
    assert sys.modules["json"] is json
    before = set(sys.modules)
    with pytest.raises(ValueError, match="broken.py does not load: AttributeError: none"):
        rewards.load(f"{tmp_path}/broken.py:mine")
    assert set(sys.modules) == before


def test_a_sum_runs_its_file_once(tmp_path):
    """And the next load runs what is in it then."""
    file, spec = tmp_path / "mine.py", f"{tmp_path}/mine.py:a:2,{tmp_path}/mine.py:b"
    text = ("import pathlib\nwith open(pathlib.Path(__file__).with_name('log'), 'a') as f:\n    f.write('x')\n"
            "state = []\n"
            "def a(images, prompts, meta):\n    state.append(1)\n    return [1.] * len(images)\n"
            "def b(images, prompts, meta):\n    return [float(len(state))] * len(images)\n")
    for text, want in ((text, 3.), (text.replace("[1.]", "[10.]"), 21.)):
        file.write_text(text)
        for _ in range(2):
            assert rewards.load(spec)(torch.zeros(1, 3, 4, 4), [""]).tolist() == [want]
    assert (tmp_path / "log").read_text() == "xxxx"


def test_a_file_imports_its_neighbour(tmp_path, monkeypatch):
    """A module beside the file is found, but none that hides another of its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "a_third.py").write_text("third = 1 / 3\n")
    (tmp_path / "data.py").write_text("raise AttributeError('not this one')")
    (tmp_path / "mine.py").write_text("import data\nfrom a_third import third\n\n"
                                      "def same(images, prompts, metas):\n    return [third] * len(images)\n")
    score = rewards.load(f"{tmp_path}/mine.py:same")
    assert score(torch.zeros(2, 3, 4, 4), ["", ""]).tolist() == pytest.approx([1 / 3] * 2)


@pytest.mark.parametrize("spec", ["shapes", "tiny-clip", "tiny-clip,shapes-soft:2"])
def test_no_images_have_no_scores(spec):
    metas, images = scenes(2)
    score = rewards.load(spec)
    score(images, [meta["prompt"] for meta in metas], metas)
    for values in (score(images[:0], [], []), *score.values.values()):
        assert values.shape == (0,) and values.dtype == torch.float32
    assert list(score.values) == list(score.weights)


def test_no_images_leave_no_answers_of_the_call_before(monkeypatch):
    def reward(images, prompts, meta):
        reward.answers, reward.unparsed = ["yes"] * len(images), .5
        return torch.ones(len(images))
    reward.answers, reward.unparsed = [], 0.
    monkeypatch.setitem(rewards.REWARDS, "mine", lambda weights, device: reward)
    score = rewards.load("mine")
    score(torch.zeros(2, 3, 4, 4), ["", ""])
    assert score(torch.zeros(0, 3, 4, 4), []).shape == (0,) and (reward.answers, reward.unparsed) == ([], 0)


def test_what_a_score_refuses():
    """What a network would take, broadcast, and give numbers for. Metas may be absent where no reward reads them."""
    metas, images = scenes(3)
    prompts = [m["prompt"] for m in metas]
    score = rewards.load("tiny-clip")
    assert torch.equal(score(images, prompts), score(images, prompts, metas))
    for args in ((images[0], prompts, metas), (images[:, :1], prompts, metas), (images.numpy(), prompts, metas),
                 ((images * 255).byte(), prompts, metas), (images, "red", metas), (images, prompts[:1], metas),
                 (images[:1], prompts, metas), (images, prompts, metas[:2]), (images, prompts, [])):
        with pytest.raises(ValueError, match="cannot score .* prompts .* metas") as e:
            score(*args)
        assert "\n" not in str(e.value)


def test_images_are_scored_on_the_rewards_own_device(tmp_path):
    """The meta device stands for a second one: it keeps no numbers, so the reward makes its own."""
    file = tmp_path / "mine.py"
    file.write_text("seen = []\ndef where(images, prompts, meta):\n    seen.append(str(images.device))\n"
                    "    return [float(len(images))] * len(images)\n")
    for device in ("meta", "cpu"):
        score = rewards.load(f"{file}:where", device=device)
        values = score(torch.zeros(3, 3, 4, 4), ["a"] * 3, [{}] * 3)
        assert values.device.type == "cpu" and values.tolist() == [3, 3, 3]
        assert score.rewards[f"{file}:where"].__globals__["seen"] == [device]


def test_a_folder_of_many_sizes_is_scored_in_small_batches(tmp_path, monkeypatch):
    """As many at once as pixels allow, and as few calls as sizes allow; a key named like a reward is no reward."""
    rows = []
    for i in range(12):
        side = (8, 9, 10)[i % 3]
        Image.new("RGB", (side, side), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "prompt": "a photo of a red ring", "calls.py:red": "high"})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "calls.py").write_text("sizes = []\n\n\ndef red(images, prompts, metas):\n"
                                       "    sizes.append(len(images))\n    return images[:, 0].mean((1, 2)) * 255\n")
    spec = f"{tmp_path / 'calls.py'}:red"
    for pixels, most in ((10 ** 6, 12), (200, 3)):                     # 12 wait; three of them are over 200
        monkeypatch.setattr(rewards, "PIXELS", pixels)
        scored, seen = [], data.scored
        monkeypatch.setattr(data, "scored", lambda *args: scored.append(len(args[2])) or seen(*args))
        found = rewards.score_folder(spec, tmp_path)
        monkeypatch.setattr(data, "scored", seen)
        assert [round(row["reward"]) for row in found] == list(range(12)) == [round(r["terms"][spec]) for r in found]
        assert sum(scored) == 12 and len(scored) == {12: 3, 3: 12}[most]
    rewards.main(["--reward", spec, "--images", str(tmp_path)])        # its table, too


def test_command_line(tmp_path, capsys, reward_file, monkeypatch):
    metas, images = scenes(5)
    rows = []
    for i, (meta, x) in enumerate(zip(metas, images)):
        Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", **meta})
    listing = tmp_path / "prompts.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)))
    rewards.main(["--reward", "shapes-strict", "--images", str(tmp_path)])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].split() == ["all", "5", "1.0000", "0"] and "left out" not in said.err
    listing.write_text("\n".join(json.dumps(row | {"file": f"./{row['file']}"}) for row in rows[1:]))
    rewards.main(["--reward", "shapes-strict", "--images", str(tmp_path)])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].split() == ["all", "4", "1.0000", "0"]
    assert "left out: 1 of the 5 images" in said.err and said.err.rstrip().endswith("does not list, 0.png for one")
    with pytest.raises(SystemExit):
        rewards.main(["bnech"])
    assert "unknown command 'bnech': bench, geneval, train-proxy" in capsys.readouterr().err
    listing.write_text("\n".join(map(json.dumps, rows)))
    rewards.main(["--reward", "shapes-strict:2,shapes-soft:-1", "--images", str(tmp_path)])
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[0][-4:] == ["reward", "shapes-strict", "shapes-soft", "failed"]
    total, strict, soft = map(float, said[-1][2:5])
    assert strict == 1 and .99 < soft < 1 and total == pytest.approx(2 * strict - soft, abs=2e-4)
    with open(tmp_path / "scores.csv") as f:
        assert f.readline().strip() == 'file,prompt,"shapes-strict:2,shapes-soft:-1",shapes-strict,shapes-soft'
    rewards.main(["--reward", "shapes-strict", "--images", str(tmp_path)])
    capsys.readouterr()
    table = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["file"] for row in table] == [row["file"] for row in rows] and float(table[0]["shapes-strict"]) == 1

    def refused(reward="shapes", folder=tmp_path, line=()):
        with pytest.raises(SystemExit) as error:
            rewards.main([*line] or ["--reward", reward, "--images", str(folder)])
        assert error.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        return err
    for line in (["--reward", "shapes", "--images", str(tmp_path)], ["geneval", str(tmp_path)],
                 ["train-proxy", "--out", str(tmp_path / "clip")]):
        assert "--device nowhere" in refused(line=[*line, "--device", "nowhere"])
    assert "raises failed: KeyError: 'no such judge'" in refused(f"{reward_file}:raises")
    assert "(4,) for 5 images" in refused(f"{reward_file}:too_short")
    assert "unknown reward" in refused("beauty")
    assert "no folder" in refused(folder=tmp_path / "none") and "no folder" in refused(line=["geneval", "none"])
    (tmp_path / "empty").mkdir()
    assert "prompts.jsonl" in refused(folder=tmp_path / "empty")
    assert "--batch 2" in refused(line=["train-proxy", "--batch", "2", "--out", str(tmp_path / "clip")])
    listing.write_text(json.dumps({"prompt": "a photo of a ring"}))
    assert "names no file" in refused()
    listing.write_text(json.dumps({"file": "9.png", "prompt": "a photo of a ring"}))
    assert "row 1: there is no image" in (said := refused()) and "9.png" in said
    listing.write_text(json.dumps({"file": "0.png", "prompt": "a photo of a ring"}))
    assert "cannot check" in refused()
    monkeypatch.setattr(rewards, "_open", lambda path: pytest.fail("an image was read before all prompts were known"))
    listing.write_text("\n".join(map(json.dumps, [*rows, {"file": "0.png", "prompt": "no shape"}])))
    assert "cannot check" in refused()
    monkeypatch.undo()
    listing.write_text(json.dumps(rows[0]))
    (tmp_path / "0.png").write_text("no image")
    assert "0.png" in refused()
    Image.new("1", (20000, 10000)).save(tmp_path / "0.png")
    assert "cannot read the image" in refused()
    listing.write_text("{")
    assert "not a valid .jsonl" in refused()


def test_a_folder_without_a_listing(tmp_path, capsys):
    """Every image by name, its prompt beside it; what else a verifier needs is asked for."""
    (tmp_path / "mine.py").write_text("def length(images, prompts, meta):\n    return [len(p) for p in prompts]\n")
    for name in ("b.PNG", "a.jpg", "c.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a red ring\n")
    (tmp_path / "notes.txt").write_text("no image")
    rewards.main(["--reward", f"{tmp_path}/mine.py:length", "--images", str(tmp_path), "--device", "cpu"])
    table = list(csv.reader((tmp_path / "scores.csv").open()))[1:]
    assert table == [["a.jpg", "a red ring", "10.00000"], ["b.PNG", "", "0.00000"], ["c.webp", "", "0.00000"]]
    assert "2 of 3 images have no prompt" in capsys.readouterr().err
    for spec, lacks in (("shapes", "'include', the objects with their class.*prompts.jsonl"), ("ocr", "double quotes")):
        with pytest.raises(ValueError, match=lacks):
            rewards.score_folder(spec, tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot read the prompt in .*a.txt"):
        rewards.score_folder("shapes", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images .*prompts.jsonl"):
        rewards.score_folder("shapes", tmp_path / "empty")
