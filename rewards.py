"""Rewards: functions from images and their prompts to one number an image.

A reward is `score(images (B, 3, H, W) float in [0, 1], prompts: list[str], meta: list[dict]) -> (B,) float32`; `load`
makes one from a name, a weighted sum of names, or a function of yours.

    Loading        load: names, sums, files
    The verifier   shapes: the tiny world's scenes, read back from their pixels; needs no weights
    CLIP           pickscore, hpsv2, clip-l14, clip-dfn, clipscore, aesthetic
    ImageReward    imagereward
    Command line   scores a folder of images

    python rewards.py --reward shapes --images DIR              # DIR/prompts.jsonl says what each file should show
    python rewards.py --reward hpsv2:0.7,clip-dfn:1.4 --images DIR
"""
import argparse
import csv
import functools
import html
import importlib.util
import itertools
import json
import math
import pathlib
import re
import statistics
import sys
import zipfile

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import nn
from tqdm import tqdm

import data
import models

# =====================================================================================================================
# Loading
# =====================================================================================================================

def load(spec, weights=None, device="cpu"):
    """Make `score(images, prompts, meta) -> (B,) float32` from a name, a weighted sum, or a function in a file.

    spec: `shapes`, `shapes-soft:0.7,shapes-strict:0.3` (weights multiply, default 1), or `path/to/file.py:function`.
    weights: the directory that holds the reward networks' weights, a folder each; None: weights/ beside this file.
    Raises ValueError, in one line, for a spec that cannot be loaded. The score raises RuntimeError, naming the reward,
    when a reward does not return one number an image. A NaN stays where it is: it marks a failed reward, and the
    trainer masks it. score.weights is {name: weight}, score.values the last call's {name: raw rewards (B,)}.
    """
    terms = []
    for term in spec.split(","):
        name, _, factor = term.strip().rpartition(":")
        if not name or (name.endswith(".py") and not _is_number(factor)):
            name, factor = term.strip(), "1"
        if not _is_number(factor):
            raise ValueError(f"reward {term.strip()!r}: the weight {factor!r} is not a finite number")
        terms.append((name, float(factor), _load_one(name, weights, device)))

    def score(images, prompts, meta):
        total = torch.zeros(len(images), device=images.device)
        for name, factor, reward in terms:
            values = torch.as_tensor(reward(images, prompts, meta), dtype=torch.float32, device=images.device)
            if values.shape != (len(images),):
                raise RuntimeError(f"reward {name!r} returned shape {tuple(values.shape)} for {len(images)} images; "
                                   f"it must be ({len(images)},)")
            total += factor * values
            score.values[name] = values.detach()
        return total
    score.values, score.weights = {}, {name: sum(f for n, f, _ in terms if n == name) for name, *_ in terms}
    return score


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _load_one(name, weights, device):
    if name in REWARDS:
        return REWARDS[name](weights, device)
    if name in ENGINES:
        raise ValueError(f"reward {name!r}: its engine, {ENGINES[name]}, is not there yet; bring a function in a file")
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"unknown reward {name!r}: {', '.join(REWARDS)}, or path/to/file.py:function")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"reward {name!r}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise ValueError(f"reward {name!r}: {path} does not load: {type(e).__name__}: {e}") from e
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward {name!r}: {path} has no function {function!r}")
    return getattr(module, function)


# =====================================================================================================================
# The tiny world's exact verifier
# =====================================================================================================================
# Analysis by synthesis. Split the image into components, recognise each, fit place, size and blur of the shapes that
# come close, and draw the scene again. It is right if it holds exactly what was asked for, in the world's colours and
# sizes, and if nothing but a little noise is left of the image once the drawing and a plain light ground are taken
# away. What is not checked RL will find, so the ground is: for noise, for patterns that repeat, for stains.
# tests/test_rewards.py has the figures.

KINDS, HUES = list(data.SHAPES), list(data.COLORS)
KEEP = 5                                      # objects looked at in an image; a right scene has at most four
PATCH, SPREAD = 20, 4.                        # the window that shapes are recognised in, their rms radius there, pixels
SPECK = 8                                     # components smaller than this are no objects (pixels at size 32)
CLOSE = .06                                   # kinds whose templates leave this much more than the best are fitted too

# The limits of a right image. Distances are Euclidean in RGB; sizes are pixels at size 32.
UNLIKE, TINT, RADIUS = .12, .12, (3.2, 11.)   # an object: energy left unexplained; distance from its colour; its radius
NOISE, TEXTURE, STAIN = .1, .025, (.16, .08)  # the ground: standard deviation; periodic part; 5 x 5 and 7 x 7 means
LEFT, EDGE = (.08, 1.1), (.2, 1.1)            # 3 x 3 mean of what no object explains, without noise and per its std;
                                              # EDGE: where a drawn edge is near, so that a bent one is forgiven
GROUND, TINGE = (.84, .98), .06               # the ground's channels; how far they may differ


def _grow(x, n=1):
    """Maximum over a (2n + 1)-square, (..., H, W), with 0 outside. By slices: on a CPU, faster than max_pool2d."""
    for _ in range(n):
        x = F.pad(x, (1, 1, 1, 1))
        x = torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])
        x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return x


def _mean(x, k=3):
    """Mean over the part of a k-square that lies inside the image, (..., H, W), k odd."""
    for dim in (-1, -2):
        n, h = x.shape[dim], k // 2
        padded = F.pad(x, (h, h, 0, 0) if dim == -1 else (0, 0, h, h))
        i = torch.arange(n, device=x.device)
        count = (i + h + 1).clamp(max=n) - (i - h).clamp(min=0)                            # pixels inside, (n,)
        x = sum(padded.narrow(dim, j, n) for j in range(k)) / (count if dim == -1 else count[:, None])
    return x


def _largest_mean(x, weight, k, least):
    """The largest norm (B,) of a k-square's weighted mean of x (B, C, H, W), where its share of weight is > least."""
    share = _mean(weight, k)                                                               # (B, 1, H, W)
    mean = _mean(x * weight, k) / share.clamp(min=least)
    return (mean.square().sum(1).sqrt() * (share[:, 0] > least)).amax((1, 2))


