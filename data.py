"""What goes into a run: prompts, images, and the tiny world that stands in for a web-scale data set on a laptop.

    python data.py world --out tests/world.png                  # a contact sheet of the tiny world
    python data.py curate laion-face/ curated/ --server http://HOST:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct
"""
import argparse
import base64
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import functools
import glob
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import statistics
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import urllib.error
import urllib.request
import weakref
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("GOMP_SPINCOUNT", "3000")         # before torch: a waiting thread soon gives its core to others
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.nn               # now: its default arguments are the group, if there is one, and keep it alive
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# =====================================================================================================================
# The tiny world: procedurally drawn scenes with GenEval's six tasks and GenEval's meta data
# =====================================================================================================================
# Eight shapes x eight colours on a light plain ground. Everything is exact: a scene is a meta dict, an image is drawn
# from its signed distances, and rewards.verify reads the scene back from the pixels. Captions are noisy, as the web's
# are, so that a model pretrained on them paints well and obeys badly: that gap is what RL has to close.

COLORS = {                            # RGB in [0, 1]: no channel near 0 or 1, so that an over-saturated copy is far off
    "red": (.82, .20, .18), "orange": (.93, .53, .14), "yellow": (.92, .80, .22), "green": (.24, .62, .32),
    "blue": (.20, .40, .80), "purple": (.52, .26, .68), "pink": (.93, .55, .72), "black": (.16, .16, .18)}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}   # (x, y), y points down
NUMBERS = ("no", "one", "two", "three", "four", "five")
GROUND, TINT, SHADE = (.88, .94), .015, .02   # grey level of the ground, its tint, an object's colour jitter (RGB, +-)
RADIUS = {1: (6., 10.), 2: (4.8, 6.4), 3: (4.3, 5.2), 4: (4., 4.6)}       # pixels at size 32, by number of objects
RELATED = 5.8                                 # no larger where one is beside the other: both must fit in a row
GAP, BORDER = 3., 1.2                         # pixels at size 32 between two objects, between an object and the border
REACH = 1.12                                  # no shape of unit radius reaches further along x or y from its centre

# Caption noise, probabilities per image. RL starts from what these leave: see world_batch.
EMPTY = .10                                   # no caption at all
DROP_SECOND, WRONG_CLASS = .20, .12           # two objects: the second left out; one of them called something else
COUNT_OFF, COUNT_VAGUE = .28, .17             # counting: one too many or too few; "some circles"
NO_RELATION, WRONG_RELATION = .40, .35        # position: "and" for the relation; another relation
SWAP_COLORS, DROP_COLOR, DROP_COLORS = .36, .12, .10   # color_attr: exchanged; one left out; both left out
FRAMES = ("a photo of {}",) * 6 + ("{}",) * 3 + ("photo of {}", "a picture of {}", "an image of {}", "{} picture")


def _box(x, y, a, b):
    return torch.maximum(x.abs() - a, y.abs() - b)


def _triangle(x, y, top=-1.08, base=.78, half=1.06):
    slope = math.hypot(base - top, half)
    return torch.maximum(y - base, ((base - top) * x.abs() - half * (y - top)) / slope)


def _star(x, y, tip=1.12, notch=.5):
    wedge = 2 * math.pi / 5                                            # fold onto half a point, then one half plane
    angle = torch.remainder(torch.atan2(x, -y) + wedge / 2, wedge) - wedge / 2
    rho = torch.hypot(x, y)
    u, v = rho * angle.sin().abs(), rho * angle.cos()
    iu, iv = notch * tip * math.sin(wedge / 2), notch * tip * math.cos(wedge / 2)
    return (u * (tip - iv) + (v - tip) * iu) / math.hypot(iu, tip - iv)


def _heart(x, y, scale=1.75):
    x, y = x.abs() / scale, (.95 - y) / scale                          # a square corner below two half discs
    disc = torch.hypot(x - .25, y - .75) - math.sqrt(.125)
    m = .5 * (x + y).clamp(min=0)
    corner = torch.minimum(x**2 + (y - 1)**2, (x - m)**2 + (y - m)**2).sqrt() * torch.sign(x - y)
    return torch.where(x + y > 1, disc, corner) * scale


SHAPES = {   # signed distances, negative inside, of shapes of about unit radius at the origin, x to the right, y down
    "circle": lambda x, y: torch.hypot(x, y) - .97,
    "square": lambda x, y: _box(x, y, .84, .84),
    "triangle": _triangle,
    "cross": lambda x, y: torch.minimum(_box(x, y, 1.04, .33), _box(x, y, .33, 1.04)),
    "ring": lambda x, y: (torch.hypot(x, y) - .75).abs() - .28,
    "star": _star,
    "heart": _heart,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x + .1, y) - 1.02, .76 - torch.hypot(x - .44, y))}


def coverage(shape, x, y, radius, size):
    """How much of each pixel a shape covers: its signed distance in pixels, clipped to one pixel's width.

    shape: a name in SHAPES; x, y, radius: (P,) float32, centres and radii in pixels. Returns (P, size, size) in [0, 1].
    """
    grid = torch.arange(size, device=x.device) + .5                                        # pixel centres
    u = (grid[None, None, :] - x[:, None, None]) / radius[:, None, None]                   # (P, 1, size)
    v = (grid[None, :, None] - y[:, None, None]) / radius[:, None, None]                   # (P, size, 1)
    return (.5 - SHAPES[shape](u, v) * radius[:, None, None]).clamp(0, 1)


