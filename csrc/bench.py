"""Times the fused ops against their PyTorch twins and this machine's copy bandwidth; whole training steps; rewards.

    python csrc/bench.py                # the twins and, once built, the compiled ops; CPU, and a GPU if there is one
    python csrc/bench.py --compile      # torch.compile of the twins as well
    python csrc/bench.py --quick        # one dtype, for a look; --device cuda: the GPU alone
    python csrc/bench.py model          # a rollout and its update, full-size models with random weights, on a GPU, also
                                        # by diffusers and peft; --quick: the first; model sd35m: this one alone
    python csrc/bench.py graphs         # one pass over full-size networks, as it is and as a CUDA graph
    python csrc/bench.py rewards        # every reward: small random networks on the CPU, full-size ones on a GPU

A time is the median over calls, the implementations in turn, on buffers in turn, so that few calls find their data in a
cache. GB/s counts the bytes that the op must move (each input read once, each output written once), whatever the
implementation does, and is set beside the bandwidth of copying into a tensor that exists already, bytes read plus
bytes written: on a CPU the best seen with 64 MB, on a GPU the median with 1 GB. Allocating the outputs and autograd's
own time are included. A GPU's time is its kernels' alone; what the CPU takes to launch them has columns of its own.
"""
import argparse
import functools
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from csrc import ops  # noqa: E402

SHAPES = (1, 16, 32, 32), (4, 16, 64, 64), (16, 16, 128, 128)            # 64 KB, 1 MB and 16 MB in float32
LARGE = (256, 16, 128, 128)                                              # 256 MB: far more than a GPU's cache


def cases(dtype, device):
    """(op, the twin's function, shape, bytes moved, maker of a call's inputs) for every row of the table."""
    def randn(*shape, grad=False):
        return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)

    def forward_backward(f):
        def call(a, b, *rest):
            a.grad = b.grad = None
            out = f(a, b, *rest)
            out.backward(b.detach() if out.shape == b.shape else torch.ones_like(out))      # a dense gradient
        return call

    def no_noise(f):                                                     # an ODE's step: Euler's x + dt v
        return lambda x, cond: f(x, cond, 1.0, -0.1)

    def taken(f):                                                        # guidance, SDE step and log-prob, in a rollout
        return lambda x, cond, uncond, eps: f(x, cond, 0.9, -0.1, 0.3, uncond=uncond, scale=4.5, eps=eps)

    def scored(f):                                                       # the same step scored, and its gradients
        def call(x, cond, uncond, x_next):
            cond.grad = uncond.grad = None
            _, logp = f(x, cond, 0.9, -0.1, 0.3, uncond=uncond, scale=4.5, x_next=x_next)
            logp.backward(torch.ones_like(logp))
        return call

    def drawn(f):                                                        # beside torch.randn of the same shape
        return lambda x, cond: f(x, cond, 0.9, -0.1, 0.3, key=(1, 2, 3))

    def with_randn(x, cond):
        return ops.linear_step_ref(x, cond, 0.9, -0.1, 0.3, eps=torch.randn_like(x))

    def dgpo(f):
        def call(dsm, ref, adv, group_size):
            dsm.grad = None
            f(dsm, ref, adv, group_size, 30.0).backward()
        return call

    size = torch.empty(0, dtype=dtype).element_size()
    prox, cfg, linear, adv, slas, loss = (getattr(ops, name) for name in ops.NAMES)
    prox_ref, cfg_ref, linear_ref, adv_ref, slas_ref, loss_ref = (getattr(ops, name + "_ref") for name in ops.NAMES)
    for shape in (*SHAPES, *[LARGE] * (device == "cuda")):
        bytes_ = torch.Size(shape).numel() * size

        def make(count, *rest, grads=(), shape=shape):
            return lambda: (*(randn(*shape, grad=k in grads) for k in range(count)), *rest)
        yield "prox_matching_loss", prox, prox_ref, shape, 2 * bytes_, make(2, 1.0)
        yield "  with backward", *map(forward_backward, (prox, prox_ref)), shape, 5 * bytes_, make(2, 1.0, grads=(0,))
        yield "cfg_combine", cfg, cfg_ref, shape, 3 * bytes_, make(2, 4.5)
        yield "  beside torch.lerp", cfg, torch.lerp, shape, 3 * bytes_, make(2, 4.5)
        yield "  with backward", *map(forward_backward, (cfg, cfg_ref)), shape, 6 * bytes_, make(2, 4.5, grads=(0, 1))
        yield "linear_step, taken", *map(taken, (linear, linear_ref)), shape, 5 * bytes_, make(4)
        yield "  without noise", *map(no_noise, (linear, linear_ref)), shape, 3 * bytes_, make(2)
        yield "  with Philox, and randn", drawn(linear), with_randn, shape, 3 * bytes_, make(2)
        yield "  scored, with backward", *map(scored, (linear, linear_ref)), shape, 10 * bytes_, make(4, grads=(1, 2))
    for b, g in ((64, 8), (1152, 24), (8192, 32), (65536, 64)):
        rewards, moved = (lambda b=b, g=g: (randn(b), g)), b * (size + 4)
        yield f"group_advantage, G = {g}", adv, adv_ref, (b,), moved, rewards
        batch = (lambda r, g, f=f: f(r, g, "batch") for f in (adv, adv_ref))
        yield "  by the batch's std", *batch, (b,), moved, rewards
        shaped = (lambda r, g, f=f: f(r, g, 0.7, True, clip=5.0) for f in (slas, slas_ref))
        yield "slas_advantage", *shaped, (b,), moved, rewards
        triple = lambda b=b, g=g: (randn(b, grad=True), randn(b), randn(b), g)
        yield "dgpo_loss, with backward", *map(dgpo, (loss, loss_ref)), (b,), b * (4 * size + 8), triple