def _smooth(x):
    """The binomial filter [1 2 1]/4 along both axes, (B, C, H, W)."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    return (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4


def components(mask):
    """8-connected components. mask: (B, H, W) in {0., 1.}. Returns labels (B, H*W) int64: 0 outside, else 1 + the index
    of the component's last pixel. Each pixel takes the largest label around it, then that label's own label, until
    nothing changes: a handful of rounds, where neighbours alone would need as many as the longest path."""
    B, H, W = mask.shape
    label = torch.arange(1, H * W + 1, device=mask.device, dtype=torch.float32).view(1, H, W) * mask
    while True:
        before = label
        for _ in range(4):
            label = _grow(label) * mask
            flat = F.pad(label.flatten(1), (1, 0))                                         # label 0 keeps label 0
            label = flat.gather(1, label.flatten(1).long()).view(B, H, W)
        if torch.equal(label, before):
            return label.flatten(1).long()


@functools.lru_cache
def _moments(kind):
    """Centroid (x, y) and rms radius of a shape of unit radius."""
    n, r = 128, 50.
    a = data.coverage(kind, torch.tensor([n / 2]), torch.tensor([n / 2]), torch.tensor([r]), n)[0].double()
    g = torch.arange(n) + .5 - n / 2
    x, y = ((a.sum(0) * g).sum() / a.sum()).item(), ((a.sum(1) * g).sum() / a.sum()).item()
    rms = ((a * ((g - x)**2 + (g[:, None] - y)**2)).sum() / a.sum()).sqrt().item()
    return x / r, y / r, rms / r


@functools.lru_cache
def _bank(device):
    """Unit-norm templates (2, N, PATCH^2) of every kind, sharp and blurred, and their poses (kinds, N / kinds, 3)."""
    poses = []
    for kind in KINDS:
        x, y, rms = _moments(kind)
        shifts = (-1, -.5, 0, .5, 1)
        for scale, dx, dy in itertools.product((.8, .88, .96, 1.05, 1.15, 1.26), shifts, shifts):
            r = SPREAD / rms * scale
            poses.append((dx - x * r, dy - y * r, r))
    poses = torch.tensor(poses).view(len(KINDS), -1, 3)
    sharp = torch.cat([data.coverage(kind, *(p.T[:2] + PATCH / 2), p[:, 2], PATCH) for kind, p in zip(KINDS, poses)])
    bank = torch.stack((sharp, _mean(sharp))).flatten(2)
    return F.normalize(bank, dim=2).to(device), poses.to(device)


def _draw(kind, pose, size):
    """Coverage (P, size, size) of objects of mixed kinds (P,) at poses (P, 3): x, y, radius in pixels."""
    alpha = torch.empty(len(kind), size, size, device=pose.device)
    for k, name in enumerate(KINDS):
        i = (kind == k).nonzero()[:, 0]
        alpha[i] = data.coverage(name, *pose[i].T, size)
    return alpha


def _objects(images):
    """Split images into a plain ground and their largest connected components.

    images: (B, 3, S, S) in [0, 1]. Returns ground (B, 3), rest = images - ground, far (B, S, S), 1 where no object is
    near, found (B,), the number of components, and for the P of them that are looked at: b, k, which image and which of
    its KEEP, own (P, S, S), its pixels, and mine, the pixels that no other component is near to.
    """
    B, _, size, _ = images.shape
    frame = torch.ones(size, size, dtype=torch.bool, device=images.device)
    frame[2:-2, 2:-2] = False
    ground = images[:, :, frame].median(2).values                                          # hardly an object there
    contrast = (_smooth(images) - ground[:, :, None, None]).square().sum(1).sqrt()         # (B, S, S)
    mask = (contrast > (.5 * _grow(contrast, 2)).clamp(min=.2)).float()                    # edges at half height
    far = 1 - _grow(mask, 2)
    ground = (images * far[:, None]).sum((2, 3)) / far.sum((1, 2)).clamp(min=1)[:, None]
    label = components(mask)                                                               # (B, S*S)
    area = torch.zeros(B, size * size + 1, device=images.device).scatter_add_(1, label, (label > 0).float())
    least = SPECK * (size / 32)**2
    top, name = area.topk(KEEP, 1)
    b, k = (top >= least).nonzero(as_tuple=True)                                           # P objects
    own = (label[b] == name[b, k, None]).view(-1, size, size).float()
    mine = 1 - _grow(mask[b] - own)
    return ground, images - ground[:, :, None, None], far, (area >= least).sum(1), b, k, own, mine


def _recognise(grey, own):
    """Compare objects with the template bank. grey: (P, S, S) their contrast; own: (P, S, S) their pixels.

    Each object is seen through a window around its centroid, scaled to its rms radius. Returns misfit (P, kinds), the
    share of the window's energy that the best template of each kind leaves, and its pose (P, kinds, 3): x, y, radius.
    """
    size, device = own.shape[-1], own.device
    grid = torch.arange(size, device=device) + .5
    mass = own.sum((1, 2))
    x, y = (own.sum(1) * grid).sum(1) / mass, (own.sum(2) * grid).sum(1) / mass            # (P,)
    spread = (grid - x[:, None])[:, None, :]**2 + (grid - y[:, None])[:, :, None]**2       # (P, S, S)
    rms = ((own * spread).sum((1, 2)) / mass).sqrt().clamp(min=.5)
    c = (torch.arange(PATCH, device=device) + .5 - PATCH / 2) / SPREAD * rms[:, None]      # (P, PATCH)
    where = torch.stack(torch.broadcast_tensors((x[:, None] + c)[:, None, :], (y[:, None] + c)[:, :, None]), 3)
    view = F.grid_sample(grey[:, None], where / size * 2 - 1, align_corners=False).flatten(1)          # (P, PATCH^2)
    bank, poses = _bank(device)
    hit = (view @ bank.flatten(0, 1).T).clamp(min=0).square().view(len(view), 2, len(KINDS), poses.shape[1])
    best, at = hit.amax(1).max(2)                                                          # (P, kinds)
    pose = poses[torch.arange(len(KINDS), device=device), at] * (rms / SPREAD)[:, None, None]
    misfit = 1 - best / view.square().sum(1, keepdim=True).clamp(min=1e-6)
    return misfit, pose + torch.stack((x, y, torch.zeros_like(x)), 1)[:, None]


def _fit(kind, pose, grey, near):
    """Two Gauss-Newton steps on an object's place, radius and blur. Returns its coverage (P, S, S) and its pose (P, 3).

    kind: (P,); pose: (P, 3); grey: (P, S, S) contrast; near: (P, S, S), the pixels that count. The model is
    amplitude * (coverage(pose) + blur * (its 3 x 3 mean - coverage)), linear in all but the pose.
    """
    size, h = grey.shape[-1], .3                                       # h: step of the finite differences (pixels)
    blur, moves = torch.zeros(len(kind), 1, 1, device=grey.device), h * torch.eye(3, device=grey.device)
    for _ in range(2):
        a = _draw(kind, pose, size)
        basis = torch.stack([a, *(_draw(kind, pose + d, size) - a for d in moves)], 1)     # (P, 4, S, S)
        soft = _mean(basis)
        basis = torch.cat((torch.lerp(basis, soft, blur[:, None]), (soft - basis)[:, :1]), 1)
        basis = (basis * near[:, None]).flatten(2)                                         # (P, 5, S*S)
        gram = basis @ basis.mT
        gram = gram + torch.eye(5, device=grey.device) * (1e-3 * gram[:, :1, :1] + 1e-6)
        w = torch.linalg.solve(gram, basis @ grey.flatten(1)[:, :, None])[:, :, 0]         # (P, 5)
        w = w[:, 1:] / w[:, :1].clamp(min=.05)
        pose = pose + (h * w[:, :3]).clamp(-1, 1)
        pose = torch.cat((pose[:, :2], pose[:, 2:].clamp(min=1)), 1)
        blur = (blur + w[:, 3, None, None]).clamp(0, 1.2)
    a = _draw(kind, pose, size)
    return torch.lerp(a, _mean(a), blur), pose


def _texture(rest, far, noise):
    """Amplitude (B,) of the strongest pattern with a period of 2 to 8 pixels: what is left when the ground is folded.

    rest: (B, 3, S, S) ground minus its mean; far: (B, S, S); noise: (B,) its std, whose share is taken off.
    """
    size, amplitude = far.shape[-1], []
    i = torch.arange(size, device=far.device)
    for p in range(2, 9):
        phase = F.one_hot((i[:, None] % p * p + i % p).flatten(), p * p).float()           # (S*S, p*p)
        n = far.flatten(1) @ phase                                                         # (B, p*p) pixels
        use, n = (n > 3).float(), n.clamp(min=1)
        mean = ((rest * far[:, None]).flatten(2) @ phase) / n[:, None]                     # (B, 3, p*p)
        power = (mean.square().mean(1) * use).sum(1) - noise**2 * (use / n).sum(1)
        amplitude.append((power / use.sum(1).clamp(min=1)).clamp(min=0).sqrt())
    return torch.stack(amplitude).amax(0)


def _wanted(metas, device):
    """The metas as tensors. kind, hue, alike: (B, 4), -1 where there is none (alike: how many objects read the same);
    total: (B,); relation: (B, 2), the direction of object 1 from object 0, or 0."""
    kind, hue, alike, relation = [], [], [], []
    for meta in metas:
        objects, direction, known = [], (0, 0), True
        try:
            for o in meta["include"]:
                objects += [(o["class"], o.get("color"))] * o["count"]
                if "position" in o:
                    direction = data.RELATIONS[o["position"][0]]
                    known = o["position"][1] == 0 and o is meta["include"][1] and len(objects) == 2
            known &= 1 <= len(objects) <= 4 and all(c in KINDS and (h is None or h in HUES) for c, h in objects)
        except (AttributeError, IndexError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"the tiny world's verifier cannot check {str(meta)[:200]}")
        pad = [-1] * (4 - len(objects))
        kind.append([KINDS.index(c) for c, _ in objects] + pad)
        hue.append([HUES.index(h) if h else -1 for _, h in objects] + pad)
        alike.append([objects.count(o) for o in objects] + pad)
        relation.append(direction)
    kind, hue, alike, relation = (torch.tensor(v, device=device) for v in (kind, hue, alike, relation))
    return kind, hue, alike, (kind >= 0).sum(1), relation


def verify(images, metas):
    """Read scenes back from their pixels and compare them with what was asked for.

    images: (B, 3, S, S) float in [0, 1], S about 24 to 48; metas: B dicts of data.world_prompts. Returns a dict of (B,)
    float32: strict, 1 if everything is right, else 0; soft in [0, 1], graded; and the parts that they are made of.
    An image that is not finite scores NaN. Raises ValueError for a meta that is not of the tiny world.
    """
    finite = images.isfinite().flatten(1).all(1)
    images = images.float().nan_to_num(0).clamp(0, 1)
    B, _, size, _ = images.shape
    unit, device = size / 32, images.device
    kind, hue, alike, total, relation = _wanted(metas, device)
    ground, rest, far, found, b, k, own, mine = _objects(images)
    P = len(b)

    # What each object is: fit the kinds that come close, keep the best.
    near = _grow(own, 2) * mine                                                            # (P, S, S)
    seen = rest[b] * mine[:, None]                                                         # (P, 3, S, S)
    grey = torch.einsum("pchw,pc->phw", seen, F.normalize((seen * own[:, None]).sum((2, 3)), dim=1))
    misfit, poses = _recognise(grey, own)                                                  # (P, kinds), (P, kinds, 3)
    p, c = (misfit <= misfit.amin(1, keepdim=True) + CLOSE).nonzero(as_tuple=True)         # Q candidates
    alpha, pose = _fit(c, poses[p, c], (grey * near)[p], near[p])
    scale = (grey[p] * alpha).sum((1, 2)) / (alpha.square() * mine[p]).sum((1, 2)).clamp(min=1e-3)
    error = ((grey[p] - scale[:, None, None] * alpha) * near[p]).square().sum((1, 2))      # (Q,)
    is_kind = torch.full((P, len(KINDS)), torch.inf, device=device).index_put((p, c), error).argmin(1)  # (P,)
    winner = (c == is_kind[p]).nonzero()[:, 0]                                             # (P,): p is sorted
    alpha, pose = alpha[winner], pose[winner]                                              # (P, S, S), (P, 3)

    # Its colour, and how well flat paint in that shape explains it. Noise as strong as the ground's is forgiven.
    noise = ((rest.square().mean(1) * far).sum((1, 2)) / far.sum((1, 2)).clamp(min=1)).sqrt()          # (B,)
    paint = torch.einsum("pchw,phw->pc", seen, alpha) / (alpha.square() * mine).sum((1, 2)).clamp(min=1e-3)[:, None]
    flat = paint[:, :, None, None] * alpha[:, None]                                        # (P, 3, S, S)
    error = ((seen - flat) * near[:, None]).square().sum((1, 2, 3))
    error = error - 3 * near.sum((1, 2)) * noise[b].clamp(max=NOISE)**2
    unlike = error / (seen * near[:, None]).square().sum((1, 2, 3)).clamp(min=1e-3)        # (P,)
    palette = torch.tensor(list(data.COLORS.values()), device=device)
    tint = ((ground[b] + paint)[:, None] - palette).square().sum(2).sqrt()                 # (P, hues)
    radius = pose[:, 2] / unit
    inside = ((pose[:, :2] - .7 * pose[:, 2:] > 0) & (pose[:, :2] + .7 * pose[:, 2:] < size)).all(1)
    good = (unlike < UNLIKE) & (tint.amin(1) < TINT) & (radius > RADIUS[0]) & (radius < RADIUS[1]) & inside

    # The ground: how far it is from plain and light, each part in units of its limit.
    scene = torch.zeros_like(rest).index_add_(0, b, flat)                                  # what the objects explain
    left, every = [], torch.ones_like(far)[:, None]
    low, high = scene, scene
    for limit in (EDGE, LEFT):                                         # an edge may be a pixel off, then two
        low, high = -_grow(-low), _grow(high)
        left.append(_largest_mean(rest - rest.clamp(low, high), every, 3, .5) / (limit[0] + limit[1] * noise))
    core = torch.zeros_like(far).index_add_(0, b, (alpha > .97).float())
    sure = torch.maximum(far, core * (1 - _grow(1 - core)))[:, None]                       # no edges (B, 1, S, S)
    stain = torch.maximum(_largest_mean(rest - scene, sure, 5, .5) / STAIN[0],
                          _largest_mean(rest, far[:, None], 7, .8) / STAIN[1])
    parts = {"noise": noise / NOISE, "texture": _texture(rest, far, noise) / TEXTURE, "stain": stain,
             "left": torch.maximum(*left),
             "ground": (ground - sum(GROUND) / 2).abs().amax(1) / ((GROUND[1] - GROUND[0]) / 2),
             "tinge": (ground.amax(1) - ground.amin(1)) / TINGE}
    excess = torch.stack(list(parts.values()))                                             # (6, B)
    plain = (excess <= 1).all(0)
    clean = 1 / (1 + .2 * (excess[:4].square().sum(0) + 4 * (excess[4:] - 1).clamp(min=0).sum(0)))

    # The scene: objects against what was asked for, matched one to one at best.
    like = (-(misfit - misfit.gather(1, is_kind[:, None])).clamp(min=0) / .05).exp()       # (P, kinds)
    like = like * ((.35 - unlike) / (.35 - UNLIKE)).clamp(0, 1)[:, None]
    shade = (1 - (tint - .1) / .4).clamp(0, 1)                                             # (P, hues)
    shade = torch.cat((shade, shade.amax(1, keepdim=True)), 1)                             # the last: any hue
    fit = like.gather(1, kind[b].clamp(min=0)) * (.4 + .6 * shade.gather(1, hue[b] % (len(HUES) + 1)))  # (P, 4)
    fit = torch.zeros(B, KEEP, 4, device=device).index_put((b, k), fit * (kind[b] >= 0))
    orders = torch.tensor(list(itertools.permutations(range(KEEP), 4)), device=device)     # (120, 4)
    match, best = fit[:, orders, torch.arange(4, device=device)].sum(2).max(1)             # (B,)
    objects = match / total
    hit = good[:, None] & (is_kind[:, None] == kind[b]) & ((hue[b] < 0) | (tint.argmin(1)[:, None] == hue[b]))
    have = torch.zeros(B, 4, device=device).index_add_(0, b, hit.float())
    right = ((have == alike) | (kind < 0)).all(1) & (found == total)
    place = torch.full((B, KEEP, 2), torch.nan, device=device).index_put((b, k), pose[:, :2])
    first, second = (place[torch.arange(B, device=device), orders[best, j]] for j in (0, 1))
    step = (second - first) / (second - first).norm(dim=1, keepdim=True).clamp(min=1e-3)
    cosine = (step * relation).sum(1).nan_to_num(-1)                                       # 1: exactly in the direction
    asked = relation.any(1)
    relates = torch.where(asked, ((cosine + .25) / 1.1).clamp(0, 1), 1.)
    strict = right & plain & (~asked | (cosine > math.sqrt(.5)))
    soft = clean * objects * (.5 + .5 * relates) / (1 + .5 * (found - total).clamp(min=0))
    nan = torch.where(finite, 0., torch.nan)
    return {"soft": soft + nan, "strict": strict.float() + nan, "found": found.float(), "objects": objects,
            "right": right.float(), "relation": relates, "clean": clean, **parts,
            "unlike": torch.zeros(B, device=device).scatter_reduce(0, b, unlike, "amax")}


def _shapes(pick):
    return lambda weights, device: lambda images, prompts, meta: pick(verify(images, meta))


# =====================================================================================================================
# GenEval and OCR: from what an engine has found in an image to its score
# =====================================================================================================================
# Pure functions of detections and of texts. The engines, a detector with a classifier of colours and a reader, are not
# there yet. Ghosh et al., GenEval, arXiv:2310.11513; Liu et al., Flow-GRPO, arXiv:2505.05470, whose rewards DGPO uses.

def relations(a, b, margin=.1):
    """Where box a lies, seen from box b: the names of data.RELATIONS that hold, at most two of them.

    a, b: (x0, y0, x1, y1), y down. With o the step from b's centre to a's and s the sum of both sizes, a direction e
    holds if e . sign(o) max(|o| - margin s, 0) > |o| / 2: clearly beyond the other, and not at too steep an angle.
    """
    a, b = (np.asarray(box, dtype=float).reshape(2, 2) for box in (a, b))                  # [corner, axis]
    step = a.mean(0) - b.mean(0)
    beyond = np.sign(step) * np.maximum(np.abs(step) - margin * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])), 0)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    return {name for name, e in data.RELATIONS.items() if beyond @ e / np.linalg.norm(step) > .5}


def score_detections(detections, meta, threshold=.3, counting_threshold=.9, most=16, margin=.1, clip_negative=False,
                     position_quirk=True):
    """Score what a detector found in one image against a GenEval meta, by the benchmark's rule and by both rewards.

    detections: dicts {"class", "score" in [0, 1], "box": (x0, y0, x1, y1), "color": what a classifier called it; needed
    only where the meta asks for a colour}, in any order. Those that score above the threshold count, the `most` best
    of a class. meta: a dict of data.geneval_prompts. Returns a dict of floats:
        correct   1 or 0, the benchmark: of every class at least as many as asked for, the best of them in the right
                  colour and place, and none of what meta["exclude"] forbids
        strict    1 or 0, Flow-GRPO's strict reward: the same with exactly as many as asked for; "exclude" is not read
        score     <= 1, the continuous reward that Flow-GRPO and DGPO train with: the mean of these terms of each clause
                      1 - |asked - found| / asked      far below 0 for a crowd: -14 for 16 where 1 was asked for
                      (share in the right colour)      if a colour is asked for; 0 if the number is wrong
                      (1 if in its place, else 0)      if a place is asked for, unless the colour is wrong; 0 if the
                                                       number is wrong, once with the colour's
    clip_negative: no term below 0 (not so in the released code). position_quirk: the released code adds a 1 after the 0
    of a wrong place, so that it costs half as much. Raises ValueError for a meta that cannot be checked.
    Source: geneval's evaluate_images.py and the reward server of Flow-GRPO; tests/test_geneval.py has a table.
    """
    limit = counting_threshold if meta.get("tag") == "counting" else threshold
    found = {}
    for d in sorted(detections, key=lambda d: -d["score"]):
        if d["score"] > limit and len(found.setdefault(d["class"], [])) < most:
            found[d["class"]].append(d)

    def colored(some, need):
        if missing := [d for d in some if "color" not in d]:
            raise ValueError(f"{need['color']!r} is asked for, but this {need['class']} has no colour: {missing[0]}")
        return sum(d["color"] == need["color"] for d in some)

    def placed(some, others, relation):
        return others is not None and all(relation in relations(a["box"], b["box"], margin)
                                          for a in some for b in others)

    terms, exact, enough = [], [], []             # of each clause, the objects that meet it, else None
    for need in _clauses(meta):
        every, asked = found.get(need["class"], []), need["count"]
        relation, target = need.get("position", (None, None))

        # The benchmark's rule: the best ones, as many as asked for.
        best = every[:asked]
        right = len(best) == asked and ("color" not in need or colored(best, need) == asked)
        right = right and (not relation or placed(best, enough[target], relation))
        enough.append(best if right else None)

        # The rewards': all of them.
        right = len(every) == asked
        terms.append(1 - abs(asked - len(every)) / asked)
        if not right and ("color" in need or relation):
            terms.append(0)
        if right and "color" in need:
            terms.append(colored(every, need) / asked)
            right = terms[-1] == 1
        if right and relation:
            right = placed(every, exact[target], relation)
            terms += [1] if right else [0, 1] if position_quirk and exact[target] is not None else [0]
        exact.append(every if right else None)

    spared = all(len(found.get(no["class"], [])) < no["count"] for no in meta.get("exclude", []))
    terms = [max(term, 0) for term in terms] if clip_negative else terms
    return {"correct": float(None not in enough and spared), "strict": float(None not in exact),
            "score": sum(terms) / len(terms)}


def _clauses(meta):
    """meta["include"], checked: ValueError for what GenEval's rules cannot read."""
    try:
        for i, need in enumerate(meta["include"]):
            relation, target = need.get("position", ("above", 0))
            if not (isinstance(need["class"], str) and isinstance(need["count"], int) and need["count"] >= 1
                    and need.get("color", "red") in data.PAINTS and relation in data.RELATIONS
                    and ("position" not in need or 0 <= target < i)):
                raise ValueError
        if meta["include"]:
            return meta["include"]
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"GenEval's rules cannot check {str(meta)[:200]}")