def _an(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")


def _meta(tag, objects, prompt, relation=None):
    """One GenEval dict; objects: (class, count, color or None) each; relation: the last object's, to the first."""
    include = [{"class": c, "count": n, **({"color": color} if color else {})} for c, n, color in objects]
    if relation:
        include[-1]["position"] = [relation, 0]
    meta = {"tag": tag, "include": include}
    if tag == "counting":
        meta["exclude"] = [{"class": objects[0][0], "count": objects[0][1] + 1}]
    return {**meta, "prompt": f"a photo of {prompt}"}


@functools.lru_cache
def _scenes():
    """Every scene of the world, {task: [the metas of one scene: one prompt, or two that say the same]}."""
    names, colors = list(SHAPES), list(COLORS)
    scenes = {task: [] for task in TASKS}
    for a in names:
        scenes["single_object"].append([_meta("single_object", [(a, 1, None)], _an(a))])
        scenes["counting"] += [[_meta("counting", [(a, n, None)], f"{NUMBERS[n]} {_plural(a)}")] for n in (2, 3, 4)]
        scenes["colors"] += [[_meta("colors", [(a, 1, c)], f"{_an(c)} {a}")] for c in colors]
    for a, b in itertools.combinations(names, 2):
        both = (a, b), (b, a)
        scenes["two_object"].append([_meta("two_object", [(p, 1, None), (q, 1, None)], f"{_an(p)} and {_an(q)}")
                                     for p, q in both])
        for rel, opp in zip(RELATIONS, ("right of", "left of", "below", "above")):   # "a left of b": "b right of a"
            scenes["position"].append([_meta("position", [(q, 1, None), (p, 1, None)], f"{_an(p)} {r} {_an(q)}", r)
                                       for (p, q), r in zip(both, (rel, opp))])
        for c, d in itertools.permutations(colors, 2):
            both_colored = ((a, c), (b, d)), ((b, d), (a, c))
            scenes["color_attr"].append([_meta("color_attr", [(p, 1, e), (q, 1, f)], f"{_an(e)} {p} and {_an(f)} {q}")
                                         for (p, e), (q, f) in both_colored])
    return scenes


def _known(split):
    if split not in ("train", "val", "test"):
        raise ValueError(f"unknown split {split!r}: train, val or test")


def world_prompts(split):
    """The tiny world's prompts as metas: {"tag", "include": [{"class", "count", "color", "position"}], "prompt"}.

    split: "train", "val" or "test". Splits share no scene: "a circle left of a square" and "a square right of a circle"
    are in the same one. Only single_object, which has eight prompts, is the same in all three.

        split   single_object  two_object  counting  colors  position  color_attr    all
        train               8          40        17      45       156        2196   2462
        val                 8           4         2       6        24         312    356
        test                8          12         5      13        44         628    710
    """
    _known(split)
    metas = []
    for task, scenes in _scenes().items():
        order = random.Random(f"split {task}").sample(scenes, len(scenes))
        a, b = round(.7 * len(order)), round(.8 * len(order))
        part = {"train": order[:a], "val": order[a:b], "test": order[b:]}[split] if task != "single_object" else scenes
        metas += [meta for scene in part for meta in scene]
    return copy.deepcopy(metas)                                        # the caller's own


def tasks_of(metas):
    """The metas of each task (their "tag"), a list of lists; as often as the "weight" of a task's first meta says."""
    by_tag = {}
    for meta in metas:
        by_tag.setdefault(meta.get("tag"), []).append(meta)
    return [rows for rows in by_tag.values() for _ in range(rows[0].get("weight", 1))]


def draw_prompts(metas, n, seed, tasks=None):
    """n metas, each of a task (its "tag") drawn uniformly, then of that task's rows uniformly; a function of seed.

    A task whose first meta has an integer "weight" is drawn that many times as often as one without. tasks:
    `tasks_of(metas)`, where it is known.
    """
    rng, tasks = random.Random(f"draw {seed}"), tasks or tasks_of(metas)
    return [rng.choice(rng.choice(tasks)) for _ in range(n)]


def _place(radii, relations, g, size):
    """Centres for each scene's objects: inside the border, GAP apart, relations kept with a margin.

    radii: (B, K) pixels, 0 for an absent object; relations: (B, 2), where object 1 lies from object 0, or 0. Rejection:
    eight tries an image and round until all have one. Returns x, y (B, K).
    """
    B, K = radii.shape
    unit = size / 32
    reach, present = radii * REACH, radii > 0
    low, high = reach + BORDER * unit, size - reach - BORDER * unit                        # (B, K)
    apart = reach[:, :, None] + reach[:, None, :] + GAP * unit                             # (B, K, K)
    pairs = (present[:, :, None] & present[:, None, :]).triu(1)
    x, y, todo = torch.zeros(B, K), torch.zeros(B, K), torch.arange(B)
    while len(todo):
        tries = torch.rand(2, 8, len(todo), K, generator=g) * (high - low)[todo] + low[todo]   # (2, 8, R, K)
        rel = relations[todo]                                                              # (R, 2)
        if rel.any():                          # along its axis: a distance, then a place; rejection would be slow
            room = size - 2 * BORDER * unit - reach[todo, :2].sum(1)                   # the centres' largest distance
            need = apart[todo, 0, 1]
            shift = need + torch.rand(8, len(todo), generator=g) * (room - need)           # (8, R)
            for axis in (0, 1):
                sign = rel[:, axis]
                first = torch.where(sign > 0, 0, 1)                                        # the object nearer to 0
                start = low[todo].gather(1, first[:, None])[:, 0]
                end = high[todo].gather(1, 1 - first[:, None])[:, 0] - shift
                near = start + (tries[axis, :, :, 0] - low[todo][:, 0]) / (high - low)[todo][:, 0] * (end - start)
                a = torch.where(sign > 0, near, near + shift)                              # object 0
                b = torch.where(sign > 0, near + shift, near)                              # object 1
                tries[axis, :, :, 0] = torch.where(sign != 0, a, tries[axis, :, :, 0])
                tries[axis, :, :, 1] = torch.where(sign != 0, b, tries[axis, :, :, 1])
        d = tries[..., :, None] - tries[..., None, :]                                      # (2, 8, R, K, K)
        ok = ((d.square().sum(0).sqrt() >= apart[todo]) | ~pairs[todo]).flatten(2).all(2)  # (8, R)
        off, along = ((d[:, :, :, 0, 1].abs() * on).sum(0) for on in (rel.T[:, None] == 0, rel.T[:, None] != 0))
        ok &= ~rel.any(1) | (off <= .5 * along)
        found, which = ok.max(0)                                                           # (R,)
        done = todo[found]
        x[done], y[done] = tries[:, which[found], found.nonzero()[:, 0]]
        todo = todo[~found]
    return x, y


def render(metas, seed, size=32):
    """Draw one image of each meta: exactly its objects, untouching, on a light plain ground, random in size and place.

    Colours that the meta leaves open are random: one for all objects of a class, different ones for different classes.
    seed: int. Returns (B, 3, size, size) float32 in [0, 1], a function of (metas, seed, size) alone.
    """
    g = torch.Generator().manual_seed(seed)
    names, colors, B = list(SHAPES), list(COLORS), len(metas)
    kind, color = torch.full((B, 4), -1), torch.zeros(B, 4, dtype=torch.long)
    relations = torch.zeros(B, 2, dtype=torch.long)
    free = torch.rand(B, len(colors), generator=g).argsort(1).tolist()                     # a random colour order
    for i, meta in enumerate(metas):
        k, taken = 0, {o["color"] for o in meta["include"] if "color" in o}
        order = iter([c for c in free[i] if colors[c] not in taken])
        for o in meta["include"]:
            c = colors.index(o["color"]) if "color" in o else next(order)
            kind[i, k:k + o["count"]], color[i, k:k + o["count"]] = names.index(o["class"]), c
            k += o["count"]
            if "position" in o:
                relations[i] = torch.tensor(RELATIONS[o["position"][0]])
    present = kind >= 0
    count = present.sum(1)
    low, high = (torch.tensor([0, *(RADIUS[n][j] for n in (1, 2, 3, 4))])[count, None] for j in (0, 1))
    high = torch.where(relations.any(1, keepdim=True), RELATED, high)
    radii = (low + torch.rand(B, 4, generator=g) * (high - low)) * present * size / 32     # (B, 4) pixels
    x, y = _place(radii, relations, g, size)
    ground = GROUND[0] + torch.rand(B, 1, generator=g) * (GROUND[1] - GROUND[0])
    ground = ground + (torch.rand(B, 3, generator=g) * 2 - 1) * TINT                       # (B, 3)
    shade = (torch.rand(B, 4, 3, generator=g) * 2 - 1) * SHADE
    paint = torch.tensor(list(COLORS.values()))[color] + shade - ground[:, None]           # (B, 4, 3), above ground
    images = ground[:, :, None, None].repeat(1, 1, size, size)
    for k, name in enumerate(names):                                   # objects never overlap: painting is adding
        i, j = (kind == k).nonzero(as_tuple=True)
        if len(i):
            alpha = coverage(name, x[i, j], y[i, j], radii[i, j], size)                    # (P, size, size)
            images.index_add_(0, i, alpha[:, None] * paint[i, j, :, None, None])
    return images.clamp(0, 1)


def _caption(meta, rng):
    """A web-like caption of a scene: GenEval's wording or a variant of it, as noisy as the constants above say."""
    if rng.random() < EMPTY:
        return ""
    names, tag, u = list(SHAPES), meta["tag"], rng.random()
    objects = [[o["class"], o.get("color")] for o in meta["include"]]
    bare = rng.random() < .15                                          # no articles

    def noun(name, color=None):
        if color and rng.random() < .15:
            return f"{name if bare else _an(name)} in {color}"
        phrase = f"{color} {name}" if color else name
        return phrase if bare else _an(phrase)

    if tag == "counting":
        n = meta["include"][0]["count"]
        if u < COUNT_OFF:
            n += rng.choice((-1, 1))
        name = objects[0][0]
        what = (rng.choice(("some {}", "{}")).format(_plural(name)) if COUNT_OFF <= u < COUNT_OFF + COUNT_VAGUE else
                noun(name) if n == 1 else f"{NUMBERS[n]} {_plural(name)}")
        return rng.choice(FRAMES).format(what)
    joint = rng.choice(("and",) * 4 + ("with",))
    if tag in ("two_object", "position", "color_attr"):
        if tag == "color_attr":
            (_, c), (_, d) = objects
            if u < SWAP_COLORS:
                c, d = d, c
            elif u < SWAP_COLORS + DROP_COLOR:
                c, d = rng.choice(((c, None), (None, d)))
            elif u < SWAP_COLORS + DROP_COLOR + DROP_COLORS:
                c = d = None
            objects[0][1], objects[1][1] = c, d
        if rng.random() < WRONG_CLASS:
            rng.choice(objects)[0] = rng.choice(names)
        if tag == "position":
            relation = meta["include"][1]["position"][0]
            objects.reverse()                                          # the prompt names the placed object first
            if u < NO_RELATION:
                relation = rng.choice((joint, "next to", "beside"))
            elif u < NO_RELATION + WRONG_RELATION:
                relation = rng.choice([r for r in RELATIONS if r != relation])
            joint = relation
        elif rng.random() < .5:
            objects.reverse()
        if rng.random() < DROP_SECOND and (tag == "two_object" or joint not in RELATIONS):
            objects.pop(rng.randrange(2))
    return rng.choice(FRAMES).format(f" {joint} ".join(noun(*o) for o in objects))


def world_batch(seed, step, n, size=32):
    """Batch number `step` of an endless training stream over the whole world: tasks uniform, captions noisy.

    Pretraining sees the scenes of all splits; only the prompts of RL and its evaluation are split. The noise is set per
    task so that the pretrained model draws single objects and colours well, and binds and places badly.
    Returns images (n, 3, size, size) float32 in [0, 1], n captions ("" for a tenth of them), n metas (the truth). All
    are a function of the arguments alone.
    """
    rng, scenes = random.Random(f"world {seed} {step} 0"), _scenes()
    metas = [rng.choice(rng.choice(scenes[rng.choice(TASKS)])) for _ in range(n)]
    return render(metas, rng.getrandbits(63), size), [_caption(meta, rng) for meta in metas], metas


WORLD_WORDS = sorted({*"a an photo of picture image in and with some next to beside".split(), *NUMBERS[2:], *COLORS,
                      *SHAPES, *map(_plural, SHAPES), *" ".join(RELATIONS).split()})   # of all captions and prompts


def contact_sheet(columns=6, seed=0, size=32, scale=4):
    """A picture of the tiny world: a row for each task, with training prompts under their images."""
    rng, train = random.Random(seed), world_prompts("train")
    metas = [m for task in TASKS for m in rng.sample([m for m in train if m["tag"] == task], columns)]
    tiles = (render(metas, seed, size).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    font, pad, text = ImageFont.load_default(11), 10, 32
    w, h = size * scale + pad, size * scale + pad + text
    sheet = Image.new("RGB", (columns * w + pad, len(TASKS) * h + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, meta) in enumerate(zip(tiles, metas)):
        left, top = pad + i % columns * w, pad + i // columns * h
        sheet.paste(Image.fromarray(tile).resize((size * scale,) * 2, Image.NEAREST), (left, top))
        lines = [""]
        for word in meta["prompt"].split():
            if draw.textlength(f"{lines[-1]} {word}", font) > size * scale:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.multiline_text((left, top + size * scale + 3), "\n".join(lines), fill=(70, 70, 70), font=font, spacing=2)
    return sheet


# =====================================================================================================================
# Prompts
# =====================================================================================================================

HPDV2 = ("curl -fL --create-dirs -o weights/hpdv2/train.txt "           # as DanceGRPO trained on; its README names them
         "https://raw.githubusercontent.com/XueZeyue/DanceGRPO/main/assets/prompts.txt")


FORMATS = (".txt", ".jsonl", ".json", ".csv")
HALF = re.compile("[\ud800-\udfff]")                                 # half of a surrogate pair: an emoji cut in two


def prompts(spec, split):
    """The prompts of a run, list[dict] with at least "prompt"; the other keys are what a verifier needs.

    spec: "shapes" (the tiny world), "geneval", "geneval-unseen", "ocr" (see the functions of these names), or a file:
    .txt (one a line), .jsonl, .json (a list of strings or of objects) or .csv (with a "prompt" column, or UniGenBench's
    columns). A file's rows are the same for every split. HPDv2's are such files: train.json (a row for each pair of
    images; here each of its prompts counts once), anime.json ... Or a folder of such files, one a split, as Flow-GRPO's
    and DGPO's are: train.txt, test.txt, or train_metadata.jsonl ...; without a val.txt every twentieth of train's
    prompts is held out for validation. A row's "weight", see draw_prompts, is its task's: the same in all rows of one
    "tag".
    Raises ValueError, in one line, for a spec or split that does not exist and for a file that is missing, empty, not
    UTF-8, or holds a row without a prompt or with another weight than its task's first.
    """
    _known(split)
    made = {"shapes": world_prompts, "geneval": geneval_prompts, "ocr": ocr_prompts,
            "geneval-unseen": functools.partial(geneval_prompts, unseen=True)}
    if spec in made:
        return made[spec](split)
    path = pathlib.Path(spec)
    if path.is_dir():
        return _folder(path, split)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"unknown prompts {str(spec)!r}: {', '.join(made)}, a .txt, .jsonl, .json or .csv file, or a "
                         f"folder of these")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ValueError(f"cannot read prompts from {path}: {e.strerror}" +
                         f". HPDv2's come by: {HPDV2}" * ("hpdv2" in path.parts)) from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}; convert it first") from None
    try:
        rows = _rows(suffix, text)
    except (ValueError, RecursionError, csv.Error) as e:               # 5000 digits; a thousand brackets
        raise ValueError(f"{path} is not a valid {path.suffix} file: {e}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of prompts, not a {type(rows).__name__}")
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    rows, weights = [{"prompt": row} if isinstance(row, str) else row for row in rows], {}
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{path}: row {i} has no prompt: {str(row)[:60]}")
        if HALF.search(row["prompt"]):
            raise ValueError(f"{path}: row {i}: half of a surrogate pair, no character: {row['prompt']!a:.60}")
        weight = row.get("weight", 1)
        if not isinstance(row.get("tag"), str | None) or type(weight) is not int or weight < 1:
            raise ValueError(f"{path}: row {i}: a tag is a text, a weight a whole number from 1 on: {str(row)[:60]}")
        if weights.setdefault(row.get("tag"), weight) != weight:
            task = f"tag {row['tag']!r}" if row.get("tag") is not None else "no tag"
            raise ValueError(f"{path}: row {i}: weight {weight}, and {weights[row.get('tag')]} in the first row with "
                             f"{task}: a weight is its task's, so write the same into all its rows (none is 1)")
    if "human_preference" in rows[0]:                                  # HPDv2's train.json
        return [{"prompt": prompt} for prompt in dict.fromkeys(row["prompt"] for row in rows)]
    return rows


def _folder(path, split):
    """A split's rows of a folder with a file for each, whose name is the split's up to a "." or "_"."""
    files = {name: [file for file in sorted(path.iterdir()) if re.split("[._]", file.name)[0] == name
                    and file.suffix.lower() in FORMATS] for name in ("train", "val", "test")}
    wanted = split if files[split] or split != "val" else "train"
    if len(files[wanted]) != 1:
        found = " and ".join(file.name for file in files[wanted]) or "none"
        raise ValueError(f"{path} must hold one file of {wanted} prompts, {wanted}.txt, say: there is {found}")
    rows = prompts(files[wanted][0], split)
    if files["val"] or split == "test":
        return rows
    texts = list(dict.fromkeys(row["prompt"] for row in rows))        # rows may repeat them
    if len(texts) < 2:
        raise ValueError(f"{files['train'][0]}: one prompt, of which none can be held out for validation: add val.txt")
    held = set(texts[::20])
    return [row for row in rows if (row["prompt"] in held) == (split == "val")]


def _rows(suffix, text):
    lines = [line for line in text.split("\n") if line.strip()]         # not splitlines: U+2028 may be in a prompt
    if suffix == ".txt":
        return [line.strip() for line in lines]
    if suffix == ".jsonl":
        rows = []
        for n, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise csv.Error(f"line {n}{where}: {getattr(error, 'msg', error)}") from None
        return rows
    if suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        for n, row in enumerate(rows, 1):
            if None in row:
                raise csv.Error(f"row {n} has more cells than the header; a prompt with a comma wants quotes around it")
            weight = (row.pop("weight", "") or "").strip()             # all cells are text
            row |= {"weight": int(weight) if weight.isdecimal() else weight} if weight else {}
        return [unigenbench_row(row) if {"sub_dims_en", "sub_dims_zh"} & row.keys() else row for row in rows]
    return json.loads(text) if lines else []


def unigenbench_row(row):
    """A row of UniGenBench++'s .csv, English or Chinese: {"prompt", "index", "testpoints", "descriptions"}.

    What is to be tested, a name and a description each, is JSON in the row. One published row lacks a comma in it: that
    is put in, and said. Raises ValueError, in one line, for a row that cannot be read.
    """
    language = "en" if "prompt_en" in row else "zh"
    keys = ("Testpoints", "Testpoint Description") if language == "en" else ("考点", "考点对应描述")
    text = row.get(f"sub_dims_{language}") or ""
    for tried in (text, re.sub(r'(?<=\w")\s+(?=")', ", ", text)):
        with contextlib.suppress(ValueError, LookupError, TypeError):
            points, descriptions = (json.loads(tried)[key] for key in keys)
            if len(points) == len(descriptions) > 0:
                if tried != text:
                    tqdm.write(f"UniGenBench's row {row.get('index')}: a comma is missing between two test points, put "
                               f"in here", file=sys.stderr)
                return {"prompt": row[f"prompt_{language}"], "index": row.get("index"), "testpoints": points,
                        "descriptions": descriptions}
    raise ValueError(f"UniGenBench's row {row.get('index')}: sub_dims_{language} holds no test points with a "
                     f"description each: {text[:100]!r}")


# GenEval's prompts (Ghosh et al., arXiv:2310.11513). The benchmark is a list of 553 that a seeded program wrote; here
# it is written anew, draw for draw, and compared with the published file's hash.

OBJECTS = (   # COCO's 80 classes in COCO's order; the benchmark calls three of them by a longer name, e.g. "tv remote"
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")
UNSEEN = (    # Flow-GRPO's twenty held-out classes                     [released data, geneval_unseen_objects]
    "car,traffic light,fire hydrant,dog,elephant,umbrella,frisbee,skis,baseball bat,skateboard,wine glass,cup,bowl,"
    "apple,bed,toilet,microwave,book,clock,toothbrush").split(",")
PAINTS = "red orange yellow green blue purple pink brown black white".split()
TASK_WEIGHTS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}     # [Flow-GRPO, training]
TRAIN_ROWS, VAL_DRAWS = 50_000, 32            # rows of the training set [Flow-GRPO]; draws a task for validation [ours]
OFFICIAL = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"    # sha256 of evaluation_metadata.jsonl


def geneval_meta(task, names, rng):
    """One GenEval prompt of a task (any but single_object) about the classes in names, as its meta dict.

    rng: a numpy Generator. Which draws are made, and in which order, is what makes the benchmark come out again.
    """
    def draw(options, size=None):
        return rng.choice(len(options), size=size, replace=size is None)

    if task == "counting":
        noun, n = names[draw(names)], int(rng.integers(2, 4, endpoint=True))
        return _meta(task, [(noun, n, None)], f"{NUMBERS[n]} {_plural(noun)}")
    if task in ("two_object", "position"):
        a, b = (names[i] for i in draw(names, 2))
        if task == "two_object":
            return _meta(task, [(a, 1, None), (b, 1, None)], f"{_an(a)} and {_an(b)}")
        relation = list(RELATIONS)[draw(RELATIONS)]
        return _meta(task, [(b, 1, None), (a, 1, None)], f"{_an(a)} {relation} {_an(b)}", relation)
    names = [name for name in names if name != "person"]        # nobody is asked for in a colour
    if task == "colors":
        noun, hue = names[draw(names)], PAINTS[draw(PAINTS)]
        return _meta(task, [(noun, 1, hue)], f"{_an(hue)} {noun}")
    (a, b), (c, d) = (names[i] for i in draw(names, 2)), (PAINTS[i] for i in draw(PAINTS, 2))
    return _meta(task, [(a, 1, c), (b, 1, d)], f"{_an(c)} {a} and {_an(d)} {b}")


def geneval_suite(names, n, seed):
    """A benchmark like GenEval's: each class alone once, then n draws a task, without those whose prompt is there."""
    rng = np.random.default_rng(seed)
    metas = [_meta("single_object", [(names[i], 1, None)], _an(names[i]))
             for i in rng.choice(len(names), size=len(names), replace=False)]
    metas += [geneval_meta(task, names, rng) for task in TASKS[1:] for _ in range(n)]
    return list({meta["prompt"]: meta for meta in metas}.values())


def geneval_prompts(split, unseen=False, seed=0):
    """GenEval's prompts as metas: {"tag", "include": [{"class", "count", "color", "position"}], "exclude", "prompt"}.

    test: the official 553, in their order: 80 single_object, 99 two_object, 80 counting, 94 colors, 100 position and
    100 color_attr. train: 50,000 rows made from seed, five tasks in Flow-GRPO's proportions, which their "weight"
    keeps in draw_prompts; counting and colors are small, so their rows repeat. val: what training never sees either.
    No prompt is in two splits, word for word: as in the released data, "a cat and a dog" may be in one and "a dog and
    a cat" in another. single_object is in the test split only, as there.
    unseen: train and val are about 60 classes, test about the 20 others, 246 prompts. The classes are Flow-GRPO's, the
    draw is ours. Raises RuntimeError where numpy's generator no longer draws the official list.
    """
    _known(split)
    seen = [name for name in OBJECTS if not unseen or name not in UNSEEN]
    test = geneval_suite(UNSEEN, 50, 43) if unseen else geneval_suite(OBJECTS, 100, 43)
    lines = "".join(json.dumps(meta) + "\n" for meta in test)
    if not unseen and hashlib.sha256(lines.encode()).hexdigest() != OFFICIAL:
        raise RuntimeError(f"numpy {np.__version__} draws other prompts than GenEval's 553; numpy 2.4 draws them")
    if split == "test":
        return test
    held = {meta["prompt"] for meta in test}
    val = [meta for meta in geneval_suite(seen, VAL_DRAWS, 44)
           if meta["tag"] in TASK_WEIGHTS and meta["prompt"] not in held]
    if split == "val":
        return val
    held |= {meta["prompt"] for meta in val}
    rng, rows, total = np.random.default_rng((45, seed)), [], sum(TASK_WEIGHTS.values())
    for task, weight in TASK_WEIGHTS.items():
        drawn = (geneval_meta(task, seen, rng) for _ in itertools.count())
        kept = ({**meta, "weight": weight} for meta in drawn if meta["prompt"] not in held)
        rows += itertools.islice(kept, round(TRAIN_ROWS * weight / total))
    return [rows[i] for i in rng.permutation(len(rows))]


# Prompts that ask for a text of one to five words: a scene, a way of saying it, a text.

SCENES = (
    "a wooden sign at a trailhead", "a neon sign above a bar", "a chalkboard outside a cafe", "a red street sign",
    "a poster on a brick wall", "the cover of an old book", "a banner over a market street", "a label on a glass jar",
    "a license plate on a blue car", "a white t-shirt on a hanger", "a birthday cake with icing letters",
    "a newspaper on a kitchen table", "a road sign in the desert", "a robot holding a cardboard sign",
    "a cat wearing a name tag", "a ticket in a gloved hand", "graffiti on a concrete bridge", "a shop window at night",
    "a bottle label on a bar counter", "a billboard beside a highway", "a coffee mug on a desk",
    "a flag on a sailing boat", "a phone screen in the dark", "a gravestone in the fog")
SAYINGS = ('{}, it says "{}"', '{} that reads "{}"', '{} with the words "{}"')
FIRST = "Happy Silent Golden Fresh Lost Secret Royal Electric Hidden Gentle Broken Lucky Northern Wild Final".split()
SECOND = "Garden Coffee Harbor Market Station Dreams River Kitchen Library Summer Machine Planet Theater Bakery".split()
TEXTS = ("{}", "The {}", "Welcome to {}", "{} Since 1985", "No {} Today")


def ocr_prompts(split):
    """Prompts that ask for a text, as metas: {"prompt", which holds the text between double quotes, "text"}.

    split: "train" (27,000 rows: every scene with every text), "val" (840) or "test" (840). A text is a name put into
    one of TEXTS; no name is in two splits, so that no text is. Scenes are shared. The words are our own: the papers'
    list of some 20,000, written by a language model, is a file that we do not have. Bring it as a .txt.
    """
    _known(split)
    names = [*FIRST, *SECOND, *(f"{a} {b}" for a in FIRST for b in SECOND)]
    random.Random("split ocr").shuffle(names)
    names = {"train": names[14:], "val": names[:7], "test": names[7:14]}[split]
    pairs, rng = list(itertools.product(SCENES, TEXTS, names)), random.Random(f"ocr {split}")
    rng.shuffle(pairs)
    rows = [(scene, text.format(name)) for scene, text, name in pairs]
    return [{"prompt": rng.choice(SAYINGS).format(scene, text), "text": text} for scene, text in rows]


# =====================================================================================================================
# Image data sets: a stream that resumes anywhere, and latents that are computed once
# =====================================================================================================================
# What cannot be used (a torn shard, a broken or giant image, a missing caption, a path that leads out of its shard) is
# left out: .bad lists it with its reason, .skipped counts the reasons. Nothing is ever unpacked to disk.

KINDS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 2**26                            # 8192 x 8192; a larger image is refused before it is decoded


class Bad(Exception):
    """A sample that cannot be used. The message is the reason, in the same words for all that share it."""


def find_shards(paths):
    """The shards of a data set, [(path, key, caption)]: each .tar, and each image of a folder as a shard of its own.

    paths: .tar files, folders and patterns, one or a list. A folder is its .tar files, else the rows of its
    metadata.jsonl (file_name, text), else its images, with captions in .txt or .json files beside them. key, caption:
    None for a .tar; caption: None for a file beside the image. Raises ValueError where one of them has nothing.
    """
    shards, nothing = [], "no images at {}: name .tar files, a folder or a pattern of them, or a folder of images"
    for pattern in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        known = len(shards)
        for path in map(pathlib.Path, [pattern] if os.path.exists(pattern) else sorted(glob.glob(str(pattern)))):
            if tars := [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")):
                shards += [(str(tar), None, None) for tar in tars]
            elif (table := path / "metadata.jsonl").is_file():
                for n, line in enumerate(table.read_bytes().splitlines(), 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                        name, text = row["file_name"], str(row.get("text") or "")
                        shards.append((str(path / name), os.path.splitext(name)[0], text))
                    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                        raise ValueError(f"{table}, line {n}: not an object with file_name and text: {line}") from None
            else:
                shards += [(str(file), str(file.relative_to(path).with_suffix("")), None)
                           for file in sorted(files_below(path)) if file.suffix[1:].lower() in KINDS]
        if len(shards) == known:
            raise ValueError(nothing.format(pattern))
    if not shards:
        raise ValueError(nothing.format(paths))
    return shards


def files_below(folder):
    """The files of a folder at any depth, through links, too; but through none that leads back to where it is."""
    for root, folders, files in os.walk(folder, followlinks=True):
        root = pathlib.Path(root)
        if any((root / name).is_symlink() for name in folders):
            above = {os.path.realpath(path) for path in (root, *root.absolute().parents)}
            folders[:] = [name for name in folders if os.path.realpath(root / name) not in above]
        yield from (root / name for name in files)


def unsafe(path):
    """Does a path inside a data set lead out of it: absolute, on a drive, or with a ".." in it?"""
    return bool(re.match(r"[/\\]|\w:", path)) or ".." in re.split(r"[/\\]", path)


def read_tar(path, drop, start=0):
    """The samples of a WebDataset shard, in its order and from number `start` on: (key, {extension: bytes}).

    A sample is the files in a row that share their path up to the name's first dot. drop(member, reason) is called for
    an unsafe member or one that is no plain file, and drop("", reason) for a shard that is no tar or is cut short: then
    its last sample, which may lack a part, is left out.
    """
    n, key, files, reason = -1, None, {}, "not a tar file"
    try:
        with open(path, "rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
            reason = "cut short"
            for member in tar:
                if unsafe(member.name):
                    drop(member.name, "unsafe path")
                elif not (member.isdir() or member.isreg()) or member.issparse():      # sparse: few bytes, vast files
                    drop(member.name, "not a plain file")
                elif name := member.isreg() and re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name, re.S):
                    stem, kind = name[1], name[2].lower()              # hidden files have no stem: passed over
                    if stem != key:
                        if n >= start:
                            yield key, files
                        n, key, files = n + 1, stem, {}
                    if n >= start and kind in (*KINDS, "txt", "json"):
                        files[kind] = tar.extractfile(member).read()
            f.seek(tar.offset)
            if f.read(512) != bytes(512):                              # tarfile takes a torn header for the end
                raise tarfile.ReadError
            if n >= start:
                yield key, files
    except (tarfile.TarError, ValueError, OverflowError):              # the last two: headers that are noise
        drop("", reason)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def open_image(files, max_pixels):
    """A sample's image, opened but not decoded. Raises Bad if it is missing, no JPEG, PNG or WebP, or too large."""
    content = next((files[kind] for kind in KINDS if kind in files), None)
    if content is None:
        raise Bad("no image")
    if Image.MAX_IMAGE_PIXELS and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels                            # Pillow's own limit, raised when asked for
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except Exception as error:                                         # Pillow raises what it likes on noise
        bomb = isinstance(error, Image.DecompressionBombError)
        raise Bad("too many pixels" if bomb else "corrupt image") from None
    if image.width * image.height > max_pixels:
        raise Bad("too many pixels")
    return image


def decoded(image):
    """An opened image in RGB, upright, on white where it is transparent. Raises Bad if its file is damaged."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                                # 16 bits of grey, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception:
        raise Bad("corrupt image") from None


def read_meta(files):
    """A sample's .json as a dict, empty if there is none. Raises Bad."""
    try:
        return dict(json.loads(files.get("json", b"{}")))
    except (ValueError, TypeError, RecursionError):
        raise Bad("corrupt json") from None


def read_caption(files):
    """A sample's caption: its .txt, else the "caption" in its .json. Raises Bad if that is missing, blank or noise."""
    try:
        text = files.get("txt", b"").decode("utf-8-sig").strip() or read_meta(files).get("caption")
    except UnicodeDecodeError:
        raise Bad("corrupt caption") from None
    if not isinstance(text, str) or not text.strip():
        raise Bad("no caption")
    if HALF.search(text):
        raise Bad("corrupt caption")
    return text.strip()


def ahead(pool, n, function, items):
    """function(item) for every item, in order, up to n of them computed ahead in a pool."""
    jobs = collections.deque()
    for item in items:
        jobs.append(pool.submit(function, item))
        if len(jobs) > n:
            yield jobs.popleft().result()
    while jobs:
        yield jobs.popleft().result()


class Stream:
    """A walk over shards, epoch after epoch, that can stop anywhere and go on bit for bit: of Images, of Cached.

    Each epoch deals the shards, in an order drawn by (seed, epoch), to the ranks. A rank reads `block` samples at once
    and permutes them; threads decode up to a block ahead. shuffle=False: the files' order. epochs=None: without end.
    A subclass has read(shard, start), which yields (name, raw); decode(raw), a dict, or it raises Bad; and
    collate(samples), a batch. Raises ValueError for fewer shards than ranks, and after an epoch without one sample.
    """

    def __init__(self, shards, rank, world, seed, epochs, shuffle, block, workers):
        if len(shards) < world:
            first = f", the first is {shards[0][0]}: start at most {len(shards)}" if shards else ": there are no images"
            raise ValueError(f"{len(shards)} shards cannot be dealt to {world} processes{first}, or cut the data into "
                             f"more shards")
        self.shards, self.rank, self.world, self.seed = shards, rank, world, seed
        self.epochs, self.shuffle, self.block, self.workers = epochs, shuffle, block, workers
        self.bad, self.skipped = {}, collections.Counter()             # {sample: reason}, {reason: how many}
        self.at = {"epoch": 0, "shard": 0, "sample": 0, "taken": 0}    # `taken` of the block that begins at `sample`
        self.of = {"rank": rank, "world": world, "seed": seed, "shuffle": shuffle, "block": block,
                   "data": mix(*(pathlib.Path(path).name for path, *_ in shards))}

    def state(self):
        """The position, after the last sample or batch that was given out: a small dict for JSON, one for each rank."""
        return {**self.at, "of": self.of}

    def restore(self, state):
        """Let the next iteration go on where a state was taken. ValueError if it is another data set's, or rank's."""
        for name, value in self.of.items():
            if state["of"].get(name) != value:
                raise ValueError(f"this position in the data was saved with {name}={state['of'].get(name)}, and now it "
                                 f"is {value}: go on with the same data, seed and number of processes, or start anew")
        self.at = {name: state[name] for name in self.at}

    def drop(self, name, reason):
        """Leave a sample out: listed once however often it is met. The first of each reason is said."""
        if name not in self.bad:
            self.bad[name] = reason
            self.skipped[reason] += 1
            if self.skipped[reason] == 1:
                tqdm.write(f"left out, {reason}: {name} (others are only counted)", file=sys.stderr)

    def _samples(self, shards, shard, sample):
        for i in range(shard, len(shards)):
            for j, (name, raw) in enumerate(self.read(shards[i], sample), sample + 1):
                yield name, raw, {"shard": i, "sample": j, "taken": 0}
            sample = 0

    def _walk(self):
        """(name, raw, the position after it) of every sample from here on; without a name at the end of an epoch."""
        at = self.at
        while self.epochs is None or at["epoch"] < self.epochs:
            shards = list(self.shards)
            if self.shuffle:
                random.Random(f"shards {self.seed} {at['epoch']}").shuffle(shards)
            samples = self._samples(shards[self.rank::self.world], at["shard"], at["sample"])
            while block := list(itertools.islice(samples, self.block)):
                after = {**at, **block[-1][2]}
                if self.shuffle:
                    key = mix("block", self.seed, self.rank, at["epoch"], at["shard"], at["sample"])
                    random.Random(key).shuffle(block)
                for n, (name, raw, _) in enumerate(block[at["taken"]:], at["taken"] + 1):
                    yield name, raw, {**at, "taken": n}
                at = after
            at = {"epoch": at["epoch"] + 1, "shard": 0, "sample": 0, "taken": 0}
            yield None, None, at

    def _job(self, item):
        name, raw, at = item
        try:
            return name, name and self.decode(raw), at
        except Bad as bad:
            return name, str(bad), at

    def __iter__(self):
        found = any(self.at.values())                                  # in the middle, what came before is not known
        pool = ThreadPoolExecutor(self.workers)
        try:
            for name, sample, self.at in ahead(pool, self.block, self._job, self._walk()):
                if isinstance(sample, dict):
                    found = True
                    yield sample
                elif name:
                    self.drop(name, sample)
                elif not found:
                    own = self.shards[self.rank::self.world]
                    raise ValueError(f"rank {self.rank} found nothing to use in its {len(own)} of the "
                                     f"{len(self.shards)} shards, the first is {self.shards[0][0]}: "
                                     f"{dict(self.skipped)}")
                else:
                    found = False                                      # an epoch ends here, another begins
        finally:
            pool.shutdown(cancel_futures=True)

    def batches(self, batch_size):
        """Batches, collated; at the end of the last epoch one may be smaller."""
        samples = iter(self)
        while rows := list(itertools.islice(samples, batch_size)):
            yield self.collate(rows)


class Images(Stream):
    """Images and their captions: dicts of image (3, size, size) uint8, caption, key; batches of (B, 3, size, size)
    float32 in [0, 1] and B captions.

    paths: see find_shards; a .tar is WebDataset's, as img2dataset writes it: KEY.jpg (.png, .webp) with KEY.txt or
    KEY.json. An image is resized, bicubic with antialias, to `size` along its short edge, and the middle is cut out.
    max_pixels: the most an image may have. The rest: see Stream.
    """

    def __init__(self, paths, size, rank=0, world=1, seed=0, epochs=None, shuffle=True, block=512, workers=4,
                 max_pixels=MAX_PIXELS):
        self.size, self.max_pixels = size, max_pixels
        super().__init__(find_shards(paths), rank, world, seed, epochs, shuffle, block, workers)
        self.of["size"] = size

    def read(self, shard, start):
        path, key, caption = shard
        if key is None:
            for raw in read_tar(path, lambda name, reason: self.drop(f"{path}/{name}".rstrip("/"), reason), start):
                yield f"{path}/{raw[0]}", raw
        elif caption is not None and unsafe(key):                      # a name that metadata.jsonl gives
            self.drop(path, "unsafe path")
        elif start == 0:
            file = pathlib.Path(path)
            beside = {kind: file.with_suffix(f".{kind}") for kind in ("txt", "json")} | {file.suffix[1:].lower(): file}
            try:
                files = {kind: part.read_bytes() for kind, part in beside.items() if part.is_file()}
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from None
            yield path, (key, files if caption is None else {**files, "txt": caption.encode("utf-8", "surrogatepass")})

    def decode(self, raw):
        key, files = raw
        caption = read_caption(files)
        image = ImageOps.fit(decoded(open_image(files, self.max_pixels)), (self.size, self.size), Image.BICUBIC)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(self.size, self.size, 3)
        return {"image": pixels.permute(2, 0, 1).contiguous(), "caption": caption, "key": key}

    def collate(self, samples):
        return torch.stack([s["image"] for s in samples]).float() / 255, [s["caption"] for s in samples]


@torch.no_grad()
def latents(images, vae, encode_text, folder, batch_size=16, per_file=1000):
    """Encode a data set once, into a folder that Cached reads: each image's latent, each caption's features.

    images: Images with epochs=1; each rank encodes its part. vae.encode gives the posterior's mean, scaled as networks
    want it; encode_text(captions) gives a tensor (B, ...) or a tuple of them; both keep their dtypes. Writes
    RANK-of-WORLD-N.safetensors of `per_file` samples, and index.json once all ranks are done. After a kill the same
    call goes on. One folder, one VAE and one text encoder: their weights are not compared.
    """
    if images.epochs != 1:
        raise ValueError(f"latents of {images.shards[0][0]}: epochs={images.epochs}; a cache is one pass, so epochs=1")
    folder, part = pathlib.Path(folder), f"{images.rank}-of-{images.world}"
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"index-{part}.json"
    index = {"files": [], "state": images.state(), "bad": {}, "done": False}
    if own.exists():
        index = json.loads(own.read_bytes())
    images.restore(index["state"])
    for name, reason in index["bad"].items():
        images.drop(name, reason)
    device, samples = next(vae.parameters()).device, iter(images)
    while not index["done"]:
        parts, rows = [], []
        while batch := list(itertools.islice(samples, min(batch_size, per_file - len(rows)))):
            pixels, captions = images.collate(batch)
            context = encode_text(captions)
            context = context if isinstance(context, tuple) else (context,)
            parts.append([x.cpu() for x in (vae.encode(pixels.to(device)), *context)])
            rows += [(sample["key"], sample["caption"]) for sample in batch]
        if rows:
            tensors = {f"{i}": torch.cat(column).contiguous() for i, column in enumerate(zip(*parts))}
            index["files"].append(f"{part}-{len(index['files']):05d}.safetensors")
            write_atomic(folder / index["files"][-1], safetensors.torch.save(tensors, {"samples": json.dumps(rows)}))
        index |= {"state": images.state(), "bad": images.bad, "done": len(rows) < per_file}
        write_atomic(own, json.dumps(index).encode())
    parts = [folder / f"index-{rank}-of-{images.world}.json" for rank in range(images.world)]
    parts = [json.loads(file.read_bytes()) for file in parts if file.exists()]
    if len(parts) == images.world and all(part["done"] for part in parts):
        skipped = collections.Counter(reason for part in parts for reason in part["bad"].values())
        whole = {"files": [file for part in parts for file in part["files"]], "skipped": skipped}
        own = folder / f"whole-{images.rank}.json"                         # two processes may be the last at once
        write_atomic(own, json.dumps(whole, indent=2).encode())
        os.replace(own, folder / "index.json")


class Cached(Stream):
    """What `latents` wrote, read as Images are: dicts of latents (C, H, W), context (a tuple of tensors), caption, key;
    batches of latents (B, C, H, W) followed by each context (B, ...). ValueError if the folder is not finished.
    """

    def __init__(self, folder, rank=0, world=1, seed=0, epochs=None, shuffle=True, block=512, workers=4):
        index = pathlib.Path(folder) / "index.json"
        if not index.is_file():
            raise ValueError(f"{index} does not exist: the latents are not finished; call data.latents there again")
        try:
            files = [(str(index.parent / file),) for file in json.loads(index.read_bytes())["files"]]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{index} is not one of data.latents") from None
        super().__init__(files, rank, world, seed, epochs, shuffle, block, workers)

    def read(self, shard, start):
        path, = shard
        try:
            file = safetensors.safe_open(path, "pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"cannot read {path}: {error}; remove the folder and call data.latents again") from None
        for i, (key, caption) in list(enumerate(json.loads(file.metadata()["samples"])))[start:]:
            yield f"{path}/{key}", (file, i, key, caption)

    def decode(self, raw):
        file, i, key, caption = raw
        latents, *context = (file.get_slice(f"{j}")[i] for j in range(len(file.keys())))
        return {"latents": latents, "context": tuple(context), "caption": caption, "key": key}

    def collate(self, samples):
        return tuple(torch.stack(x) for x in zip(*((s["latents"], *s["context"]) for s in samples)))


# =====================================================================================================================
# Curation: LAION-Face-T2I-15M, the data set of ProxT2I (arXiv:2511.18742, App. B)
# =====================================================================================================================
# img2dataset's shards in, the same shards out: first the cheap rules, then an aesthetic score, then a new caption from
# a vision-language model. What is left out has its reason in dropped.jsonl.

STAGES = {256: (256, 16), 512: (512, 10)}     # short edge, at least; aspect ratio, at most 16:9 or 10:9     [App. B, C]
AESTHETIC = 4.5                               # the score of LAION's aesthetic predictor, at least              [App. B]
WORDS = 5, 100                                # a caption's, least and most: the prompts ask for 30               [ours]
CAPTION_PROMPT = """\
Write a concise summary of the image in 30 words. Describe the main subjects, actions, and any noticeable details such \
as face, hair, clothes, ethnicity, or background.
Describe the image style, such as photography, painting, or cartoon. The description should be a suitable image \
generation prompt."""
HAND_PROMPT = """\
Does this image meet **all** of the following criteria?
1. It is a **real photograph**, not a drawing or digital rendering.
2. It shows a **close-up view** of the upper body (head to waist).
3. There is a **single person** in the image.
4. At least **one hand** is clearly visible and engaged in a motion or gesture (e.g., pointing, holding, touching, \
etc.).

If yes, respond with 'Yes' and on a new line, a caption of the image in about 30 words.
Describe the hands in detail, covering:

- Number of hands visible (e.g., 'one hand', 'both hands')
- Position relative to the body (e.g., 'resting on lap', 'raised near face')
- Finger gesture or configuration (e.g., 'fingers curled', 'spread apart', 'pointing')
- Activity or interaction if any (e.g., 'adjusting clothing', 'touching chin', 'gesturing toward camera')
- Visibility quality (e.g., 'clearly visible', 'partially obscured').

If no, respond with 'No' and nothing else."""


REFUSAL = re.compile(r"""\W* (
    (i['’]m | i\ am)\ (sorry | afraid | unable | not\ able | just\ an? | an?\ (ai | language | text)) |
    i\ (can['’]?t | cannot | can\ not | do\ not | don['’]t | will\ not | won['’]t | apologi[sz]e) |
    sorry | as\ an\ ai | unable\ to | unfortunately) \b""", re.I | re.X)


def caption_fault(text):
    """Why a model's answer is no caption: empty, refused, repeats itself, too short or too long. None if it is one."""
    words = re.findall(r"\w+", text.lower())
    if not words or HALF.search(text):
        return "corrupt caption" if words else "empty caption"
    if REFUSAL.match(text):
        return "refused caption"
    phrases = collections.Counter(zip(words, words[1:], words[2:], words[3:]))
    if 2 * len(set(words)) < len(words) or max(phrases.values(), default=0) > 2 or max(map(len, words)) > 40:
        return "caption repeats itself"
    return "caption too short" if len(words) < WORDS[0] else "caption too long" if len(words) > WORDS[1] else None


class NoAnswer(ValueError):
    """A server gave no answer, however often it was asked."""


class Refused(ValueError):
    """A server refused a question: `code` is HTTP's."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


def chat(server, model, messages, stop, timeout=120., retries=6, backoff=1., **options):
    """An OpenAI-compatible server's first choice: a dict, its text in choice["message"]["content"], stripped.

    server: the address up to /v1; messages: as the API has them; options: more fields of the request, such as
    max_tokens. The key is $OPENAI_API_KEY. A server that is slow, busy (429), broken (5xx) or answers noise is asked
    again, `retries` times, after waits that double, with jitter, until the Event `stop` is set. Raises NoAnswer after
    the last one, and Refused at once for any other error of HTTP.
    """
    body = json.dumps({"model": model, "temperature": 0, **options, "messages": messages}).encode()
    key = os.environ.get("OPENAI_API_KEY", "none").strip()             # a file's last line may end it
    if not (key.isascii() and key.isprintable()):
        raise ValueError("$OPENAI_API_KEY holds characters that no header of HTTP can have")
    request = urllib.request.Request(f"{server.rstrip('/')}/chat/completions", body, {
        "Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    for n in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                choice = json.load(reply)["choices"][0]
            choice["message"]["content"] = (choice["message"]["content"] or "").strip()
            return choice
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise Refused(f"{server} refused: {problem}: {error.read(300)!r}", error.code) from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"               # unreachable, slow, torn off, or not an answer
        if n == retries or stop.wait(min(60, backoff * 2**n) * (.5 + random.random())):
            raise NoAnswer(f"{server} failed {n + 1} times, the last by {problem}")


def picture_part(image, form="PNG"):
    """A PIL image as a part of a message's content. form: PNG, or JPEG of quality 95."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 95} if form == "JPEG" else {}))
    url = f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def ask(args, prompt, image, stop):
    """A server's answer to a prompt about an image: (text, finish_reason). Raises as `chat` does."""
    image.thumbnail((1024, 1024))
    messages = [{"role": "user", "content": [picture_part(image, "JPEG"), {"type": "text", "text": prompt}]}]
    try:
        choice = chat(args.server, args.model, messages, stop, args.timeout, args.retries, args.backoff, max_tokens=256)
    except NoAnswer as error:
        raise ValueError(f"{error}: finished shards are kept; once it is well, the same command goes on") from None
    return choice["message"]["content"], choice.get("finish_reason")


def aesthetic(spec):
    """The function of a PIL image that `file.py:function` names, called from one thread at a time."""
    file, _, name = spec.rpartition(":")
    try:
        function, lock = runpy.run_path(file).get(name) if os.path.isfile(file) else None, threading.Lock()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--aesthetic {spec} does not load: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"--aesthetic {spec}: no such file or no such function; write path/to/file.py:function")

    def score(image):
        with lock:
            try:
                return float(function(image))
            except (Exception, SystemExit) as error:
                raise ValueError(f"--aesthetic {spec} failed: {failure(error)}") from error
    return score


def curated(files, args, score, stop):
    """One sample by the recipe: its files as they are to be written. Raises Bad with the first rule that it fails."""
    image, meta = open_image(files, args.max_pixels), read_meta(files)
    (short, long), (least, ratio) = sorted(image.size), STAGES[args.stage]
    known = [meta[side] for side in ("original_width", "original_height") if isinstance(meta.get(side), int)]
    if min([short, *known]) < least:                                   # enlarged by img2dataset, it is no better
        raise Bad("short edge")
    if 9 * long > ratio * short:                                       # in whole numbers: exact at the border
        raise Bad("aspect ratio")
    image, field = decoded(image), args.aesthetic_field
    if not args.no_aesthetic:
        if not isinstance(meta.get(field), (int, float)):
            if not score and field not in meta:
                raise ValueError(f"no {field!r} in its .json: name the score by --aesthetic-field, or a function by "
                                 f"--aesthetic file.py:function, or do without by --no-aesthetic")
            meta[field] = score(image) if score else math.nan          # there, and no number
        if not meta[field] >= args.min_aesthetic:
            raise Bad("aesthetic score")
    if args.no_caption:
        caption = read_caption(files)
    else:
        caption, end = ask(args, HAND_PROMPT if args.hands else CAPTION_PROMPT, image, stop)
        if args.hands:
            verdict = re.match(r"\W*(yes|no)\b\W*(.*)", caption, re.I | re.S)
            if not verdict or verdict[1].lower() == "no":
                raise Bad("hands: no" if verdict else "hands: neither yes nor no")
            caption = verdict[2]
        if fault := "caption too long" if end == "length" else caption_fault(caption):
            raise Bad(fault)
        with contextlib.suppress(Bad):
            meta.setdefault("original_caption", read_caption(files))
        caption = " ".join(caption.split())
        meta |= {"caption": caption, "caption_model": args.model}
    return {**files, "txt": caption.encode(), "json": json.dumps(meta).encode()}


def curate(args):
    """`python data.py curate`: returns {"kept" or a reason: samples}. Stopped, the same command goes on.

    A shard is done once summary.json counts it; by then it has its name, and its lines are in dropped.jsonl.
    """
    out, paths = pathlib.Path(args.out), [pathlib.Path(path) for path, *_ in find_shards(args.source)]
    if any(path.suffix != ".tar" for path in paths) or len({path.name for path in paths}) < len(paths):
        raise ValueError(f"{args.source}: curate reads .tar shards, each with a name of its own, as img2dataset writes")
    if out.resolve() in {path.parent.resolve() for path in paths}:
        raise ValueError(f"{out} holds the source itself: choose another folder to write to")
    if not args.no_caption and not (args.model and re.match("https?://", args.server or "")):
        raise ValueError("captions need --server http://HOST:PORT/v1 and --model NAME; or keep the old: --no-caption")
    for name, low in (("workers", 1), ("retries", 0), ("backoff", 0), ("max_pixels", 1),
                      ("min_aesthetic", -math.inf)):
        if not getattr(args, name) >= low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: {low} or more")
    if not args.timeout > 0:
        raise ValueError(f"--timeout {args.timeout:g}: more than 0")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    if args.no_caption and args.hands:
        raise ValueError("--hands asks the server for a caption of the hands: leave --no-caption away")
    score, stop = aesthetic(args.aesthetic) if args.aesthetic else None, threading.Event()
    file, log = out / "summary.json", out / "dropped.jsonl"
    settings = {name: getattr(args, name) for name in ("stage", "min_aesthetic", "aesthetic_field", "aesthetic",
                                                       "no_aesthetic", "model", "hands", "no_caption", "max_pixels")}
    summary = {"total": {}, "settings": settings, "written": 0,       # written: bytes of dropped.jsonl
               "shards": {}, "sources": {}}                            # by a shard's name: what counts, and its path
    if out.exists() and not file.exists() and {path.name for path in out.iterdir()} - {"summary.json.new", ".lock"}:
        raise ValueError(f"{out} is not empty and holds no summary.json: choose another folder to write to")
    out.mkdir(parents=True, exist_ok=True)
    lock = locked(out / ".lock", out)
    if file.exists():
        summary |= json.loads(file.read_bytes())
    for name, value in settings.items():
        if summary["settings"].get(name) != value:
            raise ValueError(f"{out} was begun with {name}={summary['settings'].get(name)!r}, not {value!r}: give the "
                             f"same options, or another folder")
    for path in paths:
        source = summary["sources"].get(path.name, str(path.resolve()))
        if source != str(path.resolve()):
            raise ValueError(f"{out / path.name} was made from {source}, not from {path}: choose another folder; or, "
                             f"where the source has moved, correct it in {file}")
    for name in [*summary["shards"], *["dropped.jsonl"] * bool(summary["shards"])]:
        if not (out / name).is_file():
            raise ValueError(f"{out / name} is gone, though {file} knows it: put it back, or start in another folder")

    def work(sample):
        key, files = sample
        try:
            return key, curated(files, args, score, stop)
        except Bad as bad:
            return key, str(bad)
        except ValueError as error:
            raise ValueError(f"{path.name}/{key}: {error}") from error

    def drop(key, reason):
        rows.append(json.dumps({"shard": path.name, "key": key, "reason": reason}) + "\n")
        counts[reason] += 1

    write_atomic(file, json.dumps(summary, indent=2).encode())
    pool, bar = ThreadPoolExecutor(args.workers), tqdm(unit=" images")
    try:
        for n, path in enumerate(paths, 1):
            if path.name in summary["shards"]:
                continue
            bar.set_description(f"curate {path.name}, {n} of {len(paths)}")
            rows, counts, new = [], collections.Counter(), out / f"{path.name}.new"
            with open(new, "wb") as f:
                with tarfile.open(fileobj=f, mode="w") as tar:
                    for key, files in ahead(pool, 2 * args.workers, work, read_tar(path, drop)):
                        bar.update()
                        if isinstance(files, str):
                            drop(key, files)
                            continue
                        counts["kept"] += 1
                        for kind, content in files.items():
                            member = tarfile.TarInfo(f"{key}.{kind}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
                f.flush()
                os.fsync(f.fileno())
            with open(log, "ab") as f:
                f.truncate(summary["written"])                         # lines of a shard that was not finished
                f.write("".join(rows).encode())
            os.replace(new, out / path.name)
            summary["shards"][path.name], summary["sources"][path.name] = counts, str(path.resolve())
            summary["total"] = sum(map(collections.Counter, summary["shards"].values()), collections.Counter())
            summary["written"] = log.stat().st_size
            write_atomic(file, json.dumps(summary, indent=2).encode())
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
        lock.close()
    if not summary["total"].get("kept"):
        raise ValueError(f"{args.source}: nothing is left; {log} has the reasons: {dict(summary['total'])}")
    return summary["total"]


# =====================================================================================================================
# What comes out of a run: ranks, seeds, command line, metrics, pictures, checkpoints
# =====================================================================================================================
# Everything random in a run is a function of whole numbers that are written down: (seed, step, group). Groups are
# counted over all processes: in RL 1, 2 or 8 of them train on the same images, and a resume needs no generator's state.

def mix(*key):
    """One seed from several numbers and words, such as (seed, step, group); different keys give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def noise(shape, *key, device="cpu", dtype=torch.float32):
    """Standard Gaussian noise, a function of the key alone: the same on every device and number of processes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(mix(*key))).to(device, dtype)


def noises(shape, keys, device="cpu", dtype=torch.float32):
    """The noise of every key, (len(keys), *shape), drawn here and sent to the device at once."""
    return sent(torch.stack([noise(shape, *key) for key in keys]), device, dtype)


def sent(tensor, device, dtype=None):
    """A tensor of the CPU's on a device. From pinned memory, a GPU fetches it when it comes to it: nobody waits."""
    cuda = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if cuda else tensor).to(device, dtype or tensor.dtype, non_blocking=cuda)


def uniform(n, *key):
    """n uniform draws from [0, 1) as floats, a function of the key alone."""
    rng = random.Random(mix(*key))
    return [rng.random() for _ in range(n)]


def cli(config, presets, argv=None, defaults=None, restarts=True):
    """A dataclass as a command line: field -> flag, bool -> --x / --no-x, trailing comment -> help.

    presets: {name: {field: value}} or {name: {model family: {field: value}}}; the preset's values stand under the flags
    that are given, --gpu-memory's between them, and `defaults`, {method: {field: value}}, under all, but above those of
    a preset of another method. No --preset is the last of presets for a public model's name, else "tiny". Where only
    --groups or --sample-steps is given, updates and train_steps come down to what they allow. restarts: a run that
    torchrun starts again resumes, and wants --out; False for what goes on by itself. Returns the dataclass, whose
    __post_init__ may raise ValueError.
    """
    import models
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
    parser = argparse.ArgumentParser(description=inspect.getmodule(config).__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        default = presets.get("tiny", {}).get(field.name, field.default)
        help = f"{comments.get(field.name, '')} ({default!r})".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(flag, type=field.type, help=help, metavar=field.type.__name__.upper())
    parser.error = functools.partial(refuse, flags=list(parser._option_string_actions))
    given = typed = vars(parser.parse_args(argv))
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))       # torchrun --max-restarts: the same words again
    if restarts and again:
        if "out" not in typed:
            raise ValueError("a run that torchrun starts again goes on where it was only with --out")
        typed["resume"] = typed.get("resume") or (pathlib.Path(typed["out"]) / "config.json").exists()
    if typed.get("resume"):                                            # what is not typed again stays what it was
        with contextlib.suppress(ValueError):                          # a run that is not there: Run says so
            given = settings_of(last_run(method_of(config), typed.get("out", "")), config) | {"out": ""} | typed
    preset = given.get("preset") or (list(presets)[-1] if given.get("model") in {*models.SOURCES, "uvit"} else "tiny")
    if preset not in presets:
        raise ValueError(f"unknown --preset {preset!r}: {', '.join(presets)}")
    values = presets[preset]
    model = given.get("model") or (config.model if preset == "tiny" else "sd35m" if "sd3" in values else "uvit")
    family = models.family(model, given.get("weights", ""))
    if preset != "tiny":
        if family not in values:
            raise ValueError(f"this script's --preset {preset} has no numbers for --model {model}: it knows "
                             f"{', '.join(values)} (by model_index.json); a directory without --preset takes tiny's")
        values = values[family]
    own = values.get("method")                                         # the preset's, if it has one
    method = given.get("method") or own or config.method
    under = (defaults or {}).get(method, {})
    values = {**values, **under} if own not in (None, method) else {**under, **values}
    values = {**values, **given, "model": model, "preset": preset}
    if values.get("gpu_memory"):
        names = "lora_rank", "cfg_train", "cfg_detach", "fsdp"
        now = {name: values.get(name, getattr(config, name, False)) for name in names}
        shards = int(os.environ.get("WORLD_SIZE", 8)) if now["fsdp"] else 0                 # alone it is refused below
        both = now["cfg_train"] != 1 and not now["cfg_detach"]        # passes that keep their activations
        plan = models.memory_plan(family, values["gpu_memory"], now["lora_rank"], both, shards,
                                  models.parameter_count(model, values.get("weights", "")))
        if hasattr(config, "fisher_every") and "fisher_every" not in given and values["gpu_memory"] < 48:
            plan["fisher_every"] = 0                                   # SLAS on SD3.5: 26 GB an image, csrc/count.py
        values = {**values, **plan, **(typed if "gpu_memory" in typed else given)}
    full = {field.name: values.get(field.name, field.default) for field in dataclasses.fields(config)}
    if "train_steps" in full:                                          # policy gradients: what was not given fits
        fit = {"updates": math.gcd(full["updates"], full["groups"]),
               "train_steps": min(full["train_steps"], full["sample_steps"])}
        values |= {name: value for name, value in fit.items() if name not in given}
        if values.get("gpu_memory") and "micro_batch" not in typed:    # the ratio wants the rollout's batches again
            now, world = full | values, int(os.environ.get("WORLD_SIZE", 1))
            size, share = now["group_size"], now["groups"] // max(1, now["updates"]) // world
            # No plan's: typed when the run, resumed here, began.
            kept = "micro_batch" in given and "gpu_memory" not in typed and now["micro_batch"] % max(1, size)
            values["micro_batch"] = now["micro_batch"] if kept else next(
                m for m in range(now["micro_batch"], 0, -1) if size % m == 0 or m % size == 0 and share * size % m == 0)
    cfg = config(**values)
    if typed.get("fused"):
        from csrc import ops
        try:
            ops.build()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--fused: {error}") from None
    return cfg


def method_of(config):
    """The name of the script that a Config belongs to, and of its runs' folders: dgpo, grpo, slas, proxt2i."""
    return pathlib.Path(inspect.getfile(config)).stem


def free_run(method):
    """The first folder of runs/METHOD-001, 002, ... that does not exist."""
    paths = (pathlib.Path(f"runs/{method}-{n:03d}") for n in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))   # a link to nothing is taken, too


