"""What goes into a run: prompts, and the tiny world that stands in for a web-scale data set on a laptop.

    python data.py world --out tests/world.png                  # a contact sheet of the tiny world
"""
import argparse
import csv
import functools
import itertools
import json
import math
import pathlib
import random
import sys

import torch
from PIL import Image, ImageDraw, ImageFont

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
GAP, BORDER = 3., 1.2                         # pixels at size 32 between two objects, between an object and the border
REACH = 1.12                                  # no shape of unit radius reaches further than this from its centre

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
    "crescent": lambda x, y: torch.maximum(torch.hypot(x + .12, y) - 1.02, .76 - torch.hypot(x - .42, y))}


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
        for rel, opp in zip(RELATIONS, ("right of", "left of", "below", "above")):         # "a left of b": "b right of a"
            scenes["position"].append([_meta("position", [(q, 1, None), (p, 1, None)], f"{_an(p)} {r} {_an(q)}", r)
                                       for (p, q), r in zip(both, (rel, opp))])
        for c, d in itertools.permutations(colors, 2):
            both_colored = ((a, c), (b, d)), ((b, d), (a, c))
            scenes["color_attr"].append([_meta("color_attr", [(p, 1, e), (q, 1, f)], f"{_an(e)} {p} and {_an(f)} {q}")
                                         for (p, e), (q, f) in both_colored])
    return scenes


def world_prompts(split):
    """The tiny world's prompts as metas: {"tag", "include": [{"class", "count", "color", "position"}], "prompt"}.

    split: "train", "val" or "test". Splits share no scene: "a circle left of a square" and "a square right of a circle"
    are in the same one. Only single_object, which has eight prompts, is the same in all three.

        split   single_object  two_object  counting  colors  position  color_attr    all
        train               8          40        17      45       156        2196   2462
        val                 8           4         2       6        24         312    356
        test                8          12         5      13        44         628    710
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"unknown split {split!r}: train, val or test")
    metas = []
    for task, scenes in _scenes().items():
        order = random.Random(f"split {task}").sample(scenes, len(scenes))
        a, b = round(.7 * len(order)), round(.8 * len(order))
        part = {"train": order[:a], "val": order[a:b], "test": order[b:]}[split] if task != "single_object" else scenes
        metas += [meta for scene in part for meta in scene]
    return metas


def draw_prompts(metas, n, seed):
    """n metas, each of a task (its "tag") drawn uniformly, then of that task's rows uniformly; a function of seed."""
    rng, by_tag = random.Random(f"draw {seed}"), {}
    for meta in metas:
        by_tag.setdefault(meta.get("tag"), []).append(meta)
    tasks = list(by_tag.values())
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
            room = size - 2 * BORDER * unit - reach[todo, :2].sum(1)                       # the centres' largest distance
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
    names, colors, tag, u = list(SHAPES), list(COLORS), meta["tag"], rng.random()
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


def world_batch(seed, step, rank, n, size=32):
    """Batch number `step` of an endless training stream over the whole world: tasks uniform, captions noisy.

    Pretraining sees the scenes of all splits; only the prompts of RL and its evaluation are split. The noise is set per
    task so that the pretrained model draws single objects and colours well, and binds and places badly.
    Returns images (n, 3, size, size) float32 in [0, 1], n captions ("" for a tenth of them), n metas (the truth). All
    are a function of the arguments alone.
    """
    rng, scenes = random.Random(f"world {seed} {step} {rank}"), _scenes()
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

def prompts(spec, split):
    """The prompts of a run, list[dict] with at least "prompt"; the other keys are what a verifier needs.

    spec: "shapes" (the tiny world), or a file: .txt (one a line), .jsonl, .json (a list of strings or of objects) or
    .csv (with a "prompt" column). A file's rows are the same for every split.
    Raises ValueError, in one line, for a spec or split that does not exist and for a file that is missing, empty, not
    UTF-8, or holds a row without a prompt.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"unknown split {split!r}: train, val or test")
    if spec == "shapes":
        return world_prompts(split)
    if spec in ("geneval", "ocr"):
        raise ValueError(f"prompts {spec!r} are not there yet; use shapes or a .txt, .jsonl, .json or .csv file")
    path = pathlib.Path(spec)
    if path.suffix not in (".txt", ".jsonl", ".json", ".csv"):
        raise ValueError(f"unknown prompts {str(spec)!r}: shapes, or a .txt, .jsonl, .json or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ValueError(f"cannot read prompts from {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}; convert it first") from None
    try:
        rows = _rows(path.suffix, text)
    except (json.JSONDecodeError, csv.Error) as e:
        raise ValueError(f"{path} is not a valid {path.suffix} file: {e}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of prompts, not a {type(rows).__name__}")
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{path}: row {i} has no prompt: {str(row)[:60]}")
    return rows


def _rows(suffix, text):
    lines = [line for line in text.splitlines() if line.strip()]
    if suffix == ".txt":
        return [line.strip() for line in lines]
    if suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    if suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    return json.loads(text) if lines else []


# =====================================================================================================================
# Command line
# =====================================================================================================================

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world", help="write a contact sheet of the tiny world")
    world.add_argument("--out", default="world.png")
    args = parser.parse_args(argv)
    if args.command == "world":
        contact_sheet().save(args.out)


if __name__ == "__main__":
    sys.exit(main())
