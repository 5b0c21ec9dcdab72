"""Run a script on tensors that claim to be on a GPU: what mixes devices fails as it would there. No GPU needed.

    python tests/devices.py grpo --no-fused --steps 1 --groups 2 --group-size 2 --eval-images 4
    torchrun --nproc_per_node 2 tests/devices.py dgpo --no-fused --fsdp --steps 1

Each such tensor holds one of the CPU's, which computes; so the numbers are right, and the run learns. An op of tensors
of two devices is refused, and so is a collective of a CPU's tensors, which NCCL does not know. At the end it says how
often the CPU waited for what a GPU would have had to finish first. Not seen: kernels, streams, memory, which
csrc/count.py counts. Needs a C++ compiler and a CPU build of PyTorch.
"""
import contextlib
import ctypes
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

HOOKS = """#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstdlib>
using namespace c10;
static DeviceIndex here() { const char* rank = getenv("LOCAL_RANK"); return rank ? atoi(rank) : 0; }
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 8; }
  Device getDevice() const override { return Device(DeviceType::CUDA, here()); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 8; }
  DeviceIndex getCurrentDevice() const override { return here(); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
"""


def build(library):
    """Compile what tells a CPU build of PyTorch, before it is imported, that GPUs are there and always ready."""
    root = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    source = pathlib.Path(library).with_suffix(".cpp")
    source.write_text(HOOKS)
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-shared", source, "-o", library,
                    f"-isystem{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"],
                   check=True)


with tempfile.TemporaryDirectory() as folder:                         # T2I_DEVICES: where it is kept for other runs
    library = pathlib.Path(os.environ.get("T2I_DEVICES", f"{folder}/hooks.so"))
    if not library.exists():
        build(library)
    ctypes.CDLL(str(library))

import torch  # noqa: E402
import torch.distributed.fsdp._fully_shard._fsdp_param as sharded  # noqa: E402
from torch.utils._mode_utils import no_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

aten, dist = torch.ops.aten, torch.distributed
HERE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIED = {aten.copy_.default, aten._to_copy.default}
READ = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
waits = 0                                                              # for the GPU


class OnGPU(torch.Tensor):
    """A tensor of the CPU, `held`, that claims to be on the GPU."""

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(),
                                                   dtype=held.dtype, device=HERE)
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})

    def __repr__(self):
        return f"OnGPU({self.held})"


class GPU(TorchDispatchMode):
    """Sees every op, those that make a tensor on the GPU, too. A DTensor's parts come by once more."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        return compute(op, args, kwargs or {})


def tensors(values):
    """Those among the values, and in lists of them."""
    return [t for value in values for t in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(t, torch.Tensor)]


def compute(op, args, kwargs):
    """An op on what the tensors hold; its results claim to be where a GPU's would be."""
    global waits
    leaves = tensors((*args, *kwargs.values()))
    ours, others = [t for t in leaves if isinstance(t, OnGPU)], [t for t in leaves if not isinstance(t, OnGPU)]
    result = bool(ours)
    if op in INDEXED or op is aten.copy_.default:                      # where the tensor is that is read or written
        result = isinstance(args[0], OnGPU)
    elif kwargs.get("device") is not None:
        result, kwargs = torch.device(kwargs["device"]).type == "cuda", {**kwargs, "device": torch.device("cpu")}
    mixed = ours and any(t.dim() for t in others) and op not in COPIED                     # a number may be anywhere
    if mixed and not (op in INDEXED and result) or (op in INDEXED and ours and not result):
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found two devices: "
                           f"{[(str(t.device), tuple(t.shape)) for t in leaves]}")
    if op.namespace == "c10d" and others:
        raise RuntimeError(f"{op}: no backend for a tensor on the CPU")
    masked = op in INDEXED and any(t.dtype == torch.bool for t in tensors(args[1]))
    crosses = op in COPIED and result != isinstance(leaves[-1], OnGPU) and not kwargs.get("non_blocking")
    waits += bool(op in READ and ours or masked and result or mixed or crosses)
    if op is aten._fused_sdp_choice.default and ours:
        return 0                                                       # attention in plain ops
    if not (ours or result):
        return op(*args, **kwargs)
    if torch.Tag.inplace_view in op.tags and ours:                     # the claim's shape changes, too
        with no_dispatch():
            torch._C._set_meta_in_tls_dispatch_include(True)
            op(*args, **kwargs)
            torch._C._set_meta_in_tls_dispatch_include(False)
    known = {id(t.held): t for t in ours}                              # in place: the same tensor comes back
    args, kwargs = tree_map(lambda t: t.held if isinstance(t, OnGPU) else t, (args, kwargs))

    def claim(t):
        return t if not (result and isinstance(t, torch.Tensor)) else known[id(t)] if id(t) in known else OnGPU(t)
    return tree_map(claim, op(*args, **kwargs))