def last_run(method, out=""):
    """The folder that --resume goes on in: out, or the last one begun of runs/METHOD-*; ValueError if there is none."""
    runs = sorted(pathlib.Path("runs").glob(f"{method}-*/config.json"), key=lambda path: path.stat().st_mtime)
    if not out and not runs:
        raise ValueError(f"--resume: there is no runs/{method}-* to resume; name one by --out")
    return pathlib.Path(out) if out else runs[-1].parent


def settings_of(out, config):
    """A run's config.json as a dict. Raises ValueError if it cannot be read, or has other fields than Config."""
    if not (out / "config.json").is_file():
        raise ValueError(f"--resume: {out / 'config.json'} does not exist; leave --resume away to start there")
    try:
        before = json.loads((out / "config.json").read_bytes())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{out / 'config.json'} is damaged, not JSON; start anew with another --out")
    if odd := sorted(before.keys() ^ {field.name for field in dataclasses.fields(config)}):
        more = f" and {len(odd) - 3} more" * (len(odd) > 3)
        raise ValueError(f"--resume: {out} is a run of another script, or of another version of this one: they differ "
                         f"in {', '.join(odd[:3])}{more}")
    return before


def refuse(message, flags=()):
    """An ArgumentParser's error: one line, where argparse would print all flags' usage. flags: those there are."""
    odd = re.match(r"unrecognized arguments: (--[^ =]+)", message)
    close = odd and difflib.get_close_matches(odd[1], flags, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"{message} ({hint}--help lists all flags)")


