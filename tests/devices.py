"""Run a script on tensors that only claim to be on a GPU: what mixes devices fails as it would there. No GPU needed.

    python tests/devices.py grpo --no-fused --no-overlap --steps 1 --groups 2 --group-size 2 --eval-images 4

PyTorch's fake tensors have a shape, a dtype and a device, and no numbers. The run's networks are loaded on the CPU and
then turned into fake ones on "cuda:0"; numbers that the loop asks for are made up, a backward pass only gives every
parameter a gradient of zeros. So this sees where tensors are and what shapes they have, and nothing else: no values, no
kernels, no streams, no memory, which csrc/count.py counts. Needs a C++ compiler and a CPU build of PyTorch.
"""
import contextlib
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.cpp_extension import include_paths, library_paths

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import models  # noqa: E402
from csrc import count  # noqa: E402

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);"""
mode, nets = FakeTensorMode(allow_non_fake_inputs=True), []


def load_guard():
    """Tell a CPU build of PyTorch that switching to a CUDA device is fine, and does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = (os.path.join(folder, f"guard.{end}") for end in ("cpp", "so"))
        pathlib.Path(source).write_text(GUARD)
        subprocess.run([os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-shared", source, "-o", library,
                        *(f"-isystem{path}" for path in include_paths("cpu")),
                        *(f"-L{path}" for path in library_paths("cpu")), "-lc10"], check=True)
        torch.ops.load_library(library)


def fake(tensor):
    """A tensor like this one that claims to be on the GPU."""
    like = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, like, torch.device("cuda", 0))


def backward(tensor, *_):
    if tensor.device.type != "cuda" or not tensor.requires_grad:
        raise AssertionError(f"backward of a tensor on {tensor.device}, requires_grad {tensor.requires_grad}")
    for p in (p for net in nets for p in net.parameters()):
        p.grad = torch.zeros_like(p) if p.requires_grad else None


def patch():
    """Let a loop run on fake tensors that claim to be on a GPU."""
    tensor, load = torch.tensor, models.load
    count.patch()

    def loaded(model, weights=None, dtype=torch.float32, device="cpu", init=None, text_length=None):
        with _disable_current_modes():
            pipe = load(model, weights, dtype, "cpu", init, text_length)
        for part in (pipe.net, pipe.vae, *pipe.encoders):
            if part is not None:
                nets.append(count.apply(part, fake))
        return pipe

    def zeros(_, inputs, *args, **settings):
        return tuple(torch.zeros_like(x) for x in ([inputs] if torch.is_tensor(inputs) else inputs))
    torch.Tensor.backward = backward
    torch.Tensor.new_tensor = lambda t, x, **to: torch.tensor(x, **{"dtype": t.dtype, "device": t.device, **to})
    for name, value in {"is_available": True, "device_count": 1, "set_device": None, "is_bf16_supported": True,
                        "max_memory_allocated": 0, "mem_get_info": (0, 2 ** 37),
                        "current_stream": types.SimpleNamespace(synchronize=lambda: None)}.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.stream = contextlib.nullcontext
    torch.tensor = lambda x, *args, device=None, **settings: tensor(x, *args, **settings).to(device or "cpu")
    torch.autograd.grad, models.load = zeros, loaded


if __name__ == "__main__":
    load_guard()
    patch()
    with mode:
        importlib.import_module(sys.argv[1]).main(sys.argv[2:])
