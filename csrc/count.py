"""Counts what a training step holds in a GPU's memory, and computes, without a GPU: full-size networks, no numbers.

    python csrc/count.py                # csrc/bench.py model's runs, also by diffusers and peft; count.py sd35m: one
    python csrc/count.py ours dgpo --model sd35m --gpu-memory 24 --groups 1        # any: the words are csrc/peer.py's

PyTorch's fake tensors have a shape and a dtype and no values. The script, autograd and the optimizer run on them as
they are; what the loop reads from a tensor is made up, and what needs values is left out. Every tensor's storage counts
from the op that makes it until it is freed, in the 512 bytes that CUDA's allocator rounds to; attention counts as
FlashAttention, or, where that cannot be, as the memory-efficient kernel. Not counted: CUDA's context, about half a GB;
the workspaces of cuDNN and cuBLAS; what the allocator loses between blocks; the reward's networks; text encoders, whose
features are cached before training starts. PFLOP: 1e15 operations of matrix products, attention and convolutions.
"""
import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import models  # noqa: E402
import rewards  # noqa: E402
from csrc import bench, peer  # noqa: E402


class Meter(TorchDispatchMode):
    """Counts the bytes that tensors' storages take, now and at most, and what matrix products and convolutions compute.

    peak and flops may be set back at any time.
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.flops = {}, 0, 0, 0      # sizes: storage -> bytes

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        formula = flop_registry.get(op.overloadpacket)
        self.flops += formula(*args, **kwargs, out_val=out) if formula else 0
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // 512) * 512
            self.add(self.sizes[key])
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def number(tensor):
    """What is read from a tensor, of which nothing is known: some number."""
    return tensor.dtype == torch.bool or (0.5 if tensor.dtype.is_floating_point else 1)


def listed(tensor):
    return [listed(part) for part in tensor] if tensor.dim() else number(tensor)


def apply(net, change, recurse=True):
    """nn.Module._apply, which .to and .float call, with new parameters: fake ones cannot be changed in place."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(change(p.detach()), requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return net