def choose(name, value, options):
    """Raise ValueError unless value is one of the options: a flag with an unknown word is refused, never ignored."""
    if value not in options:
        raise ValueError(f"--{name.replace('_', '-')} {value!r} is unknown: {', '.join(filter(None, options))}")


def number(text):
    """A float of a text, or of a number; NaN for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def counts(name, text):
    """The numbers of steps in a comma-separated list. Raises ValueError for anything else, or less than 1."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ValueError(f"--{name.replace('_', '-')} {text!r}: numbers of steps, 1 or more, as 4,6,10")
    return values


def check_device(name, device):
    """Raise ValueError unless this machine has the device of a flag; None and "" are what the flag's default is."""
    flag = f"--{name.replace('_', '-')} {device}"
    try:
        device = torch.device(device or "cpu")
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:                    # no such word, no such device
        raise ValueError(f"{flag}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{flag}: all processes of this machine would share that GPU; leave the flag out, and each "
                         f"takes its own, or try cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0                  # neither opens a context
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(f"{flag}: PyTorch {torch.__version__} can use {found} GPU(s) on this machine")


def check(cfg, words, least, positive):
    """The command-line rules that all methods share, and the ranges of a method's own flags.

    words: {field: what it may be}; least: {field: the least number}; positive: fields above 0. Raises ValueError with
    the value, the reason and what to type.
    """
    import models
    exact = "shapes-strict" if cfg.prompts == "shapes" else ""        # the only prompts that it can check
    cfg.eval_reward, cfg.gold_reward = cfg.eval_reward or exact or cfg.reward, cfg.gold_reward or exact
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.group_size < 2:
        raise ValueError(f"--group-size {cfg.group_size}: an advantage compares images of one prompt, so 2 or more")
    if cfg.groups < 1 or getattr(cfg, "stage", "rl") == "rl" and cfg.groups % world:
        raise ValueError(f"--groups {cfg.groups} cannot be shared out over {world} processes: a group stays on one, "
                         f"since its images are compared with each other. Try --groups "
                         f"{max(1, -(-cfg.groups // world)) * world}.")
    least = least | dict.fromkeys(("steps", "sample_steps", "eval_steps", "micro_batch", "updates", "save_every"), 1)
    seen = cfg.eval_every or getattr(cfg, "stage", "") == "sample"     # the validation prompts
    least |= {"eval_images": world, "val_images": world if seen else 0}                        # each process has one
    least |= {name: 0 for name in ("resolution", "lora_rank", "eval_every", "weight_decay", "noise_level",
                                   "shift", "text_length")}
    for name, low in least.items():
        if not getattr(cfg, name, low) >= low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {low} or more")
    for name in ("lr", "minutes", "max_grad_norm", "adv_clip", "lora_alpha", *positive):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: more than 0")
    if hasattr(cfg, "train_steps") and cfg.groups % cfg.updates:      # policy gradients: disjoint groups an update
        raise ValueError(f"--groups {cfg.groups} cannot be split into --updates {cfg.updates} equal parts")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"--ema {cfg.ema}: 0 or more and less than 1")
    if not -2 ** 63 <= cfg.seed < 2 ** 63:
        raise ValueError(f"--seed {cfg.seed}: from -2^63 to 2^63 - 1")
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} {value}: a finite number")
    check_device("reward_device", cfg.reward_device)
    words = words | dict(dtype=("float32", "bfloat16", "float64"), reward_dtype=("float32", "bfloat16"),
                         reward_mix=("reward", "advantage"), init=("", "random"),
                         schedule=("", "linear", "sd3", "dpm", "ddim"), solver=("", "euler", "dpm", "ddim"))
    for name, options in words.items():
        choose(name, getattr(cfg, name, ""), options)
    alone = "WORLD_SIZE" not in os.environ
    if cfg.fsdp and alone:
        models.find(cfg.model, cfg.weights or None, cfg.init or None)  # how to get the weights comes first
    if cfg.fsdp and (cfg.lora_rank or alone):
        raise ValueError("--fsdp, which a preset may set, cuts all weights into shards, one a process: it wants "
                         "--lora-rank 0 and torchrun")
    if cfg.fsdp and cfg.compile:
        raise ValueError("--fsdp and --compile together are untested: choose one of them")