class Still:
    """A stream, an event: whatever is asked of it is done, and gives another."""

    def __init__(self, *args, **settings):
        pass

    def __getattr__(self, name):
        return lambda *args, **settings: Still()

    def query(self):
        return True


def patch():
    """Let Python's side of PyTorch believe it, too."""
    T, (tensor, tolist, lstm, apply, run, init) = torch.Tensor, (
        torch.tensor, torch.Tensor.tolist, torch._VF.lstm, torch.nn.Module._apply, threading.Thread.run,
        dist.init_process_group)

    def index(t, i):                                                   # as C++ would: a list's tensor, on t's device
        return tuple(torch.tensor(list(part), dtype=None if len(part) else torch.long).to(t.device)
                     if isinstance(part, (list, range)) else part for part in (i if isinstance(i, tuple) else (i,)))

    def on_gpu(f, convert):
        return lambda t, *args: f(t, *(convert(t, args) if isinstance(t, OnGPU) else args))
    T.__getitem__ = on_gpu(T.__getitem__, lambda t, args: (index(t, args[0]),))
    T.__setitem__ = on_gpu(T.__setitem__, lambda t, args: (index(t, args[0]), args[1]))
    T.tolist = lambda t: tolist(t.detach().cpu() if isinstance(t, OnGPU) else t)
    T.pin_memory = lambda t, *_: t
    T.new_tensor = lambda t, x, **to: torch.tensor(x, **{"dtype": t.dtype, "device": t.device, **to})

    def made(x, *args, device=None, pin_memory=False, **settings):
        if device is None or torch.device(device).type != "cuda":
            return tensor(x, *args, device=device, **settings)
        return tensor(x, *args, **settings).to(device)

    def applied(net, change, recurse=True):                            # a parameter of another class is a new one
        if not isinstance(change(torch.zeros(1)), OnGPU) and not any(isinstance(p, OnGPU) for p in net.parameters()):
            return apply(net, change, recurse)
        for module in net.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(change(p.detach()), requires_grad=p.requires_grad)
            module._buffers.update({name: change(b) for name, b in module._buffers.items() if b is not None})
        return net

    def in_mode(thread):
        with GPU():
            run(thread)

    def one_lstm(x, *args):                                            # a CPU's kernel asks where its weights are
        if not isinstance(x, OnGPU):
            return lstm(x, *args)
        x, *args = tree_map(lambda t: t.held if isinstance(t, OnGPU) else t, (x, *args))
        return tree_map(OnGPU, lstm(x, *args))
    torch.tensor, torch._VF.lstm, torch.nn.Module._apply, threading.Thread.run = made, one_lstm, applied, in_mode
    for name, value in {"is_available": True, "device_count": 8, "set_device": None, "is_bf16_supported": True,
                        "max_memory_allocated": 0, "mem_get_info": (0, 2 ** 37), "_lazy_init": None,
                        "current_device": HERE.index, "get_device_capability": (9, 0), "synchronize": None,
                        "empty_cache": None, "current_stream": Still(), "default_stream": Still()}.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.stream = lambda *_: contextlib.nullcontext()
    torch.cuda.Stream = torch.cuda.Event = torch.Stream = torch.Event = Still
    torch.backends.cudnn.is_acceptable = lambda _: False
    dist.init_process_group = lambda backend, timeout, device_id=None: init("gloo", timeout=timeout)
    for name in ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "barrier"):
        setattr(dist, name, _disable_current_modes()(getattr(dist, name)))                 # they see to it
    sharded.free_storage = sharded.alloc_storage = lambda _: None


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    patch()
    with GPU():
        importlib.import_module(sys.argv[1]).main(sys.argv[2:])
    print(f"the CPU waited for the GPU {waits} times", file=sys.stderr)