def measure(functions, make, device, pick=statistics.median, seconds=0.5):
    """Seconds of each f(*inputs), the device's and the CPU's: on a CPU the same, picked from calls within `seconds`.

    4 sets of inputs and all f take turns: a busy machine hits all of them alike.
    """
    sets = [make() for _ in range(4)]
    for f in functions:
        f(*sets[0])
    if device == "cuda":                                                 # one function's calls are queued in one go
        return [measure_cuda(f, sets) for f in functions]
    times, end = [[] for _ in functions], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 8:
        for f, taken in zip(functions, times):
            inputs = sets.pop(0)
            start = time.perf_counter()
            f(*inputs)
            taken.append(time.perf_counter() - start)
            sets.append(inputs)
    return [(pick(taken), pick(taken)) for taken in times]


def measure_cuda(f, sets, calls=16):
    """The GPU's seconds of a call, and the CPU's to launch it: medians over rounds of so many calls.

    The GPU is held back until a round is queued, and then runs kernel behind kernel. Where a call waits for the GPU, as
    slas_advantage's twin, which indexes by a mask, that is of no use: such a time has the CPU's in it.
    """
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(hold):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(hold * 3e9))                               # in cycles: no GPU has 3 GHz
        first.record()
        start = time.perf_counter()
        for i in range(calls):                                           # few: a thousand launches fill the queue
            f(*sets[i % len(sets)])
        queued = time.perf_counter() - start
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / calls, queued / calls
    run(0)                                                               # for the allocator
    cpu = statistics.median(run(0)[1] for _ in range(3))
    return statistics.median(run(2 * calls * cpu + 1e-3)[0] for _ in range(7)), cpu