def load_judges(cfg, run, rows=None):
    """What a run is judged by: run.judges, --eval-reward and --gold-reward, and the prompts run.val and run.test."""
    import rewards
    same = os.path.isfile(cfg.prompts) and pathlib.Path(cfg.prompts).suffix.lower() in FORMATS        # for all splits:
    val = same and rows or prompts(cfg.prompts, "val")                 # rows, if given, are read already; a million
    test = val if same else prompts(cfg.prompts, "test")               # take seconds
    run.val, run.test = draw_prompts(val, cfg.val_images, "val"), draw_prompts(test, cfg.eval_images, "test")
    run.judges = rewards.judges(cfg, run.device, run.test + run.val * bool(cfg.eval_every))


def load_inputs(cfg, run):
    """What RL learns from, a Scoring of --reward and the rows of the training prompts; and what the run is judged by.

    Called before the network is loaded, of which it only sees to it that it is there: what is wrong shows at once.
    """
    import models
    import rewards
    models.find(cfg.model, cfg.weights or None, cfg.init or None)
    score = rewards.load(cfg.reward, device=cfg.reward_device or run.device, dtype=cfg.reward_dtype)
    if cfg.reward_mix == "advantage" and len(score.weights) < 2:
        raise ValueError(f"--reward-mix advantage mixes the terms of a sum, and --reward {cfg.reward} is one reward")
    rows = prompts(cfg.prompts, "train")
    load_judges(cfg, run, rows)
    rewards.check(score, rows)
    return Scoring(run, score), rows


def loaded(cfg, run):
    """The pipeline of a run that trains nothing."""
    import models
    pipe = models.load(cfg.model, cfg.weights or None, models.DTYPES[cfg.dtype], run.device, cfg.init or None,
                       cfg.text_length or None)
    pipe.offload = cfg.offload
    return pipe


def load_policy(cfg, run, fresh=False):
    """The pipeline of a run and its trained parameters: a LoRA's, or all of the network's in float32.

    All weights train in float32 under a network that computes in cfg.dtype: by autocast, or by FSDP2's own casts.
    fresh: a U-ViT is not loaded but made, for training from the start. What is drawn for that, or a LoRA, is a function
    of cfg.seed. Raises ValueError for flags that this model cannot follow.
    """
    import models
    from csrc import ops
    torch.manual_seed(cfg.seed)
    dtype = models.DTYPES[cfg.dtype]
    if fresh:
        pipe = models.fresh_uvit(cfg.model, cfg.weights or None, cfg.method == "prox", dtype, run.device, cfg.seed,
                                 cfg.predict)
    else:
        whole = dtype == torch.bfloat16 and not (cfg.lora_rank or cfg.fsdp)                # from the file's own bits
        pipe = models.load(cfg.model, cfg.weights or None, dtype, run.device, cfg.init or None,
                           cfg.text_length or None, torch.float32 if whole else None)
    if pipe.family == "uvit" and run.method != "proxt2i":
        raise ValueError(f"--model {cfg.model}: a U-ViT is no flow model and no SD1: python proxt2i.py rl --model "
                         f"{cfg.model}")
    if getattr(cfg, "guidance", 0) != getattr(type(cfg), "guidance", 0) and not pipe.net.config.get("guidance_embeds"):
        raise ValueError(f"--guidance {cfg.guidance:g} is told to FLUX.1-dev alone; {cfg.model}'s guidance is "
                         f"--cfg-rollout, --cfg-train and --cfg-eval")
    pipe.latent_shape(cfg.resolution)                                  # these refuse what the model cannot do
    pipe.solver(getattr(cfg, "solver", ""))
    net = pipe.net
    alike(fingerprint(net), "give every machine the same --weights")   # whole, before they are cut into shards
    run.watch(net)
    pipe.guidance, pipe.offload = getattr(cfg, "guidance", pipe.guidance), cfg.offload
    net.checkpointing = cfg.checkpointing
    if cfg.offload and pipe.vae:
        pipe.vae.to("cpu")
    if cfg.lora_rank:
        params = models.add_lora(net, cfg.lora_rank, cfg.lora_alpha, net.lora_targets)
    else:
        if cfg.fsdp:
            models.shard(net, dtype)
        elif dtype == torch.bfloat16:
            net.float()
            net.forward = torch.autocast(run.device.type, dtype)(net.forward)
        params = models.trainable(net.requires_grad_(True))
    if cfg.compile:
        # Each kind of block, with and without gradients, at several batch sizes: past 8, blocks would run uncompiled.
        torch._dynamo.config.recompile_limit = 256
        for block in net.modules():
            if isinstance(block, net.blocks):
                block.compile()
    run.say(f"{sum(p.numel() for p in params):,} trained parameters; {ops.status()}")
    return pipe, params


@contextlib.contextmanager
def exit_codes(advice=""):
    """0 done; 2 and one line for what our own code refuses or a GPU that is too small; 1 and a traceback for a bug;
    130 and a word for Ctrl-C where it ends the process at once.

    advice: what helps against too small a GPU, where that is not --gpu-memory. A reward that a thread still computes is
    not waited for.
    """
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, OSError):                                 # a path's: who asked pathlib for it?
            frames = [name for name in frames if not re.search(r"^<frozen|[/\\](pathlib|shutil)(\.py$|[/\\])", name)]
        raised_in = pathlib.Path(frames[-1]).resolve()
        if isinstance(error, torch.OutOfMemoryError):
            size = torch.cuda.mem_get_info()[1] / 2 ** 30 if torch.cuda.is_available() else 0
            fits = max((gb for gb in (24, 48, 80, 141) if gb <= size * 1.1), default=24)    # 44.5 GiB is 48 GB
            error = f"not enough memory on a GPU of {size:.0f} GiB: try " + (advice or (
                f"--gpu-memory {fits}, which sets --micro-batch, --checkpointing and --offload, then a smaller "
                f"--micro-batch or --resolution, or --fsdp"))
        elif pathlib.Path(__file__).resolve().parent not in raised_in.parents[:2]:      # csrc/, too
            crash()
            raise
        complain("error", " ".join(str(error).split()))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2) if dist.is_initialized() or busy() else sys.exit(2)    # others may wait in a collective
    except SystemExit:
        raise
    except KeyboardInterrupt:                                          # raised again, so that a shell's loop ends, too
        sys.excepthook = without_traceback
        crash(130)
        raise
    except BaseException:                                              # with torch.distributed.checkpoint's own kind
        crash()
        raise


def without_traceback(kind, error, trace):
    """In place of sys.excepthook: Ctrl-C in a word, anything else as ever."""
    print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, error, trace)


def place():
    """Which of several processes this is, and where, for a message; "" where it is the only one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return f" (process {os.environ.get('RANK', 0)} of {world}, {os.uname().nodename})" if world > 1 else ""


def complain(kind, text):
    """Print a line on stderr; one of several processes starts it anew, as another's progress bar may be there."""
    for bar in list(getattr(tqdm, "_instances", ())):                  # or they would draw themselves below the line
        bar.close()
    print("\n" * bool(place()) + f"{kind}{place()}: {text}\n", end="", file=sys.stderr)   # at once: others print, too


def busy():
    """Drop the rewards that wait for a thread; does it compute one that does not end within a second?"""
    return any([scoring.drop() for scoring in Scoring.made])


# What Gloo, NCCL and the store say of another process that is gone, or does not answer.
LOST = re.compile(r"^\[\S*gloo/transport|ncclRemoteError|communicator was aborted|Watchdog caught|wait timeout|"
                  r"likely closed|waiting for clients")


def crash(status=1):
    """End at once, with a traceback, where other processes may wait in a collective or a thread computes a reward; in
    a line and 3 s late, where another process has ended: torchrun takes the first that it sees end for the cause."""
    error, several = sys.exc_info()[1], dist.is_initialized() and dist.get_world_size() > 1
    if place() and isinstance(error, RuntimeError) and LOST.search(str(error)):
        reason = str(error).split("] ", 1)[-1].partition(". This")[0]  # without a place in Gloo's source
        complain("stopped", f"another process ended, or hangs: {' '.join(reason.split())[:200]}")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)                  # no step follows that it could stop after
        time.sleep(3)
    elif several or busy():
        sys.excepthook(*sys.exc_info())
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


MEETING = datetime.timedelta(minutes=10)      # for all processes to start
COLLECTIVE = datetime.timedelta(hours=2)      # for the slowest: a judge that hangs takes 12.5 minutes a chunk of images


def join(device=None, alone=False):
    """This process's rank, how many there are, and its device; several, by torchrun, become a process group.

    device: cpu, cuda, or cuda:N for one process; None: a GPU if there is one. alone: a group of one process, too.
    Raises ValueError if there is no GPU for this process.
    """
    env = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0} | os.environ
    rank, world, local = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU of its own: try torchrun --nproc_per_node "
                             f"{torch.cuda.device_count()}")
        device = torch.device("cuda", local if device.index is None or world > 1 else device.index)
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)                    # attention: alike with and without gradients
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:                    # PR_SET_PDEATHSIG = 1: stop
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)                     # after the step in which torchrun is killed
    if (world > 1 or alone) and not dist.is_initialized():
        backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        store, *_ = next(dist.rendezvous("env://", timeout=MEETING))
        store.set(f"met/{rank}", "")
        store.wait([f"met/{other}" for other in range(world)], MEETING)
        dist.init_process_group(**backend, timeout=COLLECTIVE)
    return rank, world, device


def leave():
    """Leave the process group that `join` made, once all processes have come so far."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def alike(mine, advice):
    """Raise ValueError, on every process, unless all have the same {name: value}; for one it is always so."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name in dict.fromkeys(itertools.chain(*everyone)):
        values = [one.get(name) for one in everyone]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            raise ValueError(f"the processes differ: {name} is {values[0]} in process 0 and {values[odd[0]]} in "
                             f"{str(odd[:8])[1:-1]}{', ...' * (len(odd) > 8)}: {advice}")


