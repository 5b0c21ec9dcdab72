"""Three fused operations, each beside the plain PyTorch twin that says what it computes.

    prox_matching_loss   1 - exp(-|pred - target|^2 / (d zeta^2))        for each sample; ProxT2I, Eq. (8)
    cfg_combine          uncond + scale * (cond - uncond)                classifier-free guidance
    group_advantage      (r - mean_g r) / (std + 1e-4)                   group-relative advantages

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

import torch

HERE = Path(__file__).resolve().parent
NAMES = ("prox_matching_loss", "cfg_combine", "group_advantage")
STD = ("group", "batch", "none")                                         # their place is the kernels' mode
CACHE = Path(os.environ.get("T2I_OPS_CACHE") or os.path.expanduser("~/.cache/t2i_ops"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

lib = None                                                               # torch.ops.t2i once a library is loaded
devices = ()                                                             # the device types that it was built for
problem = ""                                                             # why a cached library could not be loaded
wanted = True                                                            # False: the twins, whatever is built


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
    if compiled(pred):
        return lib.prox_matching_loss(pred, target, zeta)[0]
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
    check_same("cfg_combine", uncond=uncond, cond=cond)
    if compiled(uncond):
        return lib.cfg_combine(uncond, cond, scale)
    return cfg_combine_ref(uncond, cond, scale)


def cfg_combine_ref(uncond, cond, scale):
    wide = torch.promote_types(uncond.dtype, torch.float32)
    u, c = uncond.to(wide), cond.to(wide)
    return (u + scale * (c - u)).to(uncond.dtype)


def group_advantage(reward, group_size, std="group"):
    """Group-relative advantages, (r - mean) / (std + 1e-4), for groups that lie one after the other.

    reward: (B,), B a multiple of group_size >= 2. NaN marks a failed sample: it is left out of every mean and std and
    gets advantage 0. std: the population std to divide by, "group": that of the sample's group [Flow-GRPO, Eq. 4],
    "batch": that of all rewards [its released code], "none": no division. Anything else raises ValueError.
    Returns (B,) float32, float64 for float64; a constant group gives exactly 0. A constant for autograd: no gradient.
    """
    if reward.dim() != 1 or reward.dtype not in DTYPES:
        raise ValueError(f"group_advantage: reward is {reward.dtype} {tuple(reward.shape)}, it takes floats (B,).")
    if group_size < 2:
        raise ValueError(f"group_advantage: group_size={group_size}, samples are compared in groups of 2 or more.")
    if len(reward) % group_size:
        raise ValueError(f"group_advantage: {len(reward)} rewards do not fill groups of group_size={group_size}.")
    if std not in STD:
        raise ValueError(f"group_advantage: std={std!r}, it takes one of {', '.join(STD)}.")
    if compiled(reward):
        return lib.group_advantage(reward.detach(), group_size, STD.index(std))
    return group_advantage_ref(reward, group_size, std)


def group_advantage_ref(reward, group_size, std="group"):
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
    return adv.flatten().where(~r.isnan(), 0)                            # a group of nothing but NaN: 0 / 0 so far


def check_same(op, **tensors):
    """ValueError unless the two named tensors have one shape, one device and one dtype out of DTYPES."""
    (name_a, a), (name_b, b) = tensors.items()
    for what in ("shape", "dtype", "device"):
        x, y = getattr(a, what), getattr(b, what)
        if x != y:
            x, y = (tuple(x), tuple(y)) if what == "shape" else (x, y)
            raise ValueError(f"{op}: {name_a} and {name_b} must have the same {what}, not {x} and {y}.")
    if a.dtype not in DTYPES:
        raise ValueError(f"{op}: {name_a} and {name_b} are {a.dtype}, floating point is needed.")


# == Which one runs ==

def compiled(x):
    """Whether the compiled op takes a tensor like x."""
    return lib is not None and wanted and x.device.type in devices


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
    global lib, devices, problem
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
        if not target.exists():
            compile_into(Path(tmp), nvcc, verbose).replace(target)       # all at once: nobody loads half a library
    if lib is not None and nvcc and "cuda" not in devices:
        return status() + "; the cuda ops are built now and wait for the next start"
    load()
    return status()


def compile_into(tmp, nvcc, verbose):
    """Runs the compilers, two at a time, and links what they make to tmp/t2i.so."""
    from torch.utils.cpp_extension import include_paths, library_paths
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not cxx:
        raise RuntimeError("No C++ compiler found to build the fused ops: install one (Debian: apt install g++) "
                           "or set CXX. Without it everything runs on the PyTorch twins.")
    cpu = torch.backends.cpu.get_cpu_capability()
    simd = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
            "AVX2": ["-mavx2", "-mfma", "-mf16c"]}.get(cpu, [])
    host = ["-fPIC", "-fno-math-errno", "-fno-trapping-math", *simd] + (["-fopenmp"] if sys.platform == "linux" else [])
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
    for i in range(0, len(jobs), 2):
        run(jobs[i:i + 2], verbose)
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
    running = []
    for job in jobs:
        if verbose:
            print(" ".join(job), flush=True)
        running.append((job, subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)))
    done = [(job, process.communicate()[0], process.returncode) for job, process in running]
    for job, output, code in done:
        if code:
            raise RuntimeError(f"The fused ops could not be built, {Path(job[0]).name} said:\n{output[:4000]}\n"
                               f"The command was: {' '.join(job)}")


def register(ops):
    """Gives the compiled ops their shapes without data (for torch.compile) and their gradients."""
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
        return uncond.new_empty(uncond.shape)

    @torch.library.register_fake("t2i::cfg_combine_backward")
    def _(grad, scale):
        return grad.new_empty(grad.shape), grad.new_empty(grad.shape)

    @torch.library.register_fake("t2i::group_advantage")
    def _(reward, group_size, mode):
        return reward.new_empty(reward.shape, dtype=wide(reward))

    def prox_setup(ctx, inputs, output):
        pred, target, ctx.zeta = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(pred, target, output[1])                   # output[1]: exp(-q), not rounded as 1 - loss

    def prox_backward(ctx, grad, _):
        grad = ops.prox_matching_loss_backward(grad, *ctx.saved_tensors, ctx.zeta)
        return (grad if ctx.needs_input_grad[0] else None), (-grad if ctx.needs_input_grad[1] else None), None

    def prox_second(ctx, grad):
        raise NotImplementedError("prox_matching_loss has no second derivative: take prox_matching_loss_ref for that.")

    def cfg_setup(ctx, inputs, output):
        ctx.scale = inputs[-1]

    def cfg_backward(ctx, grad):
        needs_uncond, needs_cond = ctx.needs_input_grad[:2]
        if needs_uncond and needs_cond:
            return *ops.cfg_combine_backward(grad, ctx.scale), None
        return (grad * (1 - ctx.scale) if needs_uncond else None), (grad * ctx.scale if needs_cond else None), None

    def cfg_second(ctx, grad_uncond, grad_cond):                         # the transpose of the split is the combination
        return ops.cfg_combine(grad_uncond, grad_cond, ctx.scale), None

    torch.library.register_autograd("t2i::prox_matching_loss", prox_backward, setup_context=prox_setup)
    torch.library.register_autograd("t2i::prox_matching_loss_backward", prox_second)
    torch.library.register_autograd("t2i::cfg_combine", cfg_backward, setup_context=cfg_setup)
    torch.library.register_autograd("t2i::cfg_combine_backward", cfg_second, setup_context=cfg_setup)


load()

if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["build"], ["build", "--verbose"]):
        sys.exit("usage: python csrc/ops.py [build [--verbose]]")
    try:
        print(build(verbose="--verbose" in sys.argv) if sys.argv[1:] else status())
    except RuntimeError as error:
        sys.exit(str(error))