def geneval_summary(rows):
    """The benchmark's figures from rows {"tag", "prompt", "correct"}, one an image, as its own script prints them.

    Returns a dict of floats: each tag's share of right images, in the rows' order; "overall", the mean over tags, which
    is GenEval's score (four images a prompt), not the mean over images; "correct_images"; and "correct_prompts", the
    share of prompts with at least one right image. Raises ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("GenEval's summary needs at least one image")
    tags, prompts = {}, {}
    for row in rows:
        tags.setdefault(row["tag"], []).append(bool(row["correct"]))
        prompts[row["prompt"]] = prompts.get(row["prompt"], False) or bool(row["correct"])
    share = {tag: statistics.fmean(right) for tag, right in tags.items()}
    return {**share, "overall": statistics.fmean(share.values()),
            "correct_images": statistics.fmean(right for some in tags.values() for right in some),
            "correct_prompts": statistics.fmean(prompts.values())}


def levenshtein(a, b):
    """The least number of single characters to insert, delete or replace that turns string a into b."""
    row = list(range(len(b) + 1))                                      # from a[:i] to every b[:j]
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def ocr_score(text, target):
    """How much of the target can be read in an image: max(1 - distance / len(target), 0), Flow-GRPO's OCR reward.

    text: what a reader found, its lines joined without a space; target: what the prompt put between double quotes, at
    least one character (else ValueError). Spaces and case do not count. A text that holds the target scores 1, whatever
    else it holds; apart from that, surplus text costs as much as missing text. Returns a float in [0, 1].
    """
    text, target = (s.replace(" ", "").lower() for s in (text, target))
    if not target:
        raise ValueError("the OCR reward needs a text to look for: put it into the prompt, between double quotes")
    return 1.0 if target in text else max(1 - levenshtein(text, target) / len(target), 0.0)


# =====================================================================================================================
# CLIP: PickScore, HPSv2, CLIP scores, aesthetics
# =====================================================================================================================
# One network serves them all; they differ in weights, in how an image is made small, and in the scale of the cosine.
# Everything runs in float32.

HERE = pathlib.Path(__file__).resolve().parent
CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
_L, _H = (dict(hidden_size=w, intermediate_size=4 * w, num_attention_heads=w // 64) for w in (768, 1024))
_BIG, _HUGE = (dict(hidden_size=w, intermediate_size=4 * w, num_hidden_layers=n, num_attention_heads=16, patch_size=14)
               for w, n in ((1024, 24), (1280, 32)))
CLIP_SIZES = {                                                        # the options of CLIP; B/32 is all defaults
    "B/32": {},
    "L/14": dict(projection_dim=768, text_config=_L, vision_config=_BIG),
    "H/14": dict(projection_dim=1024, text_config=dict(_H, num_hidden_layers=24, hidden_act="gelu"),
                 vision_config=dict(_HUGE, hidden_act="gelu")),
    "H/14-378": dict(projection_dim=1024, text_config=dict(_H, num_hidden_layers=24),      # DFN's: quick_gelu
                     vision_config=dict(_HUGE, image_size=378))}


class CLIP(models.CLIPText):
    """CLIP, both towers: the text tower of models.py, and a vision transformer that looks at itself without a mask.

    image(pixels (B, 3, S, S), from `clip_pixels`) and text(ids (B, L)) -> features (B, P) of unit length.
    Source: Radford et al., arXiv:2103.00020; equal to transformers' CLIPModel, whose config and names this takes.
    """
    public_names, file_name, ignore = ("CLIPModel",), "model", ("position_ids",)
    rename = staticmethod(str)

    def __init__(self, text_config=None, vision_config=None, projection_dim=512, text_config_dict=None,
                 vision_config_dict=None, **_):
        text = (text_config or {}) | (text_config_dict or {})         # old files state what differs a second time
        vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                      patch_size=32, image_size=224, hidden_act="quick_gelu", layer_norm_eps=1e-5)
        given = (vision_config or {}) | (vision_config_dict or {})
        vision |= {key: given[key] for key in vision if key in given}
        super().__init__(**text | dict(projection_dim=projection_dim, architectures=["CLIPTextModelWithProjection"]))
        if vision["hidden_act"] not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act={vision['hidden_act']!r} is not implemented: 'quick_gelu' or 'gelu'")
        self.config = dict(architectures=["CLIPModel"], model_type="clip", projection_dim=projection_dim,
                           text_config=self.config, vision_config=vision | dict(projection_dim=projection_dim))
        width, patch, self.size = vision["hidden_size"], vision["patch_size"], vision["image_size"]
        norm = functools.partial(nn.LayerNorm, width, eps=vision["layer_norm_eps"])
        body = self.vision_model = nn.Module()
        body.embeddings = nn.Module()
        body.embeddings.class_embedding = nn.Parameter(torch.randn(width) * .02)
        body.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        body.embeddings.position_embedding = nn.Embedding((self.size // patch)**2 + 1, width)
        body.pre_layrnorm, body.post_layernorm = norm(), norm()       # the first is spelt so in the files
        body.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            models.CLIPLayer(width, vision["num_attention_heads"], vision["intermediate_size"], vision["hidden_act"],
                             vision["layer_norm_eps"], causal=False) for _ in range(vision["num_hidden_layers"]))})
        self.visual_projection = nn.Linear(width, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def image(self, pixels):
        body = self.vision_model
        x = body.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)             # (B, N, D)
        x = torch.cat([body.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)       # (B, 1 + N, D)
        x = body.pre_layrnorm(x + body.embeddings.position_embedding.weight)
        for layer in body.encoder["layers"]:
            x = layer(x)
        return F.normalize(self.visual_projection(body.post_layernorm(x[:, 0])), dim=1)    # (B, P)

    def text(self, ids):
        return F.normalize(super().forward(ids)[1], dim=1)                                 # (B, P)

    def forward(self, pixels, ids):
        """The cosine (B,) of each image with its own text."""
        return (self.image(pixels) * self.text(ids)).sum(1)


# open_clip's names of whole tensors and modules, then of the parts of a block.
OPEN_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding", "visual.proj": "visual_projection.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding", "text_projection": "text_projection.weight",
    "ln_final": "text_model.final_layer_norm", "logit_scale": "logit_scale",
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2"}


def from_open_clip(key, tensor):
    """One tensor of open_clip under transformers' names: [(name, tensor)], three where q, k and v are stacked."""
    block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key)
    start, rest = "", key
    if block:
        start, rest = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}.", block[3]
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return [(f"{start}self_attn.{name}_proj.{kind}", part) for name, part in zip("qkv", tensor.chunk(3))]
    if rest in ("visual.proj", "text_projection"):                    # x @ W there, x @ W^T here
        tensor = tensor.T
    if rest not in OPEN_CLIP:
        module, _, kind = rest.rpartition(".")
        return [(f"{start}{OPEN_CLIP.get(module, module)}.{kind}", tensor)]
    return [(start + OPEN_CLIP[rest], tensor)]