def fingerprint(net):
    """{name: the sum of about 64 of its numbers} of a network's weights, to six digits."""
    sums = [p.detach().flatten()[::max(1, p.numel() // 64)].double().sum() for p in net.parameters()]
    return {name: f"{x:.6g}" for (name, _), x in zip(net.named_parameters(), torch.stack(sums).tolist())}


def refuse_taken(out):
    """Raise ValueError for an OUT that holds a run already, or anything else, is a file, or cannot be made."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    begun = out.exists() and {path.name for path in out.iterdir()} - {"samples", "last", "config.json.new"}
    if begun:
        what = "a run: continue it by --resume" if "config.json" in begun else f"{min(begun)}, no run: empty it"
        raise ValueError(f"{out} already holds {what}, or choose another --out")
    there = next(path for path in (out, *out.parents) if os.path.lexists(path))            # OUT, or where it will be
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "is not yours to write to" if there.is_dir() else "is no folder"
        raise ValueError(f"cannot make --out {out}: {there} {why}; choose another --out")


class Run:
    """One run on one process: its place among the processes, its folder, its clock, its counters, its last checkpoint.

    Made first by every `train`. Chooses OUT (a free one by default), refuses one that holds another run, and finds the
    state to resume from; nothing is written before `begin`. Counters are global: images made, network passes forward
    and backward in training (guidance makes two of one; evaluation and checks are not counted), optimizer updates.
    """

    FILES = ("metrics.jsonl", "evals.jsonl")                          # a row a step, a row an evaluation
    WHERE = ("reward_device", "text_cache", "gpu_memory", "micro_batch", "checkpointing", "offload")   # it computes
    in_a_row = 0                                                      # updates skipped since the last that was made

    def __init__(self, cfg, method):
        from csrc import ops
        ops.use(cfg.fused)
        self.cfg, (self.rank, self.world, self.device) = cfg, join(alone=cfg.fsdp)
        if self.world > 1:
            self._started_alike()
        self.method, self.stopping, self.constant, self.norms, self.skipped = method, False, False, [], False
        self.count = {"step": 0, "updates": 0, "images": 0, "forwards": 0, "backwards": 0, "skipped": 0, "seconds": 0.0}
        self.out, self.state = self._open(method)
        self.passes, self.counting = [0, 0], True                     # this process's in this step, see watch
        self.tasks = None, []                                         # the prompts that are drawn from, and by task
        self.shards = None                                            # name of the last checkpoint's
        self.before = None                                            # rows that _parted looks at, once it has
        self.laps, self.mark = {}, time.perf_counter()                # seconds of this step by what they went into
        if self.state:
            self.count, self.norms = self.state["count"], self.state["norms"]
            self.shards = self.state.get("shards")
        self.start = time.time() - self.count["seconds"]
        self.say(f"python {' '.join(sys.argv)}\n{method}, preset {cfg.preset}, on {self.world} x {self.device.type}, "
                 f"out: {self.out}")

    def _started_alike(self):
        """Refuse processes with other flags or other code; only where they compute may differ, as machines do."""
        import models
        import rewards
        from csrc import ops
        files = inspect.getfile(type(self.cfg)), __file__, models.__file__, rewards.__file__, ops.__file__
        mine = {os.path.basename(file): hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()[:8]
                for file in files}
        free = self.WHERE[:2] if self.cfg.fsdp else self.WHERE        # shards want the same passes everywhere
        mine |= {f"--{name.replace('_', '-')}": repr(value) for name, value in dataclasses.asdict(self.cfg).items()
                 if name not in free}
        alike(mine, "start all by the same command, with the same code")

    def _stop(self, name, _):
        if self.stopping and (name == signal.SIGTERM or time.time() - self.stopping < 1):
            return                                                    # torchrun passes on what the terminal sent, too
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = time.time()
        self.say("\nstopping after this step; a second Ctrl-C stops at once")

    def _open(self, method):
        cfg, file = self.cfg, "last/state.pt"
        if cfg.out or cfg.resume:
            out = last_run(method, cfg.out)
        else:
            out = free_run(method)
        out = self._agreed(out)                                       # a file system may show others to each process
        settings, state = dataclasses.asdict(cfg), None
        if cfg.resume:
            before = settings_of(out, type(cfg))
            long = "steps", "minutes", "resume", "out", "eval_every", "save_every", "overlap"
            if self.rank == 0:                                        # before the checkpoint is read: nobody adds to it
                self._lock(out)
            self._agreed(out)
            for key, value in settings.items():
                if key not in (*long, *self.WHERE) and before[key] != value:
                    raise ValueError(f"--resume: {out} was made with {key}={before[key]!r}, not {value!r}")
            try:                                                     # killed before its first checkpoint: start anew
                state = (out / file).exists() and torch.load(out / file, "cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise ValueError(f"{out / file} is damaged ({type(error).__name__}); try another --out") from None
            if not state:
                self.say(f"{out} holds no checkpoint: from the start")
            written = state and state.get("written")
            if state and list(written if isinstance(written, dict) else ()) != list(self.FILES):
                raise ValueError(f"{out / file} is of another version of this code: use that one, or another --out")
            if self.world > 1:
                steps = [None] * self.world
                dist.all_gather_object(steps, state["count"]["step"] if state else None)
                if len(set(steps)) > 1:
                    raise ValueError(f"{out / file} is of steps {steps} as the processes see it: do they share a disk?")
        else:
            refuse_taken(out)
        return out, state

    def begin(self, pipe, sample, params, ema, opt, rows=(), stream=None):
        """Once all inputs are known to be good: make OUT, or go on from its last checkpoint.

        pipe, sample: what is evaluated, as `evaluate` takes them. params, ema, opt, stream: what checkpoints hold.
        rows: RL's prompts, encoded first, with those of evaluation; a new run of RL is scored before its first step.
        """
        self.pipe, self.sample, self.params, self.ema, self.opt, self.stream = pipe, sample, params, ema, opt, stream
        cfg = self.cfg
        if hasattr(cfg, "train_steps") and rows and cfg.groups // self.world % cfg.updates:
            even = self.world * cfg.updates
            self.say(f"--groups {cfg.groups} on {self.world} processes: in each update some wait for others; with "
                     f"--groups {-(-cfg.groups // even) * even} none would")
        if rows:
            few = cfg.steps * cfg.groups < len(rows)                   # so few steps: theirs alone
            drawn = [row for step in range(cfg.steps) for row in self.drawn(rows, step)] if few else rows
            self.prepare([*drawn, *self.test, *self.val])
        self.make_out()
        self.restore()
        if rows and cfg.eval_every and not self.state:
            row = validate(self)
            self.say(f"before: {cfg.eval_reward} {row['eval']:.3f} on {len(self.val)} validation images, guidance "
                     f"{cfg.cfg_eval:g}")
        if threading.current_thread() is threading.main_thread():      # until here there is nothing to be saved
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, self._stop)

    def make_out(self):
        """Make OUT; on --resume, take back the rows that the lost steps wrote."""
        if self.world > 1:
            dist.barrier()                                            # all have looked at OUT before it changes
        if self.rank == 0:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                while not (self.cfg.out or self.cfg.resume):          # a name of our choice: two runs never share one
                    with contextlib.suppress(FileExistsError):
                        self.out.mkdir()
                        break
                    self.out = free_run(self.method)                  # another run was quicker
                    self.say(f"out: {self.out}")
                if not self.cfg.resume:
                    self._lock(self.out)
                    refuse_taken(self.out)
                (self.out / "samples").mkdir(exist_ok=True)
            except OSError as error:
                raise ValueError(f"cannot make --out {self.out}: {error.strerror}") from None
            settings = {**dataclasses.asdict(self.cfg), "resume": False}                   # --steps as typed last
            write_atomic(self.out / "config.json", f"{json.dumps(settings, indent=2)}\n".encode())
            for name in self.FILES:
                with open(self.out / name, "ab+") as f:
                    kept = self.state["written"][name] if self.state else 0
                    if f.tell() < kept:
                        raise ValueError(f"{self.out / name} lacks rows from before the checkpoint: bring the file "
                                         f"back, or choose another --out")
                    f.seek(kept)
                    rest = f.read()
                    if self.state and b'"split": "test"' in rest:     # the run had ended: its scores stay, beside
                        write_atomic(self.out / f"evals-{self.count['step']}.jsonl", rest)
                    f.truncate(kept)
            times, kept = self.out / "times.jsonl", {}
            for row in times.read_text().splitlines() if times.exists() else []:
                if row.endswith("}") and json.loads(row)["step"] <= self.count["step"]:
                    kept.setdefault(json.loads(row)["step"], row)
            write_atomic(times, "".join(f"{row}\n" for row in kept.values()).encode())
        self.out = self._agreed(self.out)

    def _lock(self, out):
        """Refuse a folder while another process writes there. The lock goes with this process, however it ends."""
        try:
            (out / "last").mkdir(parents=True, exist_ok=True)
            self.lock = locked(out / "last" / "lock", f"--out {out}")
        except OSError as error:
            raise ValueError(f"cannot make --out {out}: {error.strerror}") from None

    def _agreed(self, out):
        """The first process's folder, on all of them."""
        box = [str(out)]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return pathlib.Path(box[0])

    def say(self, text):
        """Print on the first process, above the progress bar."""
        if self.rank == 0:
            tqdm.write(text)

    def steps(self, name="", **options):
        """The numbers of the steps to come, until it is time to end, beside a progress bar on the first process.

        The bar is without an end where --minutes is what ends the run.
        """
        total = self.cfg.steps if self.cfg.steps < 100000 or self.cfg.minutes >= 1e6 else None
        self.bar = tqdm(initial=self.count["step"], total=total, disable=self.rank > 0, desc=name or self.method,
                        unit="step", dynamic_ncols=True, **options)
        self.laps, self.mark, self.seen = {}, time.perf_counter(), ""
        while not self.done():
            yield self.count["step"]
            self.bar.update()
        self.bar.close()
        if total and self.count["step"] < total and time.time() - self.start > 60 * self.cfg.minutes:
            self.say(f"--minutes {self.cfg.minutes:g} are over, after {self.count['step']} of --steps {total}")

    def done(self):
        """Is it time to end: all steps, the minutes used up (after a step), or a signal? The same on every process."""
        late = self.count["step"] and time.time() - self.start > 60 * self.cfg.minutes
        over = self.count["step"] >= self.cfg.steps or late or self.stopping
        return bool(self.sum(torch.tensor(float(over)))) if self.world > 1 else over

    # -- counters: what a step cost, as it happened --------------------------------------------------------------------

    def watch(self, net):
        """Count a network's passes from now on, image by image: forward, and backward where there was a gradient."""
        def forward(module, inputs, output):
            if self.counting:
                self.passes[0] += len(output)
                if output.requires_grad:
                    output.register_hook(backward)

        def backward(grad):
            self.passes[1] += len(grad)
        net.register_forward_hook(forward)

    @contextlib.contextmanager
    def uncounted(self):
        """For passes that are no training: evaluation, checks, estimates."""
        self.counting, before = False, self.counting
        try:
            yield
        finally:
            self.counting = before

    def tally(self, images):
        """A step is over: count it, its images, and the passes of all processes since the last."""
        passes, self.passes = torch.tensor(self.passes), [0, 0]
        forwards, backwards = self.sum(passes).tolist()
        for name, more in dict(step=1, images=images, forwards=forwards, backwards=backwards).items():
            self.count[name] += more

    # -- exchange between processes: prompts, rewards, gradients, sums ------------------------------------------------

    def drawn(self, rows, step):
        """The prompts of a step, over all processes."""
        if self.tasks[0] is not rows:                                  # 50,000 rows take 50 ms to sort
            self.tasks = rows, tasks_of(rows)
        return draw_prompts(rows, self.cfg.groups, mix(self.cfg.seed, step, "prompts"), self.tasks[1])

    def groups(self, rows, step):
        """This process's share of the prompts drawn for a step, cfg.groups in all, each group_size times.

        Returns the prompts and their rows.
        """
        metas = [row for row in self.mine(self.drawn(rows, step)) for _ in range(self.cfg.group_size)]
        return [row["prompt"] for row in metas], metas

    def chunks(self, group_size):
        """This process's images, whole groups and about micro_batch at once: (slice, the groups' numbers) of each.

        Groups are counted over all processes.
        """
        mine = self.cfg.groups // self.world
        most, first = max(1, self.cfg.micro_batch // group_size), self.rank * mine
        return [(slice(g * group_size, min(g + most, mine) * group_size), range(first + g, first + min(g + most, mine)))
                for g in range(0, mine, most)]

    def pieces(self, chunks):
        """The slices that a rollout takes at once of its chunks, as in bf16 a result depends on the batch's size."""
        size = self.cfg.micro_batch
        return [slice(i, min(i + size, s.stop)) for s, _ in chunks for i in range(s.start, s.stop, size)]

    def portions(self, update, kept=None):
        """The images of one of the updates, which share out whole groups, micro_batch at once: their indices in this
        process's batch, as a tensor on its device and as a list. kept: for each group of all processes, is it trained?

        Shards want as many passes on every process: where images have run out the list is empty, and the tensor has the
        first one.
        """
        cfg, mine = self.cfg, self.cfg.groups // self.world
        groups = [g for g in range(self.rank * mine, (self.rank + 1) * mine)
                  if g % cfg.updates == update and (kept is None or kept[g])]
        turn = [(g - self.rank * mine) * cfg.group_size + i for g in groups for i in range(cfg.group_size)]
        most = -(-mine // cfg.updates) * cfg.group_size if cfg.fsdp else len(turn)
        for k in range(0, most, cfg.micro_batch):
            some = turn[k:k + cfg.micro_batch]
            yield sent(torch.tensor(some or [0]), self.device), some

    def mine(self, x):
        """This process's slice of a global batch, a tensor or a list."""
        n = len(x) // self.world
        return x[self.rank * n:(self.rank + 1) * n]

    def gather(self, x):
        """The global batch (B, ...) from every process's slice, in the order of the ranks."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def mean(self, values):
        """{name: float} of equal shares of a batch, averaged over all processes."""
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64, device=self.device))
        return dict(zip(values, (total / self.world).tolist()))

    def sum(self, x):
        """The sum of a small tensor over all processes, a new one where there are several."""
        if self.world > 1:
            x = x.to(self.device, copy=True)                          # all_reduce sums in place
            dist.all_reduce(x)
        return x

    @torch.no_grad()
    def update(self, opt, params, max_norm, rate=None, skip_above=20.0):
        """Sum the gradients over the processes in few all-reduces, clip their norm, take the step. Returns the norm.

        A norm that is NaN, infinite or, from ten of them on, over skip_above times the median of the last 50 is a
        spike: the step is skipped, said, counted as an update and as skipped, and told by `skipped`. A spike counts as
        the limit in that median, so that a lasting rise is let through in the end.
        """
        import models
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        sharded = models.is_sharded(params)                           # FSDP2 has summed them already
        if self.world > 1 and not sharded:
            for some in (grads[k:k + 64] for k in range(0, len(grads), 64)):               # all at once would be a copy
                flat = torch.cat([g.flatten() for g in some])
                dist.all_reduce(flat)
                parts = flat.split([g.numel() for g in some])
                torch._foreach_copy_(some, [part.view_as(g) for g, part in zip(some, parts)])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(models.local(grads))))
        norm = (self.sum(norm.square()).sqrt() if sharded else norm).item()
        limit = skip_above * statistics.median(self.norms) if len(self.norms) >= 10 else math.inf
        self.skipped = not math.isfinite(norm) or norm > limit
        if self.skipped:
            self.count["skipped"], self.in_a_row = self.count["skipped"] + 1, self.in_a_row + 1
            self.say(f"update {self.count['updates']} skipped: gradient norm {norm:.3g}, limit {limit:.3g}")
        else:
            torch._foreach_mul_(models.local(grads), min(1.0, max_norm / (norm + 1e-6)))
            for group in opt.param_groups:
                group["lr"] = group["lr"] if rate is None else rate
            for p, g in zip(params, grads):
                p.grad = g
            opt.step()
            self.in_a_row = 0
        if self.in_a_row >= 50:
            raise ValueError(f"50 updates in a row were skipped, the last for a gradient norm of {norm:.3g}: try a "
                             f"smaller --lr, or --dtype float32")
        if math.isfinite(norm) and norm > 0:                          # a median of 0 would skip all that follow
            self.norms = (self.norms + [min(norm, limit)])[-50:]
        opt.zero_grad(set_to_none=True)
        self.count["updates"] += 1
        self.lap("update")
        return norm

    def lap(self, name):
        """The seconds since the last lap went into `name`: rollout, reward, update, rest. A GPU is waited for."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.mark
        self.mark = now

    # -- what is written ----------------------------------------------------------------------------------------------

    def report(self, images, row):
        """A step is over: count it and its images, log its row, with an evaluation and a checkpoint where they are due.

        What is evaluated is the moving average, where there is one.
        """
        import models
        self.tally(images)
        if self.cfg.eval_every and self.count["step"] % self.cfg.eval_every == 0:
            with models.using(self.params, self.ema):
                row |= validate(self)
            self.seen = f"  val {row['eval']:.3f}"
        shown = f"reward {row['reward']:.3f}" if "reward" in row else f"loss {row['loss']:.4f}"
        self.bar.set_postfix_str(shown + self.seen, refresh=False)
        self.log(row)
        if self.count["step"] % self.cfg.save_every == 0:
            self.save()

    def log(self, row):
        """Append a step to metrics.jsonl, the counters and the row, and to times.jsonl, the laps since the last.

        Two files, so that all of metrics.jsonl but `seconds` and `memory` is a function of the seed.
        """
        self.lap("rest")
        times, self.laps = {"step": self.count["step"], **self.laps}, {}
        self.count["seconds"] = round(time.time() - self.start, 3)
        memory = {"memory": torch.cuda.max_memory_allocated() / 1e9} if self.device.type == "cuda" else {}     # GB
        if self.rank == 0:
            if "eval_gold" in row:
                row["parted"] = self._parted(row)
            row = {**self.count, "eval": None, **row, **memory}
            self._append("metrics.jsonl", row)
            self._append("times.jsonl", times)
            if self.before is not None:                                # as it would be read again
                self.before.append({name: finite(row[name]) for name in PARTING if name in row})

    def log_evals(self, *rows):
        """Append evaluations to evals.jsonl: the counters and, of each row, `split`, `guidance`, what verdict found."""
        if self.rank == 0:
            self._append("evals.jsonl", *({**self.count, "seconds": time.time() - self.start, **row} for row in rows))

    def _append(self, file, *rows):
        """Lines of JSON at a file's end, floats to nine digits. ValueError naming the file, on a full disk, say."""
        try:
            with open(self.out / file, "a", encoding="utf-8") as f:
                f.write("".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))
        except OSError as error:
            raise ValueError(f"cannot write {self.out / file}: {error.strerror}") from None

    def _parted(self, row):
        """Do proxy and gold part ways in this row of an evaluation? Said where the last evaluation's did not say so."""
        if self.before is None:                                        # the first one here: read once, then kept
            start, before = ([json.loads(line) for line in (self.out / name).read_text().splitlines()]
                             for name in ("evals.jsonl", "metrics.jsonl"))
            self.before = start[:1] + before                           # the evaluation before the first step
        before, step = self.before, self.count["step"]
        far = [i for i, past in enumerate(before) if "eval_gold" in past and past["step"] <= step - WINDOW]
        del before[:far[-1] if far else 0]                             # no later evaluation looks at them again
        found = parting([*before, {**self.count, **row}], evaluated=self.cfg.eval_reward == self.cfg.reward)
        if found and not any([old["parted"] for old in before if "parted" in old][-1:]):
            since, rise, fall = found
            self.say(f"step {self.count['step']}: proxy and gold part ways, since step {since} {self.cfg.reward} rose "
                     f"by {rise:.3g} and {self.cfg.gold_reward} fell by {fall:.3f} to {row['eval_gold']:.3f}")
        return bool(found)

    def save(self):
        """Write last/state.pt, whole or not at all: what a resume needs, with this class's own counters.

        Then last/lora.safetensors, where a LoRA is trained: its moving average, if there is one, as the end writes it.
        stream: training data, whose place is kept for every process. Sharded weights go by torch.distributed.checkpoint
        into last/shards-STEP, which state.pt names when it is whole; any number of processes can read them again.
        """
        import models
        from csrc import ops
        params, ema, opt, stream = self.params, self.ema, self.opt, self.stream
        big = {"params": [p.data for p in params], "ema": ema or [], "opt": opt.state_dict()}
        name = f"shards-{self.count['step']}" if models.is_sharded(params) else ""
        if name:
            import torch.distributed.checkpoint as dcp
            if name != self.shards:                                   # never over those that state.pt names
                dcp.save(big, checkpoint_id=self.out / "last" / name)
            self.shards, big = name, {"shards": name, "stepped": bool(opt.state)}          # no moments before that
        if stream is not None:
            big["places"] = [stream.state()] * self.world
            if self.world > 1:
                dist.all_gather_object(big["places"], stream.state())
        if self.rank == 0:
            written = {}
            for file in self.FILES:                                   # on disk before state.pt counts on them
                with open(self.out / file, "ab") as f:
                    os.fsync(f.fileno())
                    written[file] = f.tell()
            state = {**big, "count": self.count, "norms": self.norms, "written": written, "ops": ops.status()}
            write_atomic(self.out / "last" / "state.pt", lambda f: torch.save(state, f))
            if self.cfg.lora_rank:                                    # for trying it while the run goes on
                with models.using(params, ema):
                    models.save_lora(self.pipe.net, self.out / "last" / "lora.safetensors")
            for old in (self.out / "last").glob("shards-*"):
                if old.name != name:
                    shutil.rmtree(old)

    def restore(self):
        """Put the last checkpoint, if there is one, back in place."""
        if not self.state:
            return
        from csrc import ops
        state, params, ema, opt, stream = self.state, self.params, self.ema, self.opt, self.stream
        if "shards" in state:
            import torch.distributed.checkpoint as dcp
            opt.state = {p: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                         for p in params if state.get("stepped", True)}
            big = {"params": [p.data for p in params], "ema": ema or [], "opt": opt.state_dict()}
            dcp.load(big, checkpoint_id=self.out / "last" / state["shards"])
            state = {**state, **big}
        if state.get("ops", ops.status()) != ops.status():
            self.say(f"until here {state['ops']}, from here {ops.status()}: equal up to rounding, not bit for bit")
        restore(params, state["params"])
        restore(ema or [], state["ema"])
        opt.load_state_dict(state["opt"])
        for key in ("params", "ema", "opt"):                          # weights that nobody needs twice
            self.state.pop(key, None)
        if stream is not None and any(state["places"]):                # none: the tiny world's, a function of the step
            if len(state["places"]) != self.world:
                raise ValueError(f"--resume: the place in the data was saved by {len(state['places'])} processes, now "
                                 f"there are {self.world}: use as many")
            stream.restore(state["places"][self.rank])

    def prepare(self, rows):
        """Have the pipeline encode all prompts of a run, shared out over the processes, before training starts.

        Raises ValueError where what another process has encoded is not to be seen.
        """
        prompts = sorted({"", *(row["prompt"] for row in rows)})
        self.pipe.prepare(prompts, self.cfg.text_cache, self.rank, self.world)
        if self.world > 1:
            dist.barrier()
            for prompt in prompts[:self.world]:                       # one of every process's
                if not self.pipe.is_kept(prompt):
                    raise ValueError(f"{self.pipe.folder} lacks what another process encoded: give --text-cache a "
                                     f"folder that all machines share")


def finite(value):
    """A value for JSON: floats to nine digits, None for NaN and infinity, which it has not; in dicts and lists, too."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None


def write_atomic(path, content):
    """Write bytes to a file so that a kill leaves the old file or the new one, never a part.

    content: bytes, or a function that writes to the open file. Raises ValueError naming the file, on a full disk, say.
    """
    new = pathlib.Path(f"{path}.new")
    try:
        with open(new, "wb") as f:
            content(f) if callable(content) else f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except BaseException as error:
        with contextlib.suppress(OSError):                             # where its folder is a file, say
            new.unlink(missing_ok=True)                                # a part of it, on a full disk
        cause = error.__context__ if isinstance(error, RuntimeError) else error            # torch.save's own, over it
        if isinstance(cause, OSError):
            raise ValueError(f"cannot write {path}: {cause.strerror}") from None
        raise


def locked(file, what):
    """A file, open and locked until it is closed or the process ends. ValueError, naming `what`, if another has it."""
    lock = open(file, "ab")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{what} is another process's, which still runs: end that, or choose another folder") from None
    except OSError:                                                   # a file system without locks
        pass
    return lock


def write_png(path, image):
    """Write a PIL image as a PNG, as `write_atomic` writes."""
    write_atomic(path, lambda file: image.save(file, "PNG"))


def check_ratio(run, differences, stop=True):
    """Before the first update: how far are the ratios of the weights to themselves from 1? differences: of log-probs.

    stop: raise ValueError if further than a tenth of the clip range, which is a bug; else only say that the passes with
    gradients differ so much, which bf16's rounding can do. With --cfg-train other than --cfg-rollout the ratio is not
    one of a policy to itself; that is said in place of both.
    """
    cfg = run.cfg
    if stop and cfg.kl_beta and cfg.cfg_ref != cfg.cfg_train:
        run.say(f"--cfg-ref {cfg.cfg_ref:g} is not --cfg-train {cfg.cfg_train:g}: the KL pulls the policy to another "
                f"guidance scale, and is not 0 at the start")
    none = torch.zeros(1, device=run.device, dtype=wide(cfg.dtype))    # a process may have no images in an update
    worst = torch.cat([*differences, none]).expm1().abs().amax(0, keepdim=True)            # NaN if any is
    worst, limit = run.gather(worst).max().item(), cfg.clip_range / 10
    if cfg.cfg_train != cfg.cfg_rollout:
        if stop:
            run.say(f"--cfg-train {cfg.cfg_train:g} is not --cfg-rollout {cfg.cfg_rollout:g}, so images are drawn from "
                    f"one policy and another is trained: the worst |ratio - 1| is {worst:.1e} before the first update, "
                    f"and beyond --clip-range {cfg.clip_range} little is learned")
        return
    if stop:
        run.say(f"before the first update the worst |ratio - 1| is {worst:.1e} (a tenth of the clip range: "
                f"{limit:.1e})")
    if stop and not worst <= limit:
        raise ValueError(f"the same weights give other log-probs than the rollout: |ratio - 1| = {worst:.1e}, over a "
                         f"tenth of --clip-range {cfg.clip_range}; use --dtype float32 or a wider clip")
    if not worst <= limit:
        run.say(f"in the update's own batches it is {worst:.1e}: the rounding of --dtype {cfg.dtype} takes part in "
                f"the clip; a --micro-batch that divides --group-size makes its batches the rollout's")


class Optimizers(list):
    """Several optimizers as one: step, zero_grad, param_groups and the state of all."""

    @property
    def param_groups(self):
        return [group for opt in self for group in opt.param_groups]

    def step(self):
        for opt in self:
            opt.step()

    def zero_grad(self, set_to_none=True):
        for opt in self:
            opt.zero_grad(set_to_none)

    def state_dict(self):
        return [opt.state_dict() for opt in self]

    def load_state_dict(self, states):
        for opt, state in zip(self, states, strict=True):
            opt.load_state_dict(state)


def optimizer(cfg, net, params):
    """AdamW; or for cfg.optimizer "muon" Muon on the matrices and AdamW on the rest, at rates that go together."""
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay, foreach=True)
    matrices = [p for p in params if p.ndim == 2]
    return Optimizers([torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay,
                                        adjust_lr_fn="match_rms_adamw"),
                       torch.optim.AdamW([p for p in params if p.ndim != 2], lr=cfg.lr, weight_decay=0.0,
                                         betas=(0.9, 0.99))])


class WorldStream:
    """Training batches of the tiny world, drawn one ahead while the last is used: stream(step) -> images, captions.

    A batch is drawn whole by every process, which takes its slice: any number of them trains on the same images.
    """
    cached = False

    def __init__(self, seed, batch, size, rank=0, world=1):
        self.seed, self.shape, self.mine = seed, (world * batch, size), slice(rank * batch, (rank + 1) * batch)
        self.artist, self.ahead = ThreadPoolExecutor(1), {}

    def _draw(self, step):
        return self.artist.submit(world_batch, self.seed, step, *self.shape)

    def __call__(self, step):
        now = self.ahead.pop(step, None) or self._draw(step)
        self.ahead = {step + 1: self._draw(step + 1)}
        images, captions, _ = now.result()
        return images[self.mine], captions[self.mine]

    def state(self):
        return {}                                                      # a batch is a function of its step

    def restore(self, state):
        pass


class ImageStream:
    """The same of image files, `Images`, or of a folder of latents and text features, `Cached`: one batch ahead, too.

    Raises ValueError after an epoch without one good image.
    """

    def __init__(self, spec, size, rank, world, batch, seed):
        self.cached = any(pathlib.Path(spec).glob("*-of-*-*.safetensors"))                 # as `latents` names them
        self.source = Cached(spec, rank, world, seed) if self.cached else Images(spec, size, rank, world, seed)
        self.name, self.batch, self.at = spec, batch, self.source.state()
        self.reader, self.ahead = ThreadPoolExecutor(1), None

    def _read(self):
        return next(self.batches), self.source.state()                # and the place after it

    def __call__(self, step):
        if self.ahead is None:
            self.batches = self.source.batches(self.batch)
            self.ahead = self.reader.submit(self._read)
        batch, self.at = self.ahead.result()
        self.ahead = self.reader.submit(self._read)
        return batch

    def state(self):
        return self.at                                                 # of the batch that was given out last

    def restore(self, state):
        self.source.restore(state)
        self.at = state


def check_cached(spec, found, wanted):
    """Raise ValueError unless a batch's shapes, the batch's size left out, are those that the model wants."""
    if found != wanted:
        raise ValueError(f"--images {spec} holds latents and text features of shapes {found}, and this model wants "
                         f"{wanted}: encode the images for it, at its --resolution")


@torch.no_grad()
def encoded(run, batch, null, dropped):
    """A batch of run.stream as the network takes it: latents x_0 (B, C, H, W) and [(B, L, D)], text features.

    null: the features of an empty caption; where dropped, (B,) bool, is set they stand for a caption's own.
    """
    cfg, (images, *captions) = run.cfg, batch                          # (B, 3, H, W) in [0, 1], B strings; or latents
    if not run.stream.cached:
        ctx = run.pipe.encode(["" if d else c for d, c in zip(dropped.tolist(), captions[0])])
        return run.pipe.encode_images(images.to(run.device)).to(wide(cfg.dtype)), ctx
    check_cached(cfg.images, [tuple(x.shape[1:]) for x in batch],
                 [run.pipe.latent_shape(cfg.resolution), *(tuple(n.shape[1:]) for n in null)])
    empty = dropped[:, None, None].to(run.device)
    return images.to(run.device, wide(cfg.dtype)), [torch.where(empty, n, c.to(n)) for n, c in zip(null, captions)]


def training_stream(spec, size, rank, world, batch, seed):
    """Batches to train on: "shapes", the tiny world; else a folder, a tar or a pattern of tars, or a cached folder.

    batch: images a process. Files are shared out among the processes: what meets in a batch depends on their number.
    """
    if spec == "shapes":
        return WorldStream(seed, batch, size, rank, world)
    return ImageStream(spec, size, rank, world, batch, seed)


def failure(error):
    """An exception of somebody's own function in words, with the last line that is no package's: (file:line)."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not re.search(r"[/\\](site|dist)-packages[/\\]", frame.filename)] or frames
    return f"{type(error).__name__}: {error} ({own[-1].filename}:{own[-1].lineno})"


def scored(name, score, images, prompts, metas):
    """score(images, prompts, metas), (B,) float32. ValueError if it raises or does not return one number an image.

    torch.OutOfMemoryError goes through: exit_codes knows what helps.
    """
    try:
        reward = score(images, list(prompts), [copy.deepcopy(meta) for meta in metas])     # its own, to change
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"the reward {name} failed: {failure(error)}") from error
    if not torch.is_tensor(reward) or reward.shape != (len(prompts),):
        got = tuple(reward.shape) if torch.is_tensor(reward) else type(reward).__name__
        raise ValueError(f"the reward {name} returned {got} for {len(prompts)} images: it must return one number each")
    return reward.detach().float()


def masked(name, reward):
    """A global batch of rewards, NaN where one failed. ValueError if more than a tenth did: that is no accident."""
    reward = torch.where(reward.isfinite(), reward, torch.nan)
    failed = int(reward.isnan().sum())
    if failed > len(reward) / 10:
        raise ValueError(f"the reward {name} gave NaN or infinity for {failed} of {len(reward)} images, over a tenth: "
                         f"nothing can be learned from it")
    return reward


class Scoring:
    """The rewards of a rollout, chunk by chunk; with --overlap by a thread, one while the next is sampled.

    add(images, prompts, metas) for each chunk, whole groups, then result() and row(adv), and so on for the next
    rollout. Both ways score the same chunks in the same order, so the numbers are the same, bit for bit. On a GPU the
    thread has a stream of its own. On a CPU it helps where the reward waits for a server; else they share the cores.
    """

    made, LONG = weakref.WeakSet(), 300                                # all of them, for `busy`; seconds

    def __init__(self, run, score):
        self.run, self.score, self.chunks, self.parts, self.values, self.unparsed = run, score, [], [], {}, {}
        cuda = run.cfg.overlap and run.device.type == "cuda"           # a new thread's GPU is the first one: say which
        self.thread = ThreadPoolExecutor(1, "reward", *((torch.cuda.set_device, (run.device,)) if cuda else ())
                                         ) if run.cfg.overlap else None
        self.stream = torch.cuda.Stream(run.device) if cuda else None
        Scoring.made.add(self)

    def add(self, images, prompts, metas):
        """images: (b, 3, H, W) in [0, 1]. Raises ValueError if the reward has failed by now, as `scored` does."""
        self.chunks.append(images)                                    # kept: no other stream may take its memory yet
        made = torch.cuda.current_stream(self.run.device).record_event() if self.stream else None
        if not self.thread:
            self.run.lap("rollout")
            self.parts.append(self._score(images, prompts, metas, made))
            self.run.lap("reward")
            return
        for part in self.parts:
            if part.done():
                part.result()
        self.parts.append(self.thread.submit(self._score, images, prompts, metas, made))

    def _score(self, images, prompts, metas, made):
        """A chunk's rewards (b,), {name: raw rewards (b,)} and {judge: unparsed}, on the CPU: the stream has ended."""
        with torch.cuda.stream(self.stream):                           # None: the one that is
            if made:
                self.stream.wait_event(made)
            reward = scored(self.run.cfg.reward, self.score, images, prompts, metas).cpu()
            values = {name: value.cpu() for name, value in getattr(self.score, "values", {}).items()}
        unparsed = {name: one.unparsed for name, one in getattr(self.score, "rewards", {}).items()
                    if hasattr(one, "unparsed")}
        return reward, values, unparsed

    def _waited(self, part):
        """A chunk's rewards by the thread; said if they are long in coming: other processes stand still."""
        try:
            return part.result(self.LONG)
        except futures.TimeoutError:
            tqdm.write(f"waiting{place()} for the reward {self.run.cfg.reward}, {self.LONG:g} s by now", sys.stderr)
            return part.result()

    def result(self):
        """All processes' rewards, float32 on the CPU, NaN where one failed; this process's `images` (B, 3, H, W) wait.

        With --reward-mix advantage `mixed` in their place; what `row` logs are the rewards in any case. Raises
        ValueError if the reward raises, returns the wrong length, or fails on more than a tenth of all images.
        """
        run, self.images = self.run, torch.cat(self.chunks)
        run.lap("rollout" if self.thread else "reward")
        parts = [self._waited(part) if self.thread else part for part in self.parts]
        run.lap("reward")                                              # by a thread: what was waited for
        reward, values, unparsed = zip(*parts)
        self.values = {name: run.gather(torch.cat([value[name] for value in values]).to(run.device)).cpu()
                       for name in values[0]}                          # each term's, of all processes (B,)
        self.unparsed = {name: sum(share[name] * len(x) for share, x in zip(unparsed, self.chunks)) / len(self.images)
                         for name in unparsed[0]}
        self.chunks, self.parts = [], []
        reward = masked(run.cfg.reward, run.gather(torch.cat(reward).to(run.device)).cpu())
        valid = reward[~reward.isnan()]
        if not run.constant and valid.min() == valid.max():
            run.constant = True
            run.say(f"the reward {run.cfg.reward} is {valid[0]:g} for every image of a rollout: all advantages are 0, "
                    f"nothing is learned from it (said once)")
        self.reward = reward
        return self.mixed() if run.cfg.reward_mix == "advantage" else reward

    def mixed(self):
        """The weighted sum of each term's own advantages (r - mean_g) / std_g, (B,): none leads by a wider scale."""
        from csrc import ops
        adv = sum(self.score.weights[name] * ops.group_advantage(torch.where(value.isfinite(), value, torch.nan),
                                                                 self.run.cfg.group_size)
                  for name, value in self.values.items())
        return adv.masked_fill(self.reward.isnan(), torch.nan)

    def drop(self):
        """Forget the chunks that are not begun. Returns whether one is begun, and not done within a second."""
        if self.thread:
            self.thread.shutdown(wait=False, cancel_futures=True)
            return bool(futures.wait([part for part in self.parts if not part.cancelled()], timeout=1).not_done)
        return False

    def row(self, adv):
        """What is logged of a rollout, given all processes' advantages (B,). The images go: the update wants their
        memory."""
        images, group_size, self.images = self.images, self.run.cfg.group_size, None
        return {"reward": self.reward[~self.reward.isnan()].mean().item(), "failed": int(self.reward.isnan().sum()),
                "stats": self.run.mean(image_stats(images, group_size)), "rewards": self.terms(),
                "advantage": advantage_stats(self.reward, adv, group_size)}

    def terms(self):
        """{name: {mean, std, weight}} of each raw reward in the sum that `rewards.load` made, over the last result; of
        a judge also `unparsed`, the share of images whose answers could not be read.

        Over all processes' images, failed ones left out; std: population. {} for a score of another make.
        """
        run, rows = self.run, {}
        for name, values in self.values.items():
            values = values[values.isfinite()].double()
            rows[name] = {"mean": values.mean().item(), "std": values.std(correction=0).item(),
                          "weight": self.score.weights[name]}
            if name in self.unparsed:
                share = torch.tensor([self.unparsed[name]], device=run.device)
                rows[name]["unparsed"] = run.gather(share).mean().item()
        return rows


def verdict(cfg, rows, values):
    """An evaluation as a row of metrics. rows: the prompts'; values: {reward: (rows,) float64, NaN where it failed}.

    eval, eval_error, tags: the mean of --eval-reward, its standard error, and the means by GenEval's tags; eval_gold,
    gold_error: the same of --gold-reward; others: the means of all other rewards, if there are any. Raises ValueError
    if a reward failed on more than a tenth.
    """
    def mean_and_error(name):
        seen = values[name][~values[name].isnan()]
        return seen.mean().item(), seen.std(correction=0).item() / math.sqrt(len(seen))
    values = {name: masked(name, value) for name, value in values.items()}
    tags = [row.get("tag", "all") for row in rows]
    row = {**dict(zip(("eval", "eval_error"), mean_and_error(cfg.eval_reward))),
           "tags": {tag: round(values[cfg.eval_reward][[t == tag for t in tags]].nanmean().item(), 4)
                    for tag in dict.fromkeys(tags)}}
    others = {name: value.nanmean().item() for name, value in values.items()
              if name not in (cfg.eval_reward, cfg.gold_reward)}
    if others:
        row["others"] = others
    if cfg.gold_reward in values:
        row |= dict(zip(("eval_gold", "gold_error"), mean_and_error(cfg.gold_reward)))
    return row


WINDOW = 30                                   # rollouts, the least between the two evaluations that parting compares
PARTING = ("step", "reward", "eval", "eval_error", "eval_gold", "gold_error", "parted")    # what it is told from


def parting(rows, window=WINDOW, evaluated=False):
    """Do proxy and gold part ways? None, or the step since when, how much the proxy rose and how much gold fell.

    rows: of metrics.jsonl, the last with eval_gold; it is compared with the last such row at least `window` rollouts
    before. Proxy: mean `reward` of the second half of the rollouts between less that of the first half; or `eval`, if
    that is of the reward that is trained on (evaluated). Gold: `eval_gold`. Each has to move by more than its standard
    error.
    """
    new, old = rows[-1], [row for row in rows if "eval_gold" in row and row["step"] <= rows[-1]["step"] - window][-1:]
    proxy = [row["reward"] for row in rows if "reward" in row and old and row["step"] > old[0]["step"]]
    if len(proxy) < 4:
        return None
    old, halves = old[0], (proxy[:len(proxy) // 2], proxy[len(proxy) // 2:])
    rise = statistics.mean(halves[1]) - statistics.mean(halves[0])
    error = math.sqrt(sum(statistics.variance(half) / len(half) for half in halves))
    if evaluated:
        rise, error = new["eval"] - old["eval"], math.hypot(old["eval_error"], new["eval_error"])
    fall, error_too = old["eval_gold"] - new["eval_gold"], math.hypot(old["gold_error"], new["gold_error"])
    return (old["step"], rise, fall) if rise > error and fall > error_too else None


def advantage_stats(reward, adv, group_size):
    """Where a rollout's gradient comes from. reward, adv: (B,), groups contiguous, NaN marks a failed reward.

    square: the mean of A^2; top_decile: the share of sum |A| that the tenth of the images with the largest |A| carry, 0
    if all are 0; prompt_std: 0, 25, 50, 75 and 100 % quantiles of the groups' population std of the reward.
    """
    weight = adv.double().abs().sort(descending=True).values
    std = torch.stack([group[~group.isnan()].std(correction=0) for group in reward.double().view(-1, group_size)
                       if not group.isnan().all()])
    return {"square": weight.square().mean().item(),
            "top_decile": (weight[:-(-len(weight) // 10)].sum() / weight.sum().clamp(min=1e-30)).item(),
            "prompt_std": std.quantile(torch.linspace(0, 1, 5, dtype=std.dtype)).tolist()}


def image_stats(images, group_size):
    """What reward hacking moves first, as floats. images: (B, 3, H, W) in [0, 1], groups contiguous.

    saturation: mean of max - min over the channels; contrast: mean standard deviation of an image's grey levels;
    ground, edges: roughness of the ground and how much there is of edges, the median and the mean difference of
    neighbouring pixels, 0 = flat;
    diversity: mean standard deviation of a pixel within a group.
    """
    images = images.float()
    grey = images.mean(1)

    def roughness(x):        # (G, 3, H, W) -> (2, G); of a group at once, since 1000 images of 512 px would take 20 GB
        across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
        steps = torch.cat([across.flatten(1), down.flatten(1)], 1).abs_()
        return torch.stack([steps.median(1).values, steps.mean(1)])
    ground, edges = torch.cat([roughness(x) for x in images.split(group_size)], 1).mean(1).tolist()
    return {"saturation": (images.amax(1) - images.amin(1)).mean().item(),
            "contrast": grey.flatten(1).std(1).mean().item(),
            "ground": ground, "edges": edges,
            "diversity": images.unflatten(0, (-1, group_size)).std(1).mean().item()}


HEADER = 46                                  # height of a picture's captions, three lines, pixels


def picture(path, rows, captions, titles, scale=3):
    """Save rows of images under captions as one PNG. rows: list of (B, 3, H, W) in [0, 1], one title each."""
    font, text, pad, left = ImageFont.load_default(11), HEADER, 6, 58
    size = rows[0].shape[-1]
    side = size * scale if size < 128 else size // -(-size // 192)
    sheet = Image.new("RGB", (left + len(captions) * (side + pad), text + len(rows) * (side + pad)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, caption in enumerate(captions):
        lines = textwrap.wrap(caption.removeprefix("a photo of "), max(8, side // 6))
        draw.multiline_text((left + j * (side + pad), 2), "\n".join(lines[:3]), fill="black", font=font, spacing=1)
    for i, (images, title) in enumerate(zip(rows, titles)):
        top = text + i * (side + pad)
        draw.multiline_text((2, top + side // 2), "\n".join(textwrap.wrap(title, 9)), "black", font, "lm", spacing=1)
        tiles = (images.float().cpu().clamp(0, 1).permute(0, 2, 3, 1) * 255).round().byte().numpy()
        for j, tile in enumerate(tiles[:len(captions)]):
            sheet.paste(Image.fromarray(tile).resize((side, side), Image.NEAREST if size < 128 else Image.LANCZOS),
                        (left + j * (side + pad), top))
    write_png(path, sheet)


def sheet(run, prompts, draw):
    """Save samples/NNNNNN.png, by the step: one image of each prompt. draw(prompts, keys): images (B, 3, H, W)."""
    if run.rank == 0 or run.cfg.fsdp:                                  # shards: every process takes part
        images = draw(prompts, [("grid", i) for i in range(len(prompts))])
        if run.rank == 0:
            step = run.count["step"]
            picture(run.out / "samples" / f"{step:06d}.png", [images], prompts, [f"step {step}"])


def strip(folder):
    """A run's sheets, at most 60 from the first to the last, one under the other, as samples/strip.png."""
    sheets = sorted((file for file in folder.glob("*.png") if file.stem.isdecimal()), key=lambda file: int(file.stem))
    if sheets:
        most = min(60, len(sheets))
        sheets = [sheets[i * (len(sheets) - 1) // max(1, most - 1)] for i in range(most)]
        with Image.open(sheets[0]) as page:
            width, height = page.width, page.height - HEADER
        whole = Image.new("RGB", (width, HEADER + height * len(sheets)), "white")
        for i, file in enumerate(sheets):
            with Image.open(file) as page:                            # one at a time: a process may open 1024
                whole.paste(page.crop((0, HEADER if i else 0, *page.size)), (0, HEADER + height * i if i else 0))
        write_png(folder / "strip.png", whole)


INKS = [(31, 98, 180), (214, 90, 30), (40, 140, 70), (130, 70, 170), (90, 90, 90), (190, 150, 20), (20, 150, 160)]


def rounds(low, high):
    """Round numbers evenly spaced, three to seven of them, from at most low to at least high: an axis's ticks."""
    high = high if high > low else low + 1
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    return [round(step * i, 10) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def chart(path, panels, ticks=None, width=420, height=300):
    """Save curves as one PNG, panels side by side. Colours are the labels', in their order.

    panels: {title of the horizontal axis: {label: [curve, ...]}}, a curve is [(x, y), ...]; several of a label are
    drawn thin, and thick the mean of their first points, of their second ones, and so on. ticks: what stands on the
    horizontal axis.
    """
    font, left, pad = ImageFont.load_default(12), 46, 40
    labels, row = list(dict.fromkeys(label for runs in panels.values() for label in runs)), 3 * len(panels)
    page = Image.new("RGB", (len(panels) * width, height + 14 + 18 * -(-len(labels) // row)), "white")
    pen = ImageDraw.Draw(page)
    for panel, (title, runs) in enumerate(panels.items()):
        xs, ys = zip(*(point for curves in runs.values() for curve in curves for point in curve))
        start, end, levels = min(xs), max(xs), rounds(min(ys), max(ys))
        low, high = levels[0], levels[-1]
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 14, height - pad, 12

        def place(x, y):
            return x0 + (x1 - x0) * (x - start) / ((end - start) or 1), y0 + (y1 - y0) * (y - low) / (high - low)
        for y in levels:
            pen.line([place(start, y), place(end, y)], fill=(228, 228, 228))
            pen.text((x0 - 6, place(start, y)[1]), f"{y:.{2 if high < 5 else 0}f}", "black", font, "rm")
        for x in ticks or [x for x in rounds(start, end) if start <= x <= end]:
            pen.text((place(x, low)[0], y0 + 4), f"{x:,.0f}" if end > 5 else f"{x:.2f}", "black", font, "ma")
        pen.text(((x0 + x1) // 2 - 50, y0 + 20), title, fill="black", font=font)
        for label, curves in runs.items():
            color = INKS[labels.index(label) % len(INKS)]
            for curve in curves:
                pen.line([place(*point) for point in curve], fill=tuple((c + 2 * 255) // 3 for c in color), width=1)
            pen.line([place(*np.mean(points, axis=0)) for points in zip(*curves)], fill=color, width=3)
    for i, label in enumerate(labels):
        x, y = left + 130 * (i % row), height + 2 + 18 * (i // row)
        pen.line([(x, y + 7), (x + 22, y + 7)], fill=INKS[i % len(INKS)], width=3)
        pen.text((x + 28, y), label, fill="black", font=font)
    write_png(path, page)


def wide(dtype):
    """The dtype of latents, log-probs and losses: float32, or float64 for a float64 network."""
    return torch.float64 if dtype == "float64" else torch.float32


def restore(params, values):
    """Copy saved tensors into parameters, in order, in place. ValueError where they are not the same shapes."""
    if [p.shape for p in params] != [value.shape for value in values]:
        raise ValueError("the checkpoint's weights are not the model's: has its directory changed since the run began?")
    with torch.no_grad():
        for p, value in zip(params, values):
            p.copy_(value)


def evaluate(sample, pipe, rows, judges, cfg, run, scale):
    """What one image per row scores, each row's noise fixed, rows shared out over the processes.

    sample(pipe, prompts, keys, cfg, scale) -> images (B, 3, H, W): the algorithm file's own. judges: {name: score} of
    --eval-reward and --gold-reward. Returns a row of metrics, as verdict does.
    """
    own, total = list(range(run.rank, len(rows), run.world)), torch.zeros(len(judges), len(rows), dtype=torch.float64)
    for k in range(0, -(-len(rows) // run.world), cfg.micro_batch):    # as often on every process, as shards ask for
        some = own[k:k + cfg.micro_batch] or own[:1]
        prompts = [rows[i]["prompt"] for i in some]
        images = sample(pipe, prompts, [("eval", i) for i in some], cfg, scale)
        for name, values in zip(judges, total):
            values[some] = scored(name, judges[name], images, prompts, [rows[i] for i in some]).double().cpu()
    return verdict(cfg, rows, dict(zip(judges, run.sum(total).cpu())))


def validate(run):
    """A row of metrics: what the validation prompts score. A picture of the first, always from the same noise."""
    cfg = run.cfg
    with run.uncounted():
        sheet(run, [row["prompt"] for row in run.val[:8]], lambda *some: run.sample(run.pipe, *some, cfg, cfg.cfg_eval))
        row = evaluate(run.sample, run.pipe, run.val, run.judges, cfg, run, cfg.cfg_eval)
    run.log_evals({"split": "val", "guidance": cfg.cfg_eval, **row})
    return row


def finish(run, start):
    """End a run: write the weights, evaluate before and after on test prompts, draw both, print the final JSON line.

    The weights come first: torchrun kills a process 30 s after Ctrl-C (TORCH_ELASTIC_SHUTDOWN_TIMEOUT). start: those
    before training, in the order of the parameters; those after it are the moving average, if there is one. The second
    guidance scale, cfg_also, is evaluated for both.
    """
    import models
    run.save()
    cfg, pipe, sample, rows, seconds = run.cfg, run.pipe, run.sample, run.test, time.time() - run.start
    params, trained = run.params, run.ema
    if run.rank == 0 or cfg.fsdp:                                     # shards: every process takes part
        with models.using(params, trained):
            if cfg.lora_rank:
                models.save_lora(pipe.net, run.out / "lora.safetensors")
            elif pipe.family == "uvit":                               # no library knows it: the whole pipeline
                small = cfg.model.startswith("tiny") and cfg.dtype == "bfloat16"       # the shipped ones: finer in fp16
                models.save_uvit(pipe, run.out / "model", torch.float16 if small else models.DTYPES[cfg.dtype])
            else:
                pipe.net.save_pretrained(run.out / ("unet" if pipe.ddpm else "transformer"), models.DTYPES[cfg.dtype])
    row, tags, found = {}, {}, []
    nothing = {name: type(count)() for name, count in run.count.items()}
    for when, weights, count in (("before", start, nothing), ("after", trained, run.count)):
        with models.using(params, weights):
            result = evaluate(sample, pipe, rows, run.judges, cfg, run, cfg.cfg_eval)
            tags[when] = result["tags"]
            row |= {f"{key}_{when}": result[key] for key in ("eval", "eval_gold") if key in result}
            found.append({**count, "split": "test", "guidance": cfg.cfg_eval, **result})
            if cfg.cfg_also:
                result = evaluate(sample, pipe, rows, run.judges, cfg, run, cfg.cfg_also)
                row[f"also_{when}"] = result["eval"]
                found.append({**count, "split": "test", "guidance": cfg.cfg_also, **result})
    by_tag = {}
    for r in rows:
        by_tag.setdefault(r.get("tag"), []).append(r["prompt"])
    shown = [p for prompts in by_tag.values() for p in list(dict.fromkeys(prompts))[:max(2, 12 // len(by_tag))]][:12]
    if run.rank == 0 or cfg.fsdp:                                     # shards: every process takes part
        grids = []
        for weights in (start, trained):
            with models.using(params, weights):
                grids.append(sample(pipe, shown, [("grid", i) for i in range(len(shown))], cfg, cfg.cfg_eval))
        if run.rank == 0:
            picture(run.out / "samples" / "before_after.png", grids, shown, ["before", "after"])
            strip(run.out / "samples")
    run.log_evals(*found)                                             # last: what has them has ended
    run.say(f"{'guidance':>10} {'before':>8} {'after':>8}   {cfg.eval_reward}, {len(rows)} test images, "
            f"{cfg.eval_steps} steps\n"
            f"{cfg.cfg_eval:>10g} {row['eval_before']:>8.3f} {row['eval_after']:>8.3f}" +
            (f"\n{cfg.cfg_also:>10g} {row['also_before']:>8.3f} {row['also_after']:>8.3f}" if cfg.cfg_also else "") +
            (f"\n{'gold':>10} {row['eval_gold_before']:>8.3f} {row['eval_gold_after']:>8.3f}   {cfg.gold_reward}"
             if len(run.judges) > 1 else "") +
            "".join(f"\n{tag or 'all':>16} {tags['before'][tag]:>8.3f} {tags['after'][tag]:>8.3f}"
                    for tag in tags["after"]) +
            f"\npictures: {run.out / 'samples' / 'before_after.png'}")
    last_line(run, {key: round(value, 4) for key, value in row.items()}, seconds)
    leave()


def painted(run, sample, pipe, rows, judges, title):
    """What the rows' prompts score, as `evaluate` says, logged and printed; samples/sample.png of the first."""
    cfg, file, shown = run.cfg, run.out / "samples" / "sample.png", [row["prompt"] for row in rows[:12]]
    row = evaluate(sample, pipe, rows, judges, cfg, run, cfg.cfg_eval)
    images = sample(pipe, shown, [("grid", i) for i in range(len(shown))], cfg, cfg.cfg_eval)
    if run.rank == 0:
        picture(file, [images], shown, [title])
    run.say(f"{cfg.eval_reward} {row['eval']:.3f} on {len(rows)} images, {cfg.eval_steps} steps of {title}: {file}")
    run.log_evals({"split": "val", "guidance": cfg.cfg_eval, **row})
    last_line(run, {"eval_before": round(row["eval"], 4), "eval_after": None})


def last_line(run, row, seconds=None):
    """The JSON object that ends what a script prints. seconds: of the run; None: up to now."""
    if run.rank == 0:
        cfg, count = run.cfg, run.count
        seconds = time.time() - run.start if seconds is None else seconds
        print(json.dumps({"method": cfg.method, "model": cfg.model, **row, "steps": count["step"],
                          "images": count["images"], "seconds": round(seconds, 1), "out": str(run.out)}), flush=True)


def comparison(run, sample, lines, steps, rows, judges):
    """What each line's sampler scores at each number of steps: printed, compare.csv, samples/curves.png, compare.png.

    lines: (name, Config, pipeline) of each; sample, rows, judges: as `evaluate` takes them.
    """
    table, grids, titles, shown = {name: {} for name in judges}, [], [], [row["prompt"] for row in rows[:8]]
    with tqdm(total=len(lines) * len(steps), desc="compare", disable=run.rank > 0, dynamic_ncols=True) as bar:
        for name, cfg, pipe in lines:
            for n in steps:
                cfg = dataclasses.replace(cfg, eval_steps=n)
                row = evaluate(sample, pipe, rows, judges, cfg, run, cfg.cfg_eval)
                for reward in judges:
                    table[reward][name, n] = row["eval"] if reward == cfg.eval_reward else (
                        row["eval_gold"] if reward == cfg.gold_reward else row["others"][reward])
                if n in (min(steps), 10) and "guidance" not in name:
                    grids.append(sample(pipe, shown, [("grid", i) for i in range(len(shown))], cfg, cfg.cfg_eval))
                    titles.append(f"{name} {n}")
                bar.update()
    names = list(dict.fromkeys(name for values in table.values() for name, _ in values))
    text = [line for reward, values in table.items() for line in (
        [reward, *steps], *([name, *(f"{values[name, n]:.3f}" for n in steps)] for name in names))]
    if run.rank == 0:
        page = io.StringIO(newline="")
        csv.writer(page, lineterminator="\n").writerows(text)          # a sum of rewards has commas in its name
        write_atomic(run.out / "compare.csv", page.getvalue().encode())
        chart(run.out / "samples" / "curves.png", {
            f"{reward} against steps": {name: [[(n, values[name, n]) for n in steps]] for name in names}
            for reward, values in table.items()}, steps)
        picture(run.out / "samples" / "compare.png", grids, shown, titles)
    run.say("\n".join(f"{line[0]:>32}" + "".join(f"{word:>9}" for word in line[1:]) for line in text))
    run.say(f"{len(rows)} test images, guidance {run.cfg.cfg_eval:g}: {run.out / 'compare.csv'}, {run.out / 'samples'}")
    last_line(run, {"eval_before": None, "eval_after": None})


# =====================================================================================================================
# Command line
# =====================================================================================================================

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world", help="write a contact sheet of the tiny world")
    world.add_argument("--out", default="world.png")
    curation = commands.add_parser("curate", help="filter and recaption img2dataset's shards as LAION-Face-T2I-15M",
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = curation.add_argument
    add("source", help="a .tar, a folder of them, or a pattern")
    add("out", help="a folder for the same shards, dropped.jsonl and summary.json")
    add("--stage", type=int, choices=STAGES, default=256, help="the training resolution that sizes are filtered for")
    add("--min-aesthetic", type=float, default=AESTHETIC, help="the least aesthetic score")
    add("--aesthetic-field", default="aesthetic", help="the score's field in a sample's .json")
    add("--aesthetic", metavar="FILE.PY:FUNCTION", help="scores a PIL image where the field is missing")
    add("--no-aesthetic", action="store_true", help="no filter by score")
    add("--server", metavar="URL", help="an OpenAI-compatible server's address, up to /v1; its key: $OPENAI_API_KEY")
    add("--model", help="the server's name of the vision-language model")
    add("--hands", action="store_true", help="the hand subset: keep what the model says shows hands, and its caption")
    add("--no-caption", action="store_true", help="keep the captions")
    add("--workers", type=int, default=16, help="questions to the server at once")
    add("--timeout", type=float, default=120, help="seconds to wait for an answer")
    add("--retries", type=int, default=6, help="times that a failed question is asked again")
    add("--backoff", type=float, default=1, help="seconds before the first of them; doubled for each")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are left out undecoded")
    parser.error = world.error = curation.error = refuse
    with exit_codes():
        args = parser.parse_args(argv)
        if args.command == "world":
            write_png(args.out, contact_sheet())
        else:
            for reason, count in sorted(curate(args).items(), key=lambda item: -item[1]):
                print(f"{count:>10} {reason}")


if __name__ == "__main__":
    sys.exit(main())
