"""Fused operations, each beside the plain PyTorch twin that says what it computes.

    prox_matching_loss   1 - exp(-|pred - target|^2 / (d zeta^2))        for each sample; ProxT2I, Eq. (8)
    cfg_combine          uncond + scale * (cond - uncond)                classifier-free guidance
    linear_step          mean = a x + b v + c w, mean + std eps, logp    any sampler's step, with guidance and log-prob
    group_advantage      (r - mean_g r) / (std + 1e-4)                   group-relative advantages
    slas_advantage       |dr|^gamma (dr - lam)                           SLAS's shape of them
    dgpo_loss            mean_g -log sigmoid(-z_g)                       DGPO, Eq. (17)

The twins always work. The compiled ops (NAME.cpp for the CPU, NAME.cu for CUDA) are used instead once they are built
and cached; nothing here starts a compiler unless asked to. `status()` says in a line which of the two a run uses.

    python csrc/ops.py build            # once per PyTorch version and change of the sources; under a minute
    python csrc/ops.py                  # print the status
"""
import hashlib
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.autograd import forward_ad

HERE = Path(__file__).resolve().parent
NAMES = ("prox_matching_loss", "cfg_combine", "linear_step", "group_advantage", "slas_advantage", "dgpo_loss")
STD = ("group", "batch", "none")                                         # their place is the kernels' Shaping::By
CENTRED = 3                                                              # and this: the batch's std of r - mean_g r
SLAS_STD = {"batch": (1, 1), "before": (1, 0), "after": (0, 1), "none": (0, 0)}        # before and after shaping
CACHE = Path(os.environ.get("T2I_OPS_CACHE") or os.path.expanduser("~/.cache/t2i_ops"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

lib = None                                                               # torch.ops.t2i once a library is loaded
direct = None                                                            # the same ops, straight to C++
devices = ()                                                             # the device types that it was built for
problem = ""                                                             # why a cached library could not be loaded
wanted = True                                                            # False: the twins, whatever is built
compiling = torch.compiler.is_dynamo_compiling                           # both found once: a small call is all overhead
transformed = torch._C._are_functorch_transforms_active


# == The operations ==

def prox_matching_loss(pred, target, zeta):
    """Proximal matching loss, 1 - exp(-|pred - target|^2 / (d zeta^2)), of each sample. Source: ProxT2I, Eq. (8).

    pred, target: (B, ...), d elements a sample, equal shapes, dtypes and devices (else ValueError); zeta > 0: width.
    Returns (B,) float32, in [0, 1]; float64 for float64. Differentiable in pred and target; compiled, only once.
    Compiled, it reads each tensor once, makes no temporary of their size and gives the same bits in every run.
    """
    check_same("prox_matching_loss", pred=pred, target=target)
    if pred.dim() < 2:
        raise ValueError(f"prox_matching_loss: pred is {tuple(pred.shape)}, it takes (B, ...), a batch of samples.")
    if not zeta > 0:
        raise ValueError(f"prox_matching_loss: zeta={zeta}, the width of the loss must be above 0.")
    if fused := compiled(pred):
        return call(fused.prox_matching_loss, pred, target, zeta)[0]
    return prox_matching_loss_ref(pred, target, zeta)


def prox_matching_loss_ref(pred, target, zeta):
    wide = torch.promote_types(pred.dtype, torch.float32)
    q = (pred.to(wide) - target.to(wide)).square().flatten(1).mean(1) / zeta**2      # (B,)
    return -torch.expm1(-q)                                                          # exact for small q, unlike 1 - exp


def cfg_combine(uncond, cond, scale):
    """uncond + scale * (cond - uncond) in one pass, computed in float32 or better: guidance, off at scale 1.

    uncond, cond: any shape, equal shapes, dtypes and devices (else ValueError); scale: float.
    Returns the same shape and dtype, contiguous. Differentiable in uncond and cond, any number of times.
    """
    if not (fused := compiled(uncond)):
        check_same("cfg_combine", uncond=uncond, cond=cond)
        return cfg_combine_ref(uncond, cond, scale)
    try:
        return fused.cfg_combine(uncond, cond, scale)
    except ValueError:
        check_same("cfg_combine", uncond=uncond, cond=cond)              # says which is which
        raise


def cfg_combine_ref(uncond, cond, scale):
    wide = torch.promote_types(uncond.dtype, torch.float32)
    u, c = uncond.to(wide), cond.to(wide)
    return (u + scale * (c - u)).to(uncond.dtype)


def linear_step(x, cond=None, a=1.0, b=0.0, std=0.0, uncond=None, scale=1.0, w=None, c=0.0, eps=None, key=None,
                x_next=None, mean=False):
    """One step of a sampler, with guidance and log-prob, in one pass: x_next = a x + b v + c w + std eps.

    v = uncond + scale (cond - uncond), or cond where uncond is None; the mean is a x + b v + c w. All samplers here are
    of this form: the SDEs, DDIM, Euler's ODE, DPM-Solver++(2M) with w its last estimate, the proximal chain.
    x, w, eps, x_next: (B, ...), equal shapes, dtypes and devices; cond, uncond: the same, or half precision where x is
    float32; a, b, c, scale, std >= 0: floats. Take the step by eps, by key or, at std 0, by neither; or score the one
    that led to x_next. key = (seed, step, image), integers: eps is noise(x.shape, *key), drawn on the way.
    Returns x_next, or with x_next given the mean if mean is set, else None; and log N(x_next; mean, std^2 I), a mean
    over dimensions, (B,) in nats, float32 (float64 for float64): None at std 0. A step that was taken has, bit for bit,
    the log-prob that it is scored with. Differentiable in x, cond, uncond and w; logp not through x_next.
    Raises ValueError for tensors that do not fit, or for none or several of eps, key and x_next where std > 0.
    """
    if x.dim() < 2:
        raise ValueError(f"linear_step: x is {tuple(x.shape)}, it takes (B, ...), a batch of samples.")
    for name, other in dict(w=w, eps=eps, x_next=x_next).items():
        if other is not None:
            check_same("linear_step", **{"x": x, name: other})
    if uncond is not None and cond is not None:
        check_same("linear_step", cond=cond, uncond=uncond)
    if cond is not None:
        half = x.dtype == torch.float32 and cond.dtype in (torch.bfloat16, torch.float16)
        check_same("linear_step", x=x, cond=cond, dtypes=not half)       # half is fine beside float32
    if cond is None and uncond is not None:
        raise ValueError("linear_step: uncond without cond is no guidance.")
    if key is not None and len(key) != 3:
        raise ValueError(f"linear_step: key={key}, it takes (seed, step, image).")
    given = sum(part is not None for part in (eps, key, x_next))
    if std < 0 or given > 1 or (std and not given):
        raise ValueError(f"linear_step: std={std} with {given} of eps, key and x_next: a step with noise takes one.")
    scale = 1.0 if uncond is None else scale                             # the backward pass multiplies by it
    if not (fused := compiled(x)):
        return linear_step_ref(x, cond, a, b, std, uncond, scale, w, c, eps, key, x_next, mean)
    key = ((key[0] + 2**63) % 2**64 - 2**63, *key[1:]) if key else ()    # the op's integers have a sign
    out, logp = call(fused.linear_step, x, cond, uncond, w, eps, x_next, a, b, scale, c, std, key, mean)
    return out if x_next is None or mean else None, logp if std else None


def linear_step_ref(x, cond=None, a=1.0, b=0.0, std=0.0, uncond=None, scale=1.0, w=None, c=0.0, eps=None, key=None,
                    x_next=None, mean=False):
    wide = torch.promote_types(x.dtype, torch.float32)
    center = linear_mean(x, cond, uncond, w, a, b, scale, c)                         # (B, ...)
    if x_next is None:
        eps = noise(x.shape, *key, device=x.device) if key else eps
        moved = (center + std * eps.detach().to(wide) if std else center).to(x.dtype)
    to = (moved if x_next is None else x_next).detach().to(wide)
    logp = -((to - center) / std).square() / 2 - math.log(std) - math.log(2 * math.pi) / 2 if std else None
    out = moved if x_next is None else center.to(x.dtype) if mean else None
    return out, logp.flatten(1).mean(1) if std else None


def linear_mean(x, cond, uncond, w, a, b, scale, c):
    """a x + b v + c w, v = uncond + scale (cond - uncond), in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = a * x.to(wide)
    if cond is not None:
        v = cond.to(wide)
        out = out + b * (v if uncond is None else uncond.to(wide) + scale * (v - uncond.to(wide)))
    return out if w is None else out + c * w.to(wide)


def linear_gradients(g_out, g_logp, x, cond, uncond, w, x_next, a, b, scale, c, std):
    """What the compiled backward pass computes, in plain PyTorch, for second derivatives."""
    mean = linear_mean(x, cond, uncond, w, a, b, scale, c)
    slope = torch.zeros_like(mean) if g_out is None else g_out.to(mean.dtype)
    if g_logp is not None:
        per_row = g_logp / (mean[0].numel() * std**2)
        slope = slope + per_row.view(-1, *[1] * (x.dim() - 1)) * (x_next.detach().to(mean.dtype) - mean)
    return [None if t is None else (by * slope).to(t.dtype) for t, by in
            ((x, a), (cond, b * scale), (uncond, b * (1 - scale)), (w, c))]


def fused_step(step, v, x, eps=None, x_next=None):
    """step(v, x, eps=eps, x_next=x_next) in one pass, where step is one of the samplers', linear in v and x.

    step returns x_next, logp, mean, std; its a and b are what its mean makes of x, v = 1, 0 and 0, 1, so that the
    formula stands in one place. Returns the same four; compiled, the mean is None where the step is taken.
    """
    if not compiled(x):
        return step(v, x, eps=eps, x_next=x_next)
    one = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    *_, unit, std = step(1 - one, one, eps=one)
    a, b = unit.flatten().tolist()
    out, logp = linear_step(x, v, a, b, std, eps=eps if std else None, x_next=x_next, mean=True)
    return (out, logp, None, std) if x_next is None else (x_next, logp, out, std)


def noise(shape, seed, step, image, device="cpu"):
    """Standard Gaussian noise (B, ...) float32, a function of (seed, step, image) alone: linear_step's own for a key.

    The same bits on every device. Row b belongs to image + b, so that an image's noise does not depend on its batch.
    Element i is from Philox4x32-10 at counter (i / 4, image + b, step, 0) under the key seed, by Box-Muller in float32
    with rounded +, x and roots alone. seed: 64 bits; step, image: 32. Source: Salmon et al., SC 2011.
    """
    d = math.prod(shape[1:])
    quad = torch.arange(-(-d // 4), device=device)[None, :]                          # (1, Q)
    row = (torch.arange(shape[0], device=device)[:, None] + image) & MASK            # (B, 1)
    quad, row = torch.broadcast_tensors(quad, row)
    counter = quad, row, torch.full_like(quad, step & MASK), torch.zeros_like(quad)
    bits = philox(counter, (seed & MASK, seed >> 32 & MASK))
    z = torch.stack([*box_muller(bits[0], bits[1]), *box_muller(bits[2], bits[3])], -1)      # (B, Q, 4)
    return z.flatten(1)[:, :d].reshape(shape)


MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10: four int64 tensors of 32 random bits from a counter, four alike, and a key, two integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2                          # 64 bits, the highest taken for a sign
        c0, c1, c2, c3 = (q >> 32 & MASK) ^ c1 ^ k0, q & MASK, (p >> 32 & MASK) ^ c3 ^ k1, p & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def box_muller(a, b):
    """Two float32 normals from two tensors of 32 bits, sqrt(-2 ln u) times cosine and sine: philox.h, line by line."""
    def polynomial(x, *coefficients):
        total = torch.full_like(x, coefficients[-1])
        for c in reversed(coefficients[:-1]):
            total = total * x + c
        return total

    f = a.to(torch.float32) + 0.5
    raw = f.view(torch.int32)
    e = (raw - 0x3F3504F3) >> 23
    y = (raw - (e << 23)).view(torch.float32) - 1
    p = polynomial(y, 0.333334088, -0.250009209, 0.199851274, -0.165928558, 0.146763965, -0.141184255, 0.0927221403)
    log_m = y + y * y * (p * y - 0.5)
    square = -2 * ((e - 32).to(torch.float32) * 0.693147181 + log_m)
    radius = square.double().sqrt().float()                              # as MKL's float32 root is not always rounded
    quarter, left = (b + (1 << 29) & MASK) >> 30, (b << 2) & MASK
    h = (left - ((left >> 31) << 32)).to(torch.float32) * 2**-32
    sine = h * polynomial(h * h, 1.57079637, -0.645964086, 0.0796925798, -0.00468126638, 0.000158206531)
    cosine = polynomial(h * h, 1.0, -1.23370051, 0.253669202, -0.0208600704, 0.000903629872)
    odd = (quarter & 1).bool()
    x, other = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    x, other = torch.where((quarter == 1) | (quarter == 2), -x, x), torch.where(quarter >= 2, -other, other)
    return radius * x, radius * other


def group_advantage(reward, group_size, std="group", clip=math.inf):
    """Group-relative advantages, (r - mean) / (std + 1e-4), for groups that lie one after the other.

    reward: (B,), B a multiple of group_size >= 2. NaN marks a failed sample: it is left out of every mean and std and
    gets advantage 0. std: the population std to divide by, "group": that of the sample's group [Flow-GRPO, Eq. 4],
    "batch": that of all rewards [its released code], "none": no division. clip > 0: advantages are cut to +- clip.
    Anything else raises ValueError.
    Returns (B,) float32, float64 for float64; a constant group gives exactly 0. A constant for autograd: no gradient.
    """
    check_rewards("group_advantage", reward, group_size, std, STD, clip)
    if fused := compiled(reward):
        return call(fused.group_advantage, reward.detach(), group_size, STD.index(std), 0.0, False, False, clip)
    return group_advantage_ref(reward, group_size, std, clip)


def check_rewards(op, reward, group_size, std, allowed, clip=math.inf):
    if reward.dim() != 1 or reward.dtype not in DTYPES:
        raise ValueError(f"{op}: reward is {reward.dtype} {tuple(reward.shape)}, it takes floats (B,).")
    if group_size < 2:
        raise ValueError(f"{op}: group_size={group_size}, samples are compared in groups of 2 or more.")
    if len(reward) % group_size:
        raise ValueError(f"{op}: {len(reward)} rewards do not fill groups of group_size={group_size}.")
    if std not in allowed:
        raise ValueError(f"{op}: std={std!r}, it takes one of {', '.join(allowed)}.")
    if not clip > 0:
        raise ValueError(f"{op}: clip={clip}, it must be above 0.")


def group_advantage_ref(reward, group_size, std="group", clip=math.inf):
    def moments(rows):                                                   # deviations from the row's mean, and its std
        valid = ~rows.isnan()
        count = valid.sum(1, keepdim=True)
        low = rows.where(valid, math.inf).amin(1, keepdim=True)          # taken off first: a constant row is exactly 0
        x = (rows - low).where(valid, 0)
        dev = (x - x.sum(1, keepdim=True) / count).where(valid, 0)
        return dev, (dev.square().sum(1, keepdim=True) / count).sqrt()

    r = reward.detach().to(torch.promote_types(reward.dtype, torch.float32))
    if not len(r):
        return r.clone()
    dev, s = moments(r.view(-1, group_size))                             # (B/G, G), (B/G, 1)
    if std == "batch":
        s = moments(r.view(1, -1))[1]                                    # (1, 1)
    adv = dev if std == "none" else dev / (s + 1e-4)
    return adv.flatten().where(~r.isnan(), 0).clamp(-clip, clip)         # a group of nothing but NaN: 0 / 0 so far


def slas_advantage(reward, group_size, gamma, recenter=False, std="batch", clip=math.inf):
    """Super-linear advantages, |dr|^gamma (dr - lam) with dr = r - mean_g r and lam = 0. Source: SLAS, Eqs. 9, 20.

    reward, group_size, clip: as in group_advantage; gamma >= 0. recenter: lam = sum_g |dr|^gamma dr / sum_g |dr|^gamma.
    std: when the population std of the batch + 1e-4 divides: "before", dr; "after", the result; "batch", both; "none".
    Returns (B,) as group_advantage does. ValueError for anything else.
    """
    check_rewards("slas_advantage", reward, group_size, std, SLAS_STD, clip)
    if not gamma >= 0:
        raise ValueError(f"slas_advantage: gamma={gamma}, it must be 0 or more.")
    if not (fused := compiled(reward)):
        return slas_advantage_ref(reward, group_size, gamma, recenter, std, clip)
    before, after = SLAS_STD[std]
    by = CENTRED if before else STD.index("none")
    return call(fused.group_advantage, reward.detach(), group_size, by, gamma, recenter, bool(after), clip)


def slas_advantage_ref(reward, group_size, gamma, recenter=False, std="batch", clip=math.inf):
    before, after = SLAS_STD[std]
    valid, dr, lam = ~reward.isnan(), group_advantage_ref(reward, group_size, "none"), 0.0             # (B,)  Eq. 9
    if before:
        dr = (dr / (dr[valid].std(correction=0) + 1e-4)).where(valid, 0)
    weight = dr.abs().pow(gamma).where(valid, 0)                                     # (B,)
    if recenter:
        w, d = weight.view(-1, group_size), dr.view(-1, group_size)
        lam = ((w * d).sum(1) / w.sum(1).clamp(min=1e-30)).repeat_interleave(group_size)
    adv = weight * (dr - lam)                                                        # sign(dr) |dr|^(1+gamma)  Eq. 20
    if after:
        adv = adv / (adv[valid].std(correction=0) + 1e-4)
    return adv.where(valid, 0).clamp(-clip, clip)


def dgpo_loss(dsm, dsm_ref, adv, group_size, beta):
    """Direct group preference loss: z_g = beta/G sum_i A_i (l_i - l_ref,i), L = mean_g -log sigmoid(-z_g).

    dsm, dsm_ref, adv: (B,), equal dtypes and devices, B a multiple of group_size, groups one after the other (else
    ValueError). Returns () float32, float64 for float64. Differentiable in dsm and dsm_ref: dL/dl_i, what each image
    weighs, beta/(P G) sigmoid(z_g) A_i, comes with the loss. Source: DGPO, Eq. 17.
    """
    check_same("dgpo_loss", dsm=dsm, dsm_ref=dsm_ref)
    check_same("dgpo_loss", dsm=dsm, adv=adv)
    if dsm.dim() != 1 or group_size < 1 or len(dsm) % group_size:
        raise ValueError(f"dgpo_loss: dsm {tuple(dsm.shape)} does not fill groups of group_size={group_size}.")
    if fused := compiled(dsm):
        return call(fused.dgpo_loss, dsm, dsm_ref, adv.detach(), group_size, beta)[0]
    return dgpo_loss_ref(dsm, dsm_ref, adv, group_size, beta)


def dgpo_loss_ref(dsm, dsm_ref, adv, group_size, beta):
    wide = torch.promote_types(dsm.dtype, torch.float32)
    z = adv.detach().to(wide) * (dsm.to(wide) - dsm_ref.to(wide))                    # (B,)
    z = beta / group_size * z.view(-1, group_size).sum(1)                            # (P,)
    return -torch.nn.functional.logsigmoid(-z).mean()


def check_same(op, dtypes=True, **tensors):
    """ValueError unless the two named tensors have one shape, one device and (dtypes) one dtype out of DTYPES."""
    (name_a, a), (name_b, b) = tensors.items()
    for what in ("shape", "dtype", "device") if dtypes else ("shape", "device"):
        x, y = getattr(a, what), getattr(b, what)
        if x != y:
            x, y = (tuple(x), tuple(y)) if what == "shape" else (x, y)
            raise ValueError(f"{op}: {name_a} and {name_b} must have the same {what}, not {x} and {y}.")
    if a.dtype not in DTYPES:
        raise ValueError(f"{op}: {name_a} and {name_b} are {a.dtype}, floating point is needed.")


# == Which one runs ==

def compiled(x):
    """The compiled ops for a tensor like x, or None: the twins. These do torch.func's transforms and forward mode."""
    if lib is not None and wanted and (x.is_cpu or x.is_cuda and "cuda" in devices):
        if compiling():
            return lib                                                   # torch.compile follows these
        if forward_ad._current_level < 0 and not transformed():
            return direct
    return None


def call(op, *args):
    """op(*args), past autograd where nothing asks for gradients: its share of a small call is two thirds."""
    if compiling() or torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def status():
    """One line for the first lines of a run: which implementation the ops above use."""
    if lib is not None and wanted:
        note = ""
        if torch.version.cuda and "cuda" not in devices:
            note = "; cuda tensors take the PyTorch twins: put nvcc on PATH, then python csrc/ops.py build"
        return f"fused ops: compiled ({', '.join(devices)}{note})"
    if problem and wanted:
        return f"fused ops: PyTorch twins (the cached library could not be loaded: {problem})"
    return "fused ops: PyTorch twins " + ("(build them with: python csrc/ops.py build)" if wanted else "(as asked)")


def use(fused):
    """False: the twins from now on. True: the compiled ops, where they are built."""
    global wanted
    wanted = bool(fused)


# == Building and loading ==

def sources():
    return sorted(p for p in HERE.iterdir() if p.suffix in (".cpp", ".cu", ".h", ".cuh"))


def library(kind):
    """Where the library lies in the cache. Its name holds all that it depends on, so a stale one is never loaded."""
    key = hashlib.sha256()
    for path in sources() + [Path(__file__)]:
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    cpu = torch.backends.cpu.get_cpu_capability()                        # a shared home may serve unlike machines
    for part in (torch.__version__, sysconfig.get_config_var("SOABI"), sys.platform, cpu):
        key.update(f"{part}\0".encode())
    return CACHE / f"t2i_{key.hexdigest()[:16]}_{kind}.so"


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def load():
    """Loads what is cached for these sources and this PyTorch, if anything is. True: the compiled ops are there."""
    global lib, direct, devices, problem
    for kind in ("cuda", "cpu") if torch.version.cuda else ("cpu",):
        path = library(kind)
        if lib is None and path.exists():
            try:
                torch.ops.load_library(str(path))
            except OSError as error:                                     # a C++ runtime older than the builder's, say
                problem = str(error)
                continue
            register(torch.ops.t2i)
            lib, devices = torch.ops.t2i, ("cpu", "cuda") if kind == "cuda" else ("cpu",)
            names = "prox_matching_loss", "cfg_combine", "linear_step", "group_advantage", "dgpo_loss"
            direct = SimpleNamespace(**{name: getattr(lib, name).default._op for name in names})
    return lib is not None


def build(verbose=False):
    """Compiles the ops for this machine into the cache, unless they are there, and loads them. Returns status().

    Needs a C++20 compiler (CXX, else c++), and for the CUDA kernels nvcc and a CUDA build of PyTorch.
    RuntimeError, with the compiler's own words, if that fails. One process compiles, others wait for it.
    """
    import fcntl
    nvcc = find_nvcc() if torch.version.cuda else None
    target = library("cuda" if nvcc else "cpu")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=CACHE) as tmp:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load()                                                           # built while we waited
        if not target.exists() or lib is None:                           # there, but of no use on this machine
            compile_into(Path(tmp), nvcc, verbose).replace(target)       # all at once: nobody loads half a library
    if lib is not None and nvcc and "cuda" not in devices:
        return status() + "; the cuda ops are built now and wait for the next start"
    load()
    return status()


def compile_into(tmp, nvcc, verbose):
    """Runs the compilers and links what they make to tmp/t2i.so."""
    from torch.utils.cpp_extension import include_paths, library_paths
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not cxx:
        raise RuntimeError("No C++ compiler found to build the fused ops: install one (Debian: apt install g++) "
                           "or set CXX. Without it everything runs on the PyTorch twins.")
    cpu = torch.backends.cpu.get_cpu_capability()
    simd = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
            "AVX2": ["-mavx2", "-mfma", "-mf16c"]}.get(cpu, [])
    host = ["-fPIC", "-fno-math-errno", "-ffp-contract=off", "-fno-trapping-math", *simd]
    host += ["-fopenmp"] if sys.platform == "linux" else []
    defines = [f"-DCPU_CAPABILITY={cpu}", f"-DCPU_CAPABILITY_{cpu}"] if simd else []
    includes = [f"-isystem={path}" if nvcc else f"-isystem{path}" for path in include_paths("cpu")]
    folders = [f"-L{path}" for path in library_paths("cpu")]
    if nvcc:                                                         # it finds CUDA's headers and libraries by itself
        check_version(nvcc)
        driver = [nvcc, "-ccbin", cxx]
        cpp = [*driver, "-std=c++20", "-O3", "-Xcompiler=" + ",".join(host), "-DWITH_CUDA", *defines, *includes]
        cu = [*driver, "-std=c++20", "-O3", "-Xcompiler=-fPIC", *cuda_targets()]
        link = [*driver, "-shared", "-cudart=shared", *folders, "-lc10", "-ltorch_cpu", "-lc10_cuda"]
    else:
        cpp = [cxx, "-std=c++20", "-O3", *host, *defines, *includes]
        link = [cxx, "-shared", *folders, "-lc10", "-ltorch_cpu"]

    # OpenMP is left to the loader, which finds the runtime that PyTorch brings: one pool of threads, one thread count.
    files = [path for path in sources() if path.suffix == ".cpp" or nvcc and path.suffix == ".cu"]
    objects = [str(tmp / f"{path.name}.o") for path in files]
    jobs = [[*(cpp if path.suffix == ".cpp" else cu), "-c", str(path), "-o", o] for path, o in zip(files, objects)]
    run(jobs, verbose)
    run([[link[0], *objects, *link[1:], "-o", str(tmp / "t2i.so")]], verbose)
    return tmp / "t2i.so"