def read_weights(net, file, device="cpu", convert=lambda key, tensor: [(key, tensor)], ignore=("position_ids",)):
    """Fill a network, built on the meta device, from one file, strictly: safetensors, or a pickle of tensors only.

    convert: a tensor of the file -> [(name, tensor)] of the network; keys that end in one of `ignore` are skipped.
    Returns the network in eval mode, float32, without gradients. Raises ValueError naming the file and the first tensor
    that is unexpected, wrongly shaped or missing. A pickle is read with weights_only, so that it cannot run code.
    """
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(file)
        else:
            is_new = zipfile.is_zipfile(file)                         # only files older than PyTorch 1.6 are not
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_new)
            tensors = tensors.get("state_dict", tensors)
    except Exception as e:                                            # the readers raise a dozen types
        why = str(e).strip().partition("\n")[0][:200]
        raise ValueError(f"{file} is damaged, or holds more than tensors ({why}): download it again") from None
    want, state = net.state_dict(), {}
    for key, tensor in tensors.items():
        if key.endswith(tuple(ignore)):
            continue
        for name, part in convert(key, tensor):
            if name not in want or part.shape != want[name].shape:
                raise ValueError(f"{file}: {key} {tuple(tensor.shape)} has no place in this {type(net).__name__}: the "
                                 f"file belongs to another architecture")
            state[name] = part.to(device, torch.float32, copy=True)
    missing = [name for name in want if name not in state]
    if missing:
        raise ValueError(f"{file}: tensor {missing[0]} is missing, {len(missing)} in all: the file is incomplete or "
                         f"belongs to another architecture")
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def clip_pixels(images, size, how="pil"):
    """Images (B, 3, H, W) in [0, 1] as a CLIP sees them: (B, 3, size, size), normalised, in one of four ways.

    pil       8 bits, PIL's bicubic to a short side of `size`, centre crop: transformers' CLIPImageProcessor
    bicubic   the same on the images' device, without rounding to 8 bits: faster, a little off the reference
    bilinear  as DGPO's CLIP score, which takes the default of torchvision's Resize
    pad       HPSv2: 8 bits, then floats; bicubic to a long side of `size`, and a black frame: nothing is cropped

    The crop starts at floor((long - size) / 2), as in transformers; torchvision rounds, one pixel later at times. All
    filters are antialiased, as torchvision's since 0.17; before, its tensors (bilinear, pad here) were not.
    """
    if how not in ("pil", "bicubic", "bilinear", "pad"):
        raise ValueError(f"how={how!r}: 'pil', 'bicubic', 'bilinear' or 'pad'")
    H, W = images.shape[2:]
    if how == "pad":
        h, w = (round(n * (size / max(H, W))) for n in (H, W))
        h, w = max(h, 1), max(w, 1)
    else:
        h, w = (size, int(size * W / H)) if H <= W else (int(size * H / W), size)
    images = images.float()
    if how in ("pil", "pad"):
        images = (images * 255).round().clamp(0, 255) / 255            # what a PNG would hold
    if how == "pil":
        arrays = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        x = np.stack([Image.fromarray(array).resize((w, h), Image.Resampling.BICUBIC) for array in arrays])
        x = torch.from_numpy(x).to(images.device).permute(0, 3, 1, 2).float() / 255        # (B, 3, h, w)
    else:
        mode = "bilinear" if how == "bilinear" else "bicubic"
        x = F.interpolate(images, (h, w), mode=mode, antialias=True)
    if how == "bicubic":
        x = x.clamp(0, 1)                                              # PIL's bytes cannot overshoot; HPSv2's floats do
    if how == "pad":
        top, left = (size - h) // 2, (size - w) // 2
        x = F.pad(x, (left, size - w - left, top, size - h - top))     # black, before it is normalised
    else:
        top, left = (h - size) // 2, (w - size) // 2
        x = x[:, :, top:top + size, left:left + size]
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def open_clip_text(prompt):
    """What open_clip does to a prompt before its tokens: entities and curly quotes undone (of ftfy, only that)."""
    straight = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")
    return html.unescape(html.unescape(prompt.translate(straight))).strip()