def warm_up(seconds=0.5):
    """Matrix products, until the GPU's clocks have risen."""
    a, end = torch.randn(4096, 4096, device="cuda"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()


# script, model, one GPU's GB, and what is set beside it: LoRA at 512 px, the settings of --preset official, one group
PEERS = ("bfloat16", "released")                                         # csrc/peer.py's: diffusers and peft
MODEL_RUNS = [("dgpo", "sd35m", 80, PEERS), ("grpo", "sd35m", 80, PEERS), ("dgpo", "sd35m", 24, ()),
              ("dgpo", "sd35m", 141, PEERS), ("dgpo", "flux", 141, PEERS), ("grpo", "flux", 141, PEERS),
              ("dgpo", "flux", 48, ()), ("dgpo", "sd14", 80, PEERS), ("grpo", "sd14", 80, PEERS),
              ("proxt2i", "uvit", 80, ())]
MODEL_COLUMNS = "script   model   plan GB   network  rollout  update  step s  peak GB  held GB   (first two: images/s)"


def model(runs=MODEL_RUNS, extra=()):
    """Print images a second of a rollout (with decoding) and of its update, a step's seconds and the peak memory.

    A run is the script itself on random weights (--init random), a constant for a reward, in a process of its own; its
    second step counts. It gets no more of the GPU than its plan's GB, and fails if it wants more. Peak is what tensors
    took at most, held what PyTorch's allocator did. Beside it, by csrc/peer.py and without a cap, the same on the
    network of diffusers and peft's LoRA, `-` where these are not installed. extra: more flags.
    Returns rows as dicts of the columns' names, seconds None where a run failed, with its error, or was not made.
    """
    rows = []
    print(MODEL_COLUMNS, flush=True)
    for script, name, gigabytes, peers in runs:
        for how in ("ours", *peers):
            row = dict(script=script, model=name, gigabytes=gigabytes, network=how, **measured(
                script, name, gigabytes, how, extra))
            rows.append(row)
            figures = "{rollout:>9.2f}{update:>8.2f}{seconds:>8.2f}{peak:>9.1f}{reserved:>9.1f}"
            if row["seconds"] is None:
                figures = "  failed: {error}" if row["error"] else f"{'-':>9}{'-':>8}{'-':>8}{'-':>9}{'-':>9}"
            print(f"{script:9}{pathlib.Path(name).name:7}{gigabytes:>8}{how:>10}{figures.format(**row)}", flush=True)
    return rows


def start(program, script, name, gigabytes, how, extra, folder):
    """One of model's runs, two steps of it: a process of csrc/PROGRAM that has ended. Its --out is folder / "out"."""
    folder, size = pathlib.Path(folder), 12 if name == "flux" else 24
    (folder / "reward.py").write_text("def noise(images, prompts, meta):\n    return images.mean((1, 2, 3))\n")
    (folder / "prompts.txt").write_text("a photo of a bench\n")
    reward = f"{folder / 'reward.py'}:noise"
    flags = dict(model=name, init="random", gpu_memory=gigabytes, steps=2, groups=1, group_size=size, updates=1,
                 resolution=512, lora_rank=64, eval_every=0, eval_images=1, val_images=1, cfg_also=0, eval_steps=1,
                 prompts=folder / "prompts.txt", reward=reward, eval_reward=reward, out=folder / "out")
    flags |= dict(clip_range=1.0, fsdp=None) if script == "grpo" else {}
    line = [word for key, value in flags.items() for word in
            ([f"--{key.replace('_', '-')}", str(value)] if value is not None else [f"--no-{key}"])]
    words = [ROOT / "csrc" / program, how, script, *["rl"] * (script == "proxt2i"), *line, *map(str, extra)]
    cap = {"T2I_GPU_CAP": str(gigabytes if how == "ours" else 0)}
    with open(folder / "stdout", "w+") as out, open(folder / "stderr", "w+") as err:
        def said():
            return [(file.seek(0), file.read())[1] for file in (out, err)]
        try:
            done = subprocess.run([sys.executable, *words], cwd=folder, stdout=out, stderr=err, env=os.environ | cap)
        except BaseException:                                          # stopped: what it has said so far
            print(*(text[-4000:] for text in said()), sep="\n", file=sys.stderr, flush=True)
            raise
        done.stdout, done.stderr = said()
    return done


def measured(script, name, gigabytes, how, extra=()):
    """One of model's runs: its images a second, seconds and memory, or None and an error, "" if it was not made."""
    if how != "ours" and not all(map(importlib.util.find_spec, ("diffusers", "peft"))):
        return dict(seconds=None, error="")
    with tempfile.TemporaryDirectory() as folder:
        done = start("peer.py", script, name, gigabytes, how, extra, folder)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr, flush=True)    # the traceback: the table has its end
            return dict(seconds=None, error=done.stderr.strip()[-300:] or f"exit code {done.returncode}")
        held = re.search(r"^reserved ([\d.]+) GB$", done.stderr, re.M)
        taken, steps = ([json.loads(row) for row in (pathlib.Path(folder) / "out" / file).read_text().splitlines()][1]
                        for file in ("times.jsonl", "metrics.jsonl"))
        size = steps["images"] / steps["step"]
        return dict(rollout=size / taken["rollout"], update=size / taken["update"], peak=steps.get("memory", 0.0),
                    reserved=float(held[1]) if held else 0.0,
                    seconds=sum(value for key, value in taken.items() if key != "step"))


# model, images and pixels of one pass of a rollout: whether CUDA graphs are worth their code. The first two: --quick
GRAPHS = [("tiny", 192, 28), ("sd35m", 24, 512), ("sd35m", 1, 512), ("sd14", 24, 512), ("uvit", 24, 512),
          ("flux", 12, 512)]