def patch():
    """Let fake tensors answer what a loop asks of numbers, and leave out what needs their values."""
    T, get, numpy = torch.Tensor, torch.Tensor.__getitem__, torch.Tensor.numpy

    def getitem(self, index):
        if not isinstance(self, FakeTensor):
            return get(self, index)
        if torch.is_tensor(index) and index.dtype == torch.bool:       # as many as there are
            return self
        parts = index if isinstance(index, tuple) else (index,)
        return get(self, tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    def to_numpy(self, *args, **settings):
        if not isinstance(self, FakeTensor):
            return numpy(self, *args, **settings)
        if self.device.type != "cpu":
            raise TypeError(f"numpy of a tensor on {self.device}")
        return np.ones(tuple(self.shape), str(self.dtype)[6:])
    for name, f in {"item": number, "tolist": listed, "numpy": to_numpy, "__getitem__": getitem,
                    "__bool__": lambda t: bool(number(t)), "__float__": lambda t: float(number(t)),
                    "__int__": lambda t: int(number(t)), "__index__": lambda t: int(number(t)),
                    "__format__": lambda t, spec: format(number(t), spec)}.items():
        setattr(T, name, f)
    torch.nn.Module._apply = apply
    models.save_file = lambda state, file, **settings: open(file, "wb").close()
    models.save = lambda state, metadata: b""
    data.masked, data.check_ratio = lambda name, reward: reward, lambda *args, **settings: None
    data.verdict = lambda *_: {"eval": .5, "eval_error": .1, "eval_gold": .5, "gold_error": .1, "tags": {}}
    data.advantage_stats = lambda *_: {"square": 1.0, "top_decile": .1, "prompt_std": [0.0] * 5}
    data.Scoring.terms, data.Run.save = lambda self: {}, lambda *_: None
    rewards.check = lambda *_: None
    rewards.load = lambda *_, **settings: lambda images, prompts, metas: images.mean((1, 2, 3))


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Scaled dot-product attention by the kernel that a GPU would take: a CPU's keep all of softmax's weights."""
    args, kernels = (query, key, value), torch.ops.aten
    if not torch.backends.cuda.flash_sdp_enabled():                    # models.fisher: second derivatives
        return kernels._scaled_dot_product_attention_math(*args, attn_mask, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is None and query.element_size() == 2 and query.shape[-1] <= 256:
        return kernels._scaled_dot_product_flash_attention(*args, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return kernels._scaled_dot_product_efficient_attention(*args, attn_mask, torch.is_grad_enabled(), dropout_p,
                                                           is_causal, scale=scale)[0]


def count(words):
    """{"held": GB between steps, "rollout": [GB at most, PFLOP], "update": [...]} of the last step of a run.

    words: csrc/peer.py's; rollouts have their decoding in them. Changes PyTorch and our modules for good.
    """
    meter, found, kept, away = Meter(), {}, {}, set()
    to, lap, log = torch.nn.Module.to, data.Run.lap, data.Run.log

    def moved(self, *where, **settings):                               # with --offload the VAE: .to("cpu") and back
        if isinstance(self, (models.VAE, peer.PeerVAE)) and (where == ("cpu",)) != (self in away):
            (away.remove if self in away else away.add)(self)
            meter.add(sum(-p.nbytes if self in away else p.nbytes for p in self.parameters()))
        return to(self, *where, **settings)

    def counted(self, name):                                           # the same part may end several times a step
        lap(self, name)
        peak, flops = found.get(name, (0, 0))
        found[name] = max(peak, meter.peak / 1e9), flops + meter.flops / 1e15
        found["held"], meter.peak, meter.flops = meter.now / 1e9, meter.now, 0

    def logged(self, row):
        log(self, row)
        kept.update(found)
        found.clear()
    patch()
    torch.nn.Module.to, data.Run.lap, data.Run.log = moved, counted, logged
    F.scaled_dot_product_attention = models.attend = attention
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),           # scores are made up, too
          FakeTensorMode(allow_non_fake_inputs=True), meter):
        peer.main([*words, "--no-fused", "--no-overlap"])
    return {name: kept[name] for name in ("held", "rollout", "update")}


COLUMNS = "script   model   plan GB   network  held GB  rollout  update  rollout PFLOP  update PFLOP   (of one step)"


def table(runs, extra=()):
    """Print `count` of each of csrc/bench.py's runs, extra flags added. Returns rows, dicts of the columns' names.

    A run that failed has an error; without diffusers and peft theirs are not made, and have none and no figures.
    """
    rows = []
    print(COLUMNS, flush=True)
    for script, name, gigabytes, peers in runs:
        for how in ("ours", *peers):
            row = dict(script=script, model=name, gigabytes=gigabytes, network=how)
            figures = f"{'-':>9}{'-':>9}{'-':>8}{'-':>15}{'-':>14}"
            if how == "ours" or all(map(importlib.util.find_spec, ("diffusers", "peft"))):
                with tempfile.TemporaryDirectory() as folder:
                    done = bench.start("count.py", script, name, gigabytes, how, extra, folder)
                if done.returncode:
                    row["error"] = done.stderr.strip()[-300:] or f"exit code {done.returncode}"
                    figures = f"  failed: {row['error']}"
                else:
                    row |= json.loads(done.stdout.splitlines()[-1])
                    (first, flops), (second, more) = row["rollout"], row["update"]
                    figures = f"{row['held']:>9.1f}{first:>9.1f}{second:>8.1f}{flops:>15.2f}{more:>14.2f}"
            print(f"{script:9}{pathlib.Path(name).name:7}{gigabytes:>8}{how:>10}{figures}", flush=True)
            rows.append(row)
    return rows


SHORT = "--init random --steps 2 --eval-every 0 --eval-images 1 --val-images 1 --cfg-also 0 --eval-steps 1".split()


def main(argv):
    if {"-h", "--help"} & set(argv):
        sys.exit(print(__doc__))
    if len(argv) > 1 and argv[0] in ("ours", *bench.PEERS):
        first = 2 + (len(argv) > 2 and not argv[2].startswith("-"))    # proxt2i's stage
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(count([*argv[:first], *SHORT, "--out", out, *argv[first:]])))
        return 0
    names = {run[1] for run in bench.MODEL_RUNS}
    if set(argv) - names:
        sys.exit(f"{' '.join(argv)}: {', '.join(sorted(names))}, or a run, as ours dgpo --model sd35m: "
                 f"{', '.join(('ours', *bench.PEERS))} first")
    return any("error" in row for row in table([run for run in bench.MODEL_RUNS if not argv or run[1] in argv]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