class Affine(nn.Module):
    """The head of the aesthetic score and of ImageReward: five linear layers and nothing between them, (B, D) -> (B,).

    Its dropouts act in training only; they hold their places here so that the layers keep their numbers.
    """

    def __init__(self, dim=768):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(),
                                    nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, x):
        return self.layers(x)[:, 0]


# Where the weights are: directory -> its files and the commands that bring them. {} is the directory.
_HF = "hf download {} {} --local-dir {{}}"
_BPE = _HF.format("openai/clip-vit-large-patch14", "vocab.json merges.txt tokenizer_config.json")
_BPE_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
DOWNLOADS = {
    "pickscore": (("config.json", "model.safetensors", *_BPE_FILES),
                  _HF.format("yuvalkirstain/PickScore_v1", "config.json model.safetensors") + " && " + _BPE),
    "hpsv2": (("HPS_v2.1_compressed.pt", *_BPE_FILES),
              _HF.format("xswu/HPSv2", "HPS_v2.1_compressed.pt") + " && " + _BPE),
    "clip-l14": (("config.json", "model.safetensors", *_BPE_FILES),
                 _HF.format("openai/clip-vit-large-patch14", "config.json model.safetensors " + " ".join(_BPE_FILES))),
    "clip-dfn": (("open_clip_pytorch_model.bin", *_BPE_FILES),
                 _HF.format("apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_pytorch_model.bin") + " && " + _BPE),
    "aesthetic": ((HEAD,), f"curl -L --create-dirs -o '{{}}/{HEAD}' https://github.com/christophschuhmann/"
                           f"improved-aesthetic-predictor/raw/main/{HEAD.replace('+', '%2B')}"),
    "imagereward": (("ImageReward.pt", "vocab.txt"), _HF.format("THUDM/ImageReward", "ImageReward.pt") + " && " +
                    _HF.format("google-bert/bert-base-uncased", "vocab.txt"))}