def network(name, images, pixels, device):
    """A model's network in bf16, random weights unless it ships with the code, and one pass's arguments."""
    import models
    pipe = models.load(name, init=None if name in models.SHIPPED else "random", dtype=torch.bfloat16, device=device)
    x = torch.randn(images, *pipe.latent_shape(pixels), device=device, dtype=torch.bfloat16)
    t = torch.full((images,), 500.0 if pipe.ddpm else 0.5, device=device)
    lam = [torch.full_like(t, 0.1)] if pipe.net.config.get("lam") else [None] if pipe.family == "uvit" else []
    return pipe.net, [x, t, *lam, *pipe.encode_text(["a photo of a bench"] * images)]


def captured(net, args):
    """net as a CUDA graph: a function of new x and t, whose result the next call overwrites; the GB that it keeps."""
    args, side = [arg if arg is None else arg.clone() for arg in args], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):                                               # what libraries set up at their first calls
            net(*args)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
    with torch.cuda.graph(graph, stream=side):                           # whose workspaces are there already
        out = net(*args)
    torch.cuda.empty_cache()                                             # all but the graph's own memory
    kept = (torch.cuda.memory_reserved() - before) / 2 ** 30

    def replay(x, t):
        args[0].copy_(x)
        args[1].copy_(t)
        graph.replay()
        return out
    return replay, kept


@torch.no_grad()
def captured_time(net, args):
    """A pass's wall time in ms, launched op by op and as a CUDA graph, and the memory that the graph keeps, in GB."""
    (replay, kept), times = captured(net, args), ([], [])

    def seconds(f, calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls
    net(*args)
    calls = max(1, min(10, int(0.3 / seconds(lambda: net(*args), 1))))
    for _ in range(5):
        for f, seen in zip((lambda: net(*args), lambda: replay(*args[:2])), times):
            f()
            seen.append(1000 * seconds(f, calls))
    return *map(statistics.median, times), kept


def graphs(runs=GRAPHS):
    """Print what a CUDA graph saves of a pass over each network, as a rollout makes several in a row."""
    import data
    *_, device = data.join("cuda")                                       # attention as in the scripts
    print(f"{torch.cuda.get_device_name()}\n{'model':<8}{'images':>7}{'px':>5}{'eager ms':>10}{'graph ms':>10}"
          f"{'speedup':>9}{'graph GB':>10}", flush=True)
    for name, images, pixels in runs:
        print(f"{name:<8}{images:>7}{pixels:>5}", end="", flush=True)
        try:
            eager, graph, kept = captured_time(*network(name, images, pixels, device))
            print(f"{eager:>10.2f}{graph:>10.2f}{eager / graph:>8.2f}x{kept:>10.2f}", flush=True)
        except RuntimeError as error:
            if torch.OutOfMemoryError not in (type(error), type(error.__context__)):       # a capture's end raises, too
                raise
            print("  more than this GPU's memory", flush=True)
        torch.cuda.empty_cache()


# The tests' small networks, by the names of rewards.py's classes' options.
SMALL_CLIP = dict(
    projection_dim=24, text_config=dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                                        num_attention_heads=2, vocab_size=4096),
    vision_config=dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=3, patch_size=8,
                       image_size=32))
SMALL_BLIP = dict(vocab=4096, dim=32, layers=2, heads=4, places=40, dim_image=48, layers_image=2, heads_image=3,
                  patch=8, size=32)
SMALL_DETECTOR = dict(
    feature_size=64, mask_feature_size=32, hidden_dim=64, encoder_feedforward_dim=48, dim_feedforward=40,
    encoder_layers=2, decoder_layers=5, num_attention_heads=4, num_queries=7,
    backbone_config=dict(embed_dim=12, depths=[1, 2, 3, 1], num_heads=[1, 2, 3, 4], window_size=3))