def check_version(nvcc):
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = said.partition("release ")[2].partition(",")[0]
    if release.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        raise RuntimeError(f"PyTorch was built for CUDA {torch.version.cuda}, but {nvcc} is of {release or '?'}: put "
                           f"an nvcc of CUDA {torch.version.cuda.partition('.')[0]} on PATH to build the fused ops.")


def cuda_targets():
    """nvcc's flags: machine code for the GPUs here (sm_90 if there is none), and PTX that any other compiles itself."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())} or {(9, 0)}
    archs = [f"{major}{minor}" for major, minor in sorted(found)]
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + ["-gencode=arch=compute_75,code=compute_75"]


def run(jobs, verbose):
    """Runs commands, as many at a time as there are processors."""
    from concurrent.futures import ThreadPoolExecutor

    def start(job):
        if verbose:
            print(" ".join(job), flush=True)
        return subprocess.run(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(start, jobs))
    for job, done in zip(jobs, results):
        if done.returncode:
            raise RuntimeError(f"The fused ops could not be built, {Path(job[0]).name} said:\n{done.stdout[:4000]}\n"
                               f"The command was: {' '.join(job)}")


def register(ops):
    """Gives the compiled ops their shapes without data, for torch.compile, and their gradients, if not in C++."""
    def wide(x):
        return torch.promote_types(x.dtype, torch.float32)

    @torch.library.register_fake("t2i::prox_matching_loss")
    def _(pred, target, zeta):
        return pred.new_empty(pred.shape[:1], dtype=wide(pred)), pred.new_empty(pred.shape[:1], dtype=wide(pred))

    @torch.library.register_fake("t2i::prox_matching_loss_backward")
    def _(grad, pred, target, weight, zeta):
        return pred.new_empty(pred.shape)

    @torch.library.register_fake("t2i::cfg_combine")
    def _(uncond, cond, scale):
        check_same("cfg_combine", uncond=uncond, cond=cond)
        return uncond.new_empty(uncond.shape)

    @torch.library.register_fake("t2i::cfg_combine_backward")
    def _(grad, scale):
        return grad.new_empty(grad.shape), grad.new_empty(grad.shape)

    @torch.library.register_fake("t2i::group_advantage")
    def _(reward, group_size, by, gamma, recenter, after, clip):
        return reward.new_empty(reward.shape, dtype=wide(reward))

    @torch.library.register_fake("t2i::dgpo_loss")
    def _(dsm, dsm_ref, adv, group_size, beta):
        return dsm.new_empty((), dtype=wide(dsm)), dsm.new_empty(dsm.shape, dtype=wide(dsm))

    @torch.library.register_fake("t2i::linear_step")
    def _(x, cond, uncond, w, eps, x_next, a, b, scale, c, std, key, mean):
        scored = std > 0 and (eps is not None or x_next is not None or len(key) > 0)
        return (x.new_empty(x.shape if x_next is None or mean else (0,)),
                x.new_empty(x.shape[:1] if scored else (0,), dtype=wide(x)))

    @torch.library.register_fake("t2i::linear_step_backward")
    def _(g_out, g_logp, x, cond, uncond, w, x_next, a, b, scale, c, std, wanted):
        v = x if cond is None else cond
        return tuple(like.new_empty(x.shape if want else (0,)) for like, want in zip((x, v, v, x), wanted))

    def prox_setup(ctx, inputs, output):
        pred, target, ctx.zeta = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)                                 # no zeros, and no launch, for output[1]
        ctx.save_for_backward(pred, target, output[1])                   # output[1]: exp(-q), not rounded as 1 - loss

    def prox_backward(ctx, grad, _):
        if grad is None:
            return None, None, None
        grad = ops.prox_matching_loss_backward(grad, *ctx.saved_tensors, ctx.zeta)
        return (grad if ctx.needs_input_grad[0] else None), (-grad if ctx.needs_input_grad[1] else None), None

    def prox_second(ctx, grad):
        raise NotImplementedError("prox_matching_loss has no second derivative: take prox_matching_loss_ref for that.")

    def step_setup(ctx, inputs, output):
        x, cond, uncond, w, _, x_next, *ctx.coefficients = inputs[:11]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, cond, uncond, w, output[0] if x_next is None else x_next)

    def step_backward(ctx, g_out, g_logp):
        tensors, wanted = ctx.saved_tensors, [int(needed) for needed in ctx.needs_input_grad[:4]]
        g_out, g_logp = (g if g is not None and g.shape == like else None for g, like in
                         ((g_out, tensors[0].shape), (g_logp, tensors[0].shape[:1])))     # of empty outputs: nothing
        if g_out is None and g_logp is None:
            return (None,) * 13
        if torch.is_grad_enabled():                                      # create_graph: what autograd can follow
            grads = linear_gradients(g_out, g_logp, *tensors, *ctx.coefficients)
        else:
            grads = ops.linear_step_backward(g_out, g_logp, *tensors, *ctx.coefficients, wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted)), *[None] * 9

    def dgpo_setup(ctx, inputs, output):
        *tensors, ctx.group_size, ctx.beta = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    def dgpo_backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        dsm, dsm_ref, adv, weight = ctx.saved_tensors
        if torch.is_grad_enabled():                                      # create_graph
            a, l, l_ref = (t.to(weight.dtype) for t in (adv, dsm, dsm_ref))
            z = ctx.beta / ctx.group_size * (a * (l - l_ref)).view(-1, ctx.group_size).sum(1)
            weight = ctx.beta / max(len(l), 1) * z.sigmoid().repeat_interleave(ctx.group_size) * a
        grad = (grad * weight).to(dsm.dtype)
        needs_dsm, needs_ref, *_ = ctx.needs_input_grad
        return (grad if needs_dsm else None), (-grad if needs_ref else None), None, None, None

    torch.library.register_autograd("t2i::linear_step", step_backward, setup_context=step_setup)
    torch.library.register_autograd("t2i::dgpo_loss", dgpo_backward, setup_context=dgpo_setup)
    torch.library.register_autograd("t2i::prox_matching_loss", prox_backward, setup_context=prox_setup)
    torch.library.register_autograd("t2i::prox_matching_loss_backward", prox_second)


load()

if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["build"], ["build", "--verbose"]):
        print("usage: python csrc/ops.py [build [--verbose]]", file=sys.stderr)
        sys.exit(2)
    try:
        print(build(verbose="--verbose" in sys.argv) if sys.argv[1:] else status())
        sys.exit(bool(sys.argv[1:]) and lib is None)
    except RuntimeError as error:
        sys.exit(str(error))