def weights_of(name, weights=None):
    """The directory weights/name, complete. Raises ValueError that says what is missing and the command to get it."""
    directory = pathlib.Path(weights or HERE / "weights") / name
    files, command = DOWNLOADS[name]
    absent = [file for file in files if not (directory / file).is_file() and not
              (file.endswith(".bin") and (directory / "open_clip_model.safetensors").is_file())]
    if absent:
        tool = "pip install huggingface_hub && " if command.startswith("hf") else ""
        raise ValueError(f"no weights for the reward: {directory / absent[0]} is missing. They come by: {tool}"
                         f"{command.replace('{}', str(directory))}")
    return directory


@functools.cache                                                      # rewards that share a network hold it once
def read_clip(directory, size, device="cpu"):
    """A CLIP of one of CLIP_SIZES from a file with open_clip's names, else from a directory as transformers'."""
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "HPS_v2.1_compressed.pt"):
        if (directory / name).is_file():
            with torch.device("meta"):                                # shapes without memory
                net = CLIP(**CLIP_SIZES[size])
            return read_weights(net, directory / name, device, from_open_clip, ("attn_mask",))
    return CLIP.from_pretrained(directory, device=device)


def in_batches(score, n=64):
    """A reward from score(images (b, 3, H, W), prompts) -> (b,), b <= n, without gradients.

    An image that is not finite scores NaN: rounded to bytes it would pass for a black one.
    """
    @torch.no_grad()
    def reward(images, prompts, meta):
        finite = images.isfinite().flatten(1).all(1)
        parts = [score(x, list(prompts[i * n:(i + 1) * n])) for i, x in enumerate(images.nan_to_num(0).split(n))]
        values = torch.cat(parts).to(images.device)
        return values.masked_fill(~finite, math.nan)
    return reward