def random_rewards(folder, small):
    """The module rewards, a copy whose networks have random weights, small or full-size, where it would read files.

    OCR and tiny-clip keep their own. Random detectors find no object, so that no crop's colour is looked at.
    """
    spec = importlib.util.spec_from_file_location("rewards", ROOT / "rewards.py")
    rewards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rewards)
    words = "a photo of red ring two blue squares cat".split()
    rewards.models.train_tokenizer(words, folder, 77)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    read_clip, read_weights, weights_of = rewards.read_clip, rewards.read_weights, rewards.weights_of

    def fill(net, file, device="cpu", *rest):                          # built without memory, as read_weights finds it
        if file.parent != folder:                                      # OCR's
            return read_weights(net, file, device, *rest)
        for p in net.to_empty(device=device).parameters():
            torch.nn.init.normal_(p, std=.02)
        return net.eval().requires_grad_(False)

    @functools.cache
    def random_clip(directory, size, device, *files):
        if size is None:                                               # tiny-clip's
            return read_clip(directory, size, device)
        with torch.device("meta"):
            net = rewards.CLIP(**SMALL_CLIP if small else rewards.CLIP_SIZES[size])
        return fill(net, folder / "clip", device)

    def random_detector(directory, device):
        with torch.device("meta"):
            net = rewards.Mask2Former(**SMALL_DETECTOR if small else {})
        net.file = folder / rewards.MMDET_FILES[0]
        return fill(net, net.file, device)
    rewards.read_clip, rewards.read_detector, rewards.read_weights = random_clip, random_detector, fill
    rewards.weights_of = lambda name, weights=None: weights_of(name) if name == "tiny-clip" else folder
    rewards.ImageReward = functools.partial(rewards.ImageReward, **SMALL_BLIP if small else {})
    return rewards