def clip_reward(name, size, scale, how="pil", clean=str):
    """A maker of rewards scale(cosine (B,), exp(logit_scale) ()) from weights/name. clean: prompt -> prompt."""
    def make(weights=None, device="cpu", how=how):
        directory = weights_of(name, weights)
        net, tokenize = read_clip(directory, size, device), models.CLIPTokenizer(directory)

        def score(images, prompts):
            ids = tokenize([clean(prompt) for prompt in prompts]).to(device)               # (b, 77)
            return scale(net(clip_pixels(images.to(device), net.size, how), ids), net.logit_scale.exp())
        return in_batches(score)
    return make


def aesthetic(weights=None, device="cpu", how="pil"):
    """LAION's aesthetic score, about 1 to 10: a linear head on CLIP-L/14's image features; it never sees the prompt."""
    head_file, directory = weights_of("aesthetic", weights) / HEAD, weights_of("clip-l14", weights)
    net = read_clip(directory, "L/14", device)
    with torch.device("meta"):
        head = Affine(net.config["projection_dim"])
    head = read_weights(head, head_file, device)
    return in_batches(lambda images, prompts: head(net.image(clip_pixels(images.to(device), net.size, how))))


# =====================================================================================================================
# ImageReward
# =====================================================================================================================
# BLIP: a BERT reads the prompt and, in every layer, looks at what a vision transformer makes of the image.

def _heads(x, n):
    return x.unflatten(2, (n, -1)).transpose(1, 2)                                         # (B, heads, N, D / heads)


class BlipVisionBlock(nn.Module):
    """A pre-norm transformer layer under timm's names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        q, k, v = (_heads(y, self.heads) for y in self.attn["qkv"](self.norm1(x)).chunk(3, 2))
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class BlipVision(nn.Module):
    """pixels (B, 3, S, S) -> (B, 1 + N, D), all tokens, normed."""

    def __init__(self, dim, layers, heads, patch, size):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch)**2 + 1, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.blocks = nn.ModuleList(BlipVisionBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)                    # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertAttention(nn.Module):
    """Attention of x (B, L, D) to a context (B, N, D'), the residual, a norm. mask: True where it may look."""

    def __init__(self, dim, dim_context, heads):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict({"query": nn.Linear(dim, dim), "key": nn.Linear(dim_context, dim),
                                   "value": nn.Linear(dim_context, dim)})
        self.output = nn.ModuleDict({"dense": nn.Linear(dim, dim), "LayerNorm": nn.LayerNorm(dim, eps=1e-12)})

    def forward(self, x, context, mask=None):
        q, k, v = (_heads(self.self[name](y), self.heads)
                   for name, y in (("query", x), ("key", context), ("value", context)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.output["LayerNorm"](x + self.output["dense"](y))


class BertLayer(nn.Module):
    """Attention to the text, to the image, then a feed-forward, each with its norm behind it."""

    def __init__(self, dim, dim_image, heads, mlp):
        super().__init__()
        self.attention, self.crossattention = BertAttention(dim, dim, heads), BertAttention(dim, dim_image, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, mlp)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp, dim), "LayerNorm": nn.LayerNorm(dim, eps=1e-12)})

    def forward(self, x, mask, image):
        x = self.crossattention(self.attention(x, x, mask), image)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + y)


class ImageReward(nn.Module):
    """(mlp(BERT's state at [CLS], looking at the image) - mean) / std; pixels and ids (B, L) -> (B,).

    mask: (B, L) bool, False at padding. Source: Xu et al., arXiv:2304.05977; the names of THUDM's ImageReward.pt. Its
    vision_proj and text_proj are BLIP's, for a contrastive loss: no score needs them.
    """
    MEAN, STD = 0.16717362830052426, 1.0333394966054072               # of the training set's scores

    def __init__(self, vocab=30524, dim=768, layers=12, heads=12, places=512, dim_image=1024, layers_image=24,
                 heads_image=16, patch=16, size=224):
        super().__init__()
        self.size, self.blip, text = size, nn.Module(), nn.Module()
        self.blip.visual_encoder = BlipVision(dim_image, layers_image, heads_image, patch, size)
        text.embeddings = nn.ModuleDict({"word_embeddings": nn.Embedding(vocab, dim), "position_embeddings":
                                         nn.Embedding(places, dim), "LayerNorm": nn.LayerNorm(dim, eps=1e-12)})
        text.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(dim, dim_image, heads, 4 * dim)
                                                             for _ in range(layers))})
        self.blip.text_encoder = text
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(dim_image, 256), nn.Linear(dim, 256)
        self.mlp = Affine(dim)

    def hidden(self, pixels, ids, mask):
        """BERT's last states (B, L, D)."""
        image, text = self.blip.visual_encoder(pixels), self.blip.text_encoder             # (B, 1 + N, D_image)
        x = text.embeddings["word_embeddings"](ids) + text.embeddings["position_embeddings"].weight[:ids.shape[1]]
        x = text.embeddings["LayerNorm"](x)
        for layer in text.encoder["layer"]:
            x = layer(x, mask[:, None, None], image)
        return x

    def forward(self, pixels, ids, mask):
        return (self.mlp(self.hidden(pixels, ids, mask)[:, 0]) - self.MEAN) / self.STD


class WordPiece:
    """BERT's uncased tokenizer from vocab.txt: strings -> ids (B, length) int64, padded with 0, and their mask."""

    def __init__(self, file, length=35):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        self.core = Tokenizer(models.WordPiece.from_file(str(file), unk_token="[UNK]"))
        self.core.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
        absent = [token for token in special if self.core.token_to_id(token) is None]
        if absent:
            raise ValueError(f"{file}: the special token {absent[0]} is missing: this is another tokenizer's file")
        self.core.add_special_tokens(special)
        self.length, (self.pad, self.start, self.end) = length, map(self.core.token_to_id, special[:3])

    def __call__(self, texts):
        rows = [[self.start] + encoding.ids[:self.length - 2] + [self.end]
                for encoding in self.core.encode_batch(texts, add_special_tokens=False)]
        ids = torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows])
        return ids, torch.arange(self.length) < torch.tensor([len(row) for row in rows])[:, None]


@functools.cache
def imagereward(weights=None, device="cpu", how="pil"):
    """ImageReward v1.0, about -2.3 to 2: a z-score of human preference."""
    directory = weights_of("imagereward", weights)
    with torch.device("meta"):
        net = ImageReward()
    net = read_weights(net, directory / "ImageReward.pt", device)
    tokenize = WordPiece(directory / "vocab.txt")

    def score(images, prompts):
        ids, mask = tokenize(prompts)
        return net(clip_pixels(images.to(device), net.size, how), ids.to(device), mask.to(device))
    return in_batches(score)


# =====================================================================================================================
# Names
# =====================================================================================================================
REWARDS = {
    "shapes": _shapes(lambda v: (v["soft"] + v["strict"]) / 2),
    "shapes-soft": _shapes(lambda v: v["soft"]),
    "shapes-strict": _shapes(lambda v: v["strict"]),
    "pickscore": clip_reward("pickscore", "H/14", lambda cosine, scale: scale * cosine / 26),        # the trainers'
    "pickscore-raw": clip_reward("pickscore", "H/14", lambda cosine, scale: scale * cosine),         # 17 to 25
    "hpsv2": clip_reward("hpsv2", "H/14", lambda cosine, scale: cosine, "pad", open_clip_text),      # v2.1
    "clip-l14": clip_reward("clip-l14", "L/14", lambda cosine, scale: cosine),
    "clip-dfn": clip_reward("clip-dfn", "H/14-378", lambda cosine, scale: cosine, "pil", open_clip_text),
    "clipscore": clip_reward("clip-l14", "L/14", lambda cosine, scale: scale * cosine / 30, "bilinear"),   # DGPO's
    "aesthetic": aesthetic,
    "imagereward": imagereward}
ENGINES = {   # rewards whose rule is here, and what they still need to look at an image
    "geneval": "a detector that calls score_detections", "ocr": "a reader of text that calls ocr_score"}


# =====================================================================================================================
# Command line
# =====================================================================================================================

def score_folder(spec, folder, weights=None, device="cpu", batch=64):
    """Score the images that folder/prompts.jsonl lists, a line each: {"file", "prompt", and what a verifier needs}.

    Returns its rows, each with a "reward" added. Raises ValueError, in one line, for what cannot be read or scored.
    """
    score, folder = load(spec, weights, device), pathlib.Path(folder)
    listing = folder / "prompts.jsonl"
    if not listing.is_file():
        raise ValueError(f"there is no {listing}: it says what the images should show, {{'file', 'prompt'}} a line")
    rows = data.prompts(listing, "test")
    for i, row in enumerate(rows, 1):
        if not isinstance(row.get("file"), str):
            raise ValueError(f"{listing}: row {i} names no file")
    bar = tqdm(total=len(rows), unit="image", disable=not sys.stderr.isatty())
    for start in range(0, len(rows), batch):
        sizes = {}                                                     # images of one size make one batch
        for row in rows[start:start + batch]:
            image = np.array(_open(folder / row["file"]))                                  # (H, W, 3) uint8
            sizes.setdefault(image.shape, []).append((row, image))
        for group in sizes.values():
            some = [row for row, _ in group]
            images = torch.from_numpy(np.stack([image for _, image in group])).to(device)
            values = score(images.permute(0, 3, 1, 2).float() / 255, [row["prompt"] for row in some], some)
            for row, value in zip(some, values.tolist()):
                row["reward"] = value
            bar.update(len(some))
    return rows


def _open(path):
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise ValueError(f"cannot read the image {path}: {e.args[-1]}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", required=True, help=f"{', '.join(REWARDS)}, a sum, or path/to/file.py:function")
    parser.add_argument("--images", required=True, help="a folder with prompts.jsonl, one {file, prompt, ...} a line")
    parser.add_argument("--weights", help="the directory of the reward networks' weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        rows = score_folder(args.reward, args.images, args.weights, args.device)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    groups = {}
    for row in rows:
        groups.setdefault(row.get("tag", "all"), []).append(row["reward"])
    if len(groups) > 1:
        groups["all"] = [row["reward"] for row in rows]
    print(f"{args.reward:<20}{'images':>8}{'mean':>9}{'failed':>8}")
    for tag, values in groups.items():
        good = [v for v in values if math.isfinite(v)]
        mean = sum(good) / len(good) if good else math.nan
        print(f"{tag:<20}{len(values):>8}{mean:>9.4f}{len(values) - len(good):>8}")
    with open(pathlib.Path(args.images) / "scores.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(("file", "prompt", args.reward))
        writer.writerows((row["file"], row["prompt"], f"{row['reward']:.5f}") for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