def score(device, small, images, seconds, only=()):
    """Print each reward's ms for an image of 512 px, the tiny world's for 28. Returns rows (reward, dtype, ms or None).

    images: how many a call; only: names, all if there are none. A time is the median of calls, 3 at least, made within
    about so many seconds. A reward that fails is told, and the others follow; then SystemExit.
    """
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        rewards = random_rewards(pathlib.Path(folder), small)
        machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        print(f"\n{machine}, {torch.get_num_threads()} CPU threads, {'small' if small else 'full-size'} random "
              f"networks (ocr, ocr-gold, tiny-clip: their own), {images} images a call\n{'reward':<18}{'dtype':>10}"
              f"{'ms an image':>13}{'CPU ms':>9}{'images/s':>10}", flush=True)
        world = rewards.data.draw_prompts(rewards.data.world_prompts("test"), images, "bench")
        small_images = rewards.data.render(world, 0, 28).to(device)
        g = torch.Generator().manual_seed(0)
        large_images = torch.nn.functional.interpolate(torch.rand(images, 3, 9, 9, generator=g), 512, mode="bicubic")
        large_images = sign(large_images.clamp(0, 1)).to(device)
        meta = {"include": [{"class": "cat", "count": 1, "color": "red"}], "tag": "colors", "target": "HELLO WORLD"}
        names = [name for name in rewards.REWARDS if name not in ("deqa", "unigenbench", *rewards.NUMBER)]
        check_names(only, names)                                       # without judges': a server's time is its own
        for name in only or names:
            tiny = name.startswith(("shapes", "tiny-clip"))
            for dtype in ("float32", "bfloat16"):
                metas = world if tiny else [meta] * images
                args = small_images if tiny else large_images, ["a photo of a red cat"] * images, metas
                try:
                    reward = rewards.load(name, None, device, dtype)
                    ms, busy = (1e3 * t / images for t in call_time(lambda: reward(*args), device, seconds))
                except Exception as error:
                    known = isinstance(error, ValueError)              # a package that is not there; thresholds
                    failed += [] if known else [f"{name} {dtype}"]
                    if dtype == "float32" or not known:
                        print(f"{name:<18}{dtype:>10}  {error if known else traceback.format_exc()}", flush=True)
                        rows.append((name, dtype, None))
                    continue
                rows.append((name, dtype, ms))
                print(f"{name:<18}{dtype:>10}{ms:>13.2f}{busy:>9.2f}{1e3 / ms:>10.1f}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return rows


def check_names(only, known):
    if odd := [name for name in only if name not in known]:
        sys.exit(f"{', '.join(odd)}: not one of {', '.join(known)}")


def sign(images):
    """Images (B, 3, H, W) with two lines of black text on a white board, for OCR to read."""
    picture = Image.new("L", images.shape[:1:-1], 0)
    board = Image.new("L", picture.size, 0)
    ImageDraw.Draw(board).rectangle((60, 160, 452, 352), fill=255)
    ImageDraw.Draw(picture).multiline_text((90, 180), "HELLO\nWORLD", fill=255, font=ImageFont.load_default(64))
    board, picture = (torch.from_numpy(np.array(x)) / 255 for x in (board, picture))       # (H, W)
    return torch.where(board > 0, 1 - picture, images)


def call_time(f, device, seconds):
    """The medians of f's seconds and of its CPU seconds, all threads', after one call that is not counted.

    The second hardly minds what else the machine does; the first has the GPU's work in it.
    """
    taken, end = [], None
    while end is None or len(taken) < 4 or time.perf_counter() < end:
        start, busy = time.perf_counter(), time.process_time()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - start, time.process_time() - busy))
        end = end or time.perf_counter() + seconds
    return [statistics.median(some) for some in zip(*taken[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["ops", "model", "graphs", "rewards"], default="ops")
    parser.add_argument("only", nargs="*", help="of model and graphs: sd35m, flux, sd14, uvit; of ops and rewards: "
                        "their names; all of them if none is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of ops and rewards: this one alone")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the twins as well")
    parser.add_argument("--quick", action="store_true", help="ops: float32 only; rewards: three calls; "
                        "model: the first run of the list and one peer; graphs: the first two")
    args = parser.parse_args()
    if args.what != "rewards":
        known = {"model": {run[1] for run in MODEL_RUNS}, "graphs": {run[0] for run in GRAPHS}}
        check_names(args.only, sorted(known[args.what]) if args.what in known else ops.NAMES)
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if "cuda" in devices and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no NVIDIA GPU that it can use")
    if args.what == "model":
        if "cuda" not in devices:
            sys.exit("csrc/bench.py model wants an NVIDIA GPU: full-size models on a CPU would take hours. What memory "
                     "they take on one, csrc/count.py tells without it.")
        gigabytes = torch.cuda.mem_get_info()[1] / 2 ** 30 * 1.1         # as data.py: 44.5 GiB is 48 GB
        runs = [run for run in MODEL_RUNS if run[2] <= gigabytes and (not args.only or run[1] in args.only)]
        runs = [(*run[:3], run[3][:1]) for run in runs[:1]] if args.quick else runs
        sys.exit(any(row.get("error") for row in model(runs)))
    if args.what == "graphs":
        if "cuda" not in devices:
            sys.exit("csrc/bench.py graphs wants an NVIDIA GPU: CUDA graphs are its own")
        graphs([run for run in (GRAPHS[:2] if args.quick else GRAPHS) if not args.only or run[0] in args.only])
        return
    if args.what == "rewards":
        for device in devices:
            score(device, device == "cpu", 32 if device == "cuda" else 4, 0 if args.quick else 3, args.only)
        return
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads, {ops.status()}")
    for device in devices:
        gpu, fused = device == "cuda", ops.lib is not None and device in ops.devices
        if gpu:
            warm_up()
        out = torch.empty(1 << (28 if gpu else 24), device=device)
        [(copy, _)] = measure([out.copy_], lambda: (torch.randn_like(out),), device, pick=min)
        peak = 2 * out.numel() * 4 / copy / 1e9
        name = torch.cuda.get_device_name() if gpu else "cpu"
        print(f"\n{name}: copies at {peak:.1f} GB/s\n{'op':26}{'shape':>18}{'dtype':>10}{'fused us':>11}{'GB/s':>8}"
              f"{'of copy':>9}{'eager us':>11}{'speedup':>9}" + f"{'compile us':>12}" * args.compile
              + f"{'eager CPU':>11}{'fused CPU':>11}" * gpu + f"{'compile CPU':>13}" * (gpu and args.compile))
        for dtype in (torch.float32,) if args.quick else (torch.float32, torch.bfloat16, torch.float16):
            head = ""
            for op, f, twin, shape, moved, make in cases(dtype, device):
                head = head if op.startswith(" ") else op.partition(",")[0]    # a line that goes on: of the op above
                if args.only and head not in args.only:
                    continue
                if args.compile:
                    torch._dynamo.reset()
                row = [twin] + [f] * fused + [torch.compile(twin)] * args.compile
                times = measure(row, make, device)
                eager, *rest = (1e6 * t for t, _ in times)
                line = f"{op:26}{'x'.join(map(str, shape)):>18}{str(dtype)[6:]:>10}"
                if fused:
                    us, *rest = rest
                    rate = moved / us / 1e3
                    line += f"{us:11.1f}{rate:8.1f}{rate / peak:9.0%}{eager:11.1f}{eager / us:8.2f}x"
                else:
                    line += f"{'-':>11}{'-':>8}{'-':>9}{eager:11.1f}{'-':>9}"
                line += "".join(f"{us:12.1f}" for us in rest)
                if gpu:
                    cpu = [f"{1e6 * t:.1f}" for _, t in times]
                    cpu[1:1] = [] if fused else ["-"]
                    line += "".join(f"{us:>{width}}" for us, width in zip(cpu, (11, 11, 13)))
                print(line, flush=True)


if __name__ == "__main__":
    main()
