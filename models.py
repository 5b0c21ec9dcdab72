"""Networks, text encoders, tokenizers, weights, LoRA and schedules: what an RL paper would not print.

Each network is a chapter that can be copied out alone. Its parameters are named as in the public checkpoints, so a file
loads strictly, with no renaming table. Every chapter is tested against the public library that it can be mistaken for.

    Weights      from_pretrained, save_pretrained: the diffusers / transformers directory layout
    Layers       what several networks are made of
    MMDiT        the transformer of SD3 and SD3.5 (joint attention; dual attention and qk norm where the config says so)
    Flux         the transformer of FLUX.1: joint and single blocks, rotary positions
    UNet         the network of Stable Diffusion 1.4 and 1.5
    UViT         the transformer with long skips of U-ViT and ProxT2I, conditioned on t and, there, on lambda
    VAE          the autoencoder of all three
    CLIPText     the CLIP text encoder
    T5Encoder    the T5 v1.1 encoder
    Tokenizers   CLIP's and T5's
    Originals    from_single_file: the files that the authors of SD3 and FLUX published, in their own names
    Pipeline     load: a directory or a name -> networks, text features, decoding
    Schedules    the list of times of a sampler
    LoRA         add_lora, save_lora, load_lora; other weights for a moment: using
    Pretraining  python models.py pretrain: how the tiny model under tests/tiny was made

Times t are flow times in [0, 1], 1 = noise, but for the DDPM steps n of UNet. Shapes: B batch, C, H, W latent, L text
tokens, N image tokens, D width.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------------------ weights

def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError, each naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so its directory is no complete checkpoint: download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, a {type(content).__name__} and not an object: download it again")
    return content


def weight_files(directory):
    """The safetensors files of one network, shards included. Raises FileNotFoundError naming what is absent."""
    directory = Path(directory)
    for name in ("diffusion_pytorch_model", "model"):                # diffusers' name, transformers' name
        for variant in ("", ".fp16"):
            index = directory / f"{name}.safetensors.index{variant}.json"
            if index.is_file():
                names = read_json(index).get("weight_map")
                if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
                    raise ValueError(f"{index} is damaged, it names no file: download it again")
                files = [directory / file for file in sorted(set(names.values()))]
                for file in files:
                    if not file.is_file():
                        raise FileNotFoundError(f"{file} is missing, and {index.name} names it: download it again")
                return files
            file = directory / f"{name}{variant}.safetensors"
            if file.is_file():
                return [file]
    there = sorted(f.name for f in directory.glob("*.safetensors*") if f.is_file() and f.suffix != ".new")   # not half
    if there:
        raise FileNotFoundError(f"{directory} holds {there[0]}; what is read is diffusion_pytorch_model.safetensors, "
                                f"model.safetensors, either as .fp16, or shards with their index: download one, or "
                                f"rename a file that is the whole network")
    for file in sorted(directory.glob("*pytorch_model*.bin")):        # shards included
        refuse_pickle(file)
    raise FileNotFoundError(f"{directory} holds no *.safetensors weights: download or train the model first")


def refuse_pickle(file):
    """Raises ValueError for a file that only torch.load could read, and would run code from."""
    if Path(file).suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise ValueError(f"{file} is a pickle, which can run any code when it is read: a safetensors file is expected. "
                         f"Download that, or let diffusers or transformers write one: save_pretrained does")


@contextlib.contextmanager
def open_tensors(file):
    """A memory-mapped safetensors file. Raises OSError where it cannot be read, ValueError if damaged or a pickle."""
    refuse_pickle(file)
    with open(file, "rb"):                                            # for safe_open, a forbidden file is a missing one
        pass
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): download it again") from None


def read_tensors(files, want, rename=lambda key: key, ignore=(), prefixes=(), optional=()):
    """Yield (name, tensor) from memory-mapped safetensors files: exactly the names and shapes of the dict `want`.

    rename maps a file's other keys, old names of the same tensors, to a name; keys that end in one of `ignore` are
    skipped. A file that has one of `prefixes` holds other networks too: only keys that begin so are read. Names in
    `optional` may be missing. Raises OSError, or ValueError naming the damaged file or the first tensor that is
    unexpected, in two files, wrongly shaped, quantised or missing.
    """
    missing, found = dict.fromkeys(name for name in want if name not in optional), {}
    for file in files:
        with open_tensors(file) as tensors:
            keys = list(tensors.keys())
        prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in keys)), "")
        for key in keys:
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            name = name if name in want else rename(name)
            if name not in want and key.endswith(tuple(ignore)):
                continue
            if name not in want:
                raise ValueError(f"{file}: unexpected tensor {key}: the file belongs to another architecture")
            if found.setdefault(key, file) != file:
                raise ValueError(f"{file}: {key} is in {found[key]}, too: download the directory again")
            with open_tensors(file) as tensors:                       # closed again, it gives its pages back: one copy
                tensor = tensors.get_tensor(key)
            if tensor.shape != want[name].shape:
                raise ValueError(f"{file}: {key} is {tuple(tensor.shape)}, the network's {name} is "
                                 f"{tuple(want[name].shape)}: the file belongs to another configuration")
            if not tensor.is_floating_point():
                raise ValueError(f"{file}: {key} is {tensor.dtype}, not floating point: quantised files are not read")
            missing.pop(name, None)
            yield name, tensor
    if missing:
        cause = "the file is incomplete or belongs to another architecture"
        if all("guidance" in name for name in missing):
            cause = "it is FLUX.1-schnell's: guidance_embeds is false in transformer/config.json of its directory"
        raise ValueError(f"{files[0]}: tensor {next(iter(missing))} is missing, {len(missing)} in all: {cause}")


def skeleton(cls, directory):
    """The network of a directory's config.json, shapes without memory. Raises OSError or ValueError naming the file."""
    config = read_json(Path(directory) / "config.json")
    name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if name is not None and name not in cls.public_names:
        raise ValueError(f"{directory}/config.json describes a {name}, not a {' or '.join(cls.public_names)}: is it "
                         f"another part of the pipeline?")
    try:
        with torch.device("meta"):
            return cls(**config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{directory}/config.json: no network can be made of it: {error}") from None


def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
    """Read config.json and *.safetensors (one file, or shards with an index) from a directory, strictly.

    Returns the network in eval mode, without gradients. Raises OSError or ValueError naming file and tensor.
    """
    net = skeleton(cls, directory)
    tensors = read_tensors(weight_files(directory), net.state_dict(), cls.rename, cls.ignore)
    net.load_state_dict({name: tensor.to(device, copy=True).to(dtype) for name, tensor in tensors}, assign=True)
    return net.eval().requires_grad_(False)


def save_pretrained(net, directory, dtype=None):
    """Write config.json and the weights so that `from_pretrained`, diffusers and transformers read them.

    Raises ValueError for a network with a LoRA, which these files have no place for, and for a full disk.
    """
    import data
    if lora_layers(net):
        raise ValueError(f"{directory}: the network has a LoRA, which save_pretrained would lose: call save_lora")
    directory, state = Path(directory), {}
    first = not (torch.distributed.is_initialized() and torch.distributed.get_rank())
    for key, tensor in net.state_dict().items():                      # shards are gathered, one tensor at a time, by
        tensor = tensor.full_tensor() if is_sharded([tensor]) else tensor                # all, and kept by one process
        if first:
            state[key] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    if not first:
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / f"{net.file_name}.safetensors", state)
    data.write_atomic(directory / "config.json", (json.dumps(net.config, indent=2) + "\n").encode())
    for old in (f"{net.file_name}.safetensors.index.json", f"{net.file_name}-?????-of-?????.safetensors"):
        for file in directory.glob(old):                              # shards that were here would be read first
            file.unlink()


def write_tensors(path, state, end="new", metadata=None):
    """Write a safetensors file, so that a kill leaves the old one or the new one; ValueError for a full disk, say.

    end: of the name until it is whole, another for each writer where there are several at once. metadata: {str: str}.
    """
    new = Path(f"{path}.{end}")
    try:
        save_file(state, new, metadata=metadata or {"format": "pt"})
        with open(new, "rb") as f:
            os.fsync(f.fileno())                                      # whole even if the power fails
        os.replace(new, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None
    finally:
        new.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- layers

def sinusoid(t, dim, max_period=10000.0):
    """Sinusoidal features of a scalar, cosines first. t (B,) in the unit of the checkpoint -> (B, dim) float32."""
    frequency = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * frequency                                               # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: the small network in front of a scalar or pooled condition."""

    def __init__(self, dim_in, dim):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class Modulation(nn.Module):
    """SiLU and one Linear: the condition's shifts, scales and gates, `parts` of them, each (B, 1, D)."""

    def __init__(self, dim, parts):
        super().__init__()
        self.parts, self.linear = parts, nn.Linear(dim, parts * dim)

    def forward(self, condition):
        return self.linear(F.silu(condition))[:, None].chunk(self.parts, dim=2)


def modulate(x, shift, scale):
    """LayerNorm without weights, then scale and shift. x (B, N, D); shift, scale (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear; net.0.proj and net.2 are the public names."""

    def __init__(self, dim):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, 4 * dim)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, each (B, heads, N, d).

    By PyTorch's fused kernel, but for bf16 on a CPU, where its backward takes seven times the plain one's. Without
    gradients, too: an old policy or a reference that rounds otherwise would be another one.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with its weight in the input's dtype, so that the fused kernel also serves under autocast."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotate(x, rope):
    """Rotary positions: turn each pair (x_2i, x_2i+1) by its angle. x (B, heads, N, d); rope (2, N, d/2), cos and sin.

    In the dtype of these, float32 at least, then back to x's. Source: Su et al., arXiv:2104.09864, Eq. 34.
    """
    cos, sin = rope                                                                      # (N, d/2) each
    a, b = x.to(rope.dtype).unflatten(-1, (-1, 2)).unbind(-1)                            # (B, heads, N, d/2) each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Attention over image tokens, joined by text tokens where context is given (each stream has its own projections).

    joint: the text stream takes part; context_out: its result goes on (not in the last block). rope: the cosines and
    sines of the image tokens' angles, for `rotate` (FLUX); text stays at position zero.
    """

    def __init__(self, dim, heads, qk_norm, joint, context_out):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        if context_out:
            self.to_add_out = nn.Linear(dim, dim)
        norm = (lambda: RMSNorm(dim // heads, eps=1e-6)) if qk_norm else nn.Identity
        self.norm_q, self.norm_k = norm(), norm()
        if joint:
            self.norm_added_q, self.norm_added_k = norm(), norm()

    def forward(self, x, context=None, rope=None):
        def split(y):
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)                      # (B, heads, N, D/heads)
        q, k, v = self.norm_q(split(self.to_q(x))), self.norm_k(split(self.to_k(x))), split(self.to_v(x))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if context is not None:
            q = torch.cat([q, self.norm_added_q(split(self.add_q_proj(context)))], dim=2)      # (B, heads, N + L, .)
            k = torch.cat([k, self.norm_added_k(split(self.add_k_proj(context)))], dim=2)
            v = torch.cat([v, split(self.add_v_proj(context))], dim=2)
        y = attend(q, k, v).transpose(1, 2).flatten(2)                                   # (B, N [+ L], D)
        if context is None:
            return self.to_out[0](y)
        n = x.shape[1]
        return self.to_out[0](y[:, :n]), self.to_add_out(y[:, n:]) if hasattr(self, "to_add_out") else None


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions behind GroupNorm and SiLU, and a shortcut. dim_time: width of the time condition, or 0."""

    def __init__(self, dim_in, dim, dim_time, groups, eps):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, dim_in, eps), nn.Conv2d(dim_in, dim, 3, padding=1)
        if dim_time:
            self.time_emb_proj = nn.Linear(dim_time, dim)
        self.norm2, self.conv2 = nn.GroupNorm(groups, dim, eps), nn.Conv2d(dim, dim, 3, padding=1)
        if dim_in != dim:
            self.conv_shortcut = nn.Conv2d(dim_in, dim, 1)

    def forward(self, x, condition=None):
        y = self.conv1(F.silu(self.norm1(x)))                                            # (B, dim, H, W)
        if condition is not None:
            y = y + self.time_emb_proj(F.silu(condition))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class Resample(nn.Module):
    """`conv` under its public name: stride 2 to halve a map, or, behind nearest-neighbour enlarging, to double it."""

    def __init__(self, dim, stride, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=padding)

    def forward(self, x, size=None):
        return self.conv(x if size is None else F.interpolate(x, size=size, mode="nearest"))


def checkpointed(net, block, *args):
    """block(*args); where net.checkpointing is set and gradients are on, its inside is computed again in backward."""
    if net.checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


# -------------------------------------------------------------------------------------------------------------- MMDiT

def sincos_table(dim, size, base):
    """Fixed 2-D sine-cosine positions (size*size, dim), column part first, spaced base/size apart.

    Computed in float64, kept in PyTorch's default dtype, as a network's other weights.
    """
    place = torch.arange(size, dtype=torch.float64) * (base / size)
    angle = place[:, None] * 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).to(torch.get_default_dtype())    # (size, dim/2), before copies
    column, row = axis[None].expand(size, -1, -1), axis[:, None].expand(-1, size, -1)
    return torch.cat([column, row], dim=-1).view(size * size, dim)


class PatchEmbed(nn.Module):
    """Cut an image into patches and add the centre crop of a fixed position table."""

    def __init__(self, channels, dim, patch, max_size, base):
        super().__init__()
        self.patch, self.max_size = patch, max_size
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.register_buffer("pos_embed", sincos_table(dim, max_size, base)[None])       # (1, max_size^2, D)

    def forward(self, x):
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        if max(h, w) > self.max_size:
            raise ValueError(f"{h} x {w} patches do not fit the position table of {self.max_size} x {self.max_size}")
        top, left = (self.max_size - h) // 2, (self.max_size - w) // 2
        table = self.pos_embed.view(self.max_size, self.max_size, -1)[top:top + h, left:left + w]
        x = self.proj(x).flatten(2).transpose(1, 2).contiguous()      # sums keep the layout, through all blocks
        return x + table.reshape(1, h * w, -1).to(x.dtype)                                # (B, N, D)


class MMDiTBlock(nn.Module):
    """One block of SD3: image and text modulated apart, attending together.

    dual: a second, image-only attention beside the joint one (SD3.5-M's first blocks).
    last: the text stream ends here; it gives keys and values and is dropped.
    """

    def __init__(self, dim, heads, qk_norm, dual, last):
        super().__init__()
        self.dual, self.last = dual, last
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = Attention(dim, heads, qk_norm, joint=True, context_out=not last)
        if dual:
            self.attn2 = Attention(dim, heads, qk_norm, joint=False, context_out=False)
        self.ff = FeedForward(dim)
        if not last:
            self.ff_context = FeedForward(dim)

    def forward(self, x, context, condition):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(condition)
        if self.last:
            scale_c, shift_c = self.norm1_context(condition)         # this order: diffusers' continuous AdaLN
        else:
            shift_c, scale_c, gate_c, shift_mlp_c, scale_mlp_c, gate_mlp_c = self.norm1_context(condition)
        y, y_c = self.attn(modulate(x, shift, scale), modulate(context, shift_c, scale_c))
        if self.dual:
            shift2, scale2, gate2 = second
            y2 = self.attn2(modulate(x, shift2, scale2))             # on the block's own input, as y
            x = x + gate * y + gate2 * y2
        else:
            x = x + gate * y
        x = x + gate_mlp * self.ff(modulate(x, shift_mlp, scale_mlp))
        if not self.last:
            context = context + gate_c * y_c
            context = context + gate_mlp_c * self.ff_context(modulate(context, shift_mlp_c, scale_mlp_c))
        return x, context


class MMDiT(nn.Module):
    """The transformer of Stable Diffusion 3, 3.5 Medium (dual attention, qk norm) and 3.5 Large.

    forward(x (B, C, H, W), t (B,) in [0, 1], context (B, L, D_text), pooled (B, P)) -> velocity (B, C, H, W).
    Raises ValueError where H or W is no multiple of the patch.
    Source: Esser et al., arXiv:2403.03206; equal to diffusers' SD3Transformer2DModel, whose config this takes.
    """
    public_names, file_name = ("SD3Transformer2DModel",), "diffusion_pytorch_model"
    from_pretrained, save_pretrained = classmethod(from_pretrained), save_pretrained
    rename, ignore, lora_prefix = str, (), "transformer."             # files have the network's own names
    blocks = (MMDiTBlock,)                                            # what is compiled, and gathered, as a whole
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",                # image stream, and the
                    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")     # text: Flow-GRPO's

    def __init__(self, sample_size=128, patch_size=2, in_channels=16, num_layers=18, attention_head_dim=64,
                 num_attention_heads=18, joint_attention_dim=4096, caption_projection_dim=1152,
                 pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=96, dual_attention_layers=(),
                 qk_norm=None, **_):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if caption_projection_dim != dim:
            raise ValueError(f"caption_projection_dim={caption_projection_dim} must equal num_attention_heads * "
                             f"attention_head_dim = {dim}: both streams share one attention")
        out_channels, dual_attention_layers = out_channels or in_channels, dual_attention_layers or ()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={qk_norm!r} is not implemented: null or 'rms_norm'")
        self.config = dict(_class_name="SD3Transformer2DModel", sample_size=sample_size, patch_size=patch_size,
                           in_channels=in_channels, num_layers=num_layers, attention_head_dim=attention_head_dim,
                           num_attention_heads=num_attention_heads, joint_attention_dim=joint_attention_dim,
                           caption_projection_dim=caption_projection_dim, pooled_projection_dim=pooled_projection_dim,
                           out_channels=out_channels, pos_embed_max_size=pos_embed_max_size,
                           dual_attention_layers=list(dual_attention_layers), qk_norm=qk_norm)
        self.patch, self.channels, self.checkpointing = patch_size, in_channels, False
        self.out_channels = out_channels
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size, pos_embed_max_size, sample_size // patch_size)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": Embedder(256, dim),
                                              "text_embedder": Embedder(pooled_projection_dim, dim)})
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            MMDiTBlock(dim, num_attention_heads, qk_norm, i in dual_attention_layers, i == num_layers - 1)
            for i in range(num_layers))
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size ** 2 * out_channels)

    def forward(self, x, t, context, pooled):
        p = self.patch
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"{x.shape[2]} x {x.shape[3]} is no multiple of {p}, the side of a patch")
        h, w = x.shape[2] // p, x.shape[3] // p
        embed = self.time_text_embed
        condition = embed["timestep_embedder"](sinusoid(t * 1000, 256).to(x.dtype)) + embed["text_embedder"](pooled)
        context = self.context_embedder(context)                                         # (B, L, D)
        x = self.pos_embed(x)                                                            # (B, N, D)
        for block in self.transformer_blocks:
            x, context = checkpointed(self, block, x, context, condition)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(modulate(x, shift, scale))                                     # (B, N, p*p*C)
        x = x.view(-1, h, w, p, p, self.out_channels)                                    # channel last
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, h * p, w * p)

    def init_weights(self):
        """Weights to train from: Xavier, modulation and output at zero, so that each block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
        nn.init.zeros_(patches.bias)
        for linear in [module.linear for module in self.modules() if isinstance(module, Modulation)] + [self.proj_out]:
            nn.init.zeros_(linear.weight)
        return self


# --------------------------------------------------------------------------------------------------------------- Flux

class FluxBlock(nn.Module):
    """A double block: image and text modulated apart, with weights of their own, attending together."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = Attention(dim, heads, "rms_norm", joint=True, context_out=True)
        self.ff, self.ff_context = FeedForward(dim), FeedForward(dim)

    def forward(self, x, context, condition, rope):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(condition)
        shift_c, scale_c, gate_c, shift_mlp_c, scale_mlp_c, gate_mlp_c = self.norm1_context(condition)
        y, y_c = self.attn(modulate(x, shift, scale), modulate(context, shift_c, scale_c), rope)
        x, context = x + gate * y, context + gate_c * y_c
        x = x + gate_mlp * self.ff(modulate(x, shift_mlp, scale_mlp))
        return x, context + gate_mlp_c * self.ff_context(modulate(context, shift_mlp_c, scale_mlp_c))


class FluxSingleBlock(nn.Module):
    """A single block: one stream of image and text tokens, attention and feed-forward side by side."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm = heads, Modulation(dim, 3)
        self.attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("to_q", "to_k", "to_v")})
        self.attn.update({name: RMSNorm(dim // heads, eps=1e-6) for name in ("norm_q", "norm_k")})
        self.proj_mlp, self.proj_out = nn.Linear(dim, 4 * dim), nn.Linear(5 * dim, dim)

    def forward(self, x, condition, rope):
        shift, scale, gate = self.norm(condition)
        y = modulate(x, shift, scale)                                                    # (B, N + L, D)
        q, k, v = (self.attn[name](y).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for name in ("to_q", "to_k", "to_v"))                                 # (B, heads, N + L, D/heads)
        q, k = rotate(self.attn["norm_q"](q), rope), rotate(self.attn["norm_k"](k), rope)
        both = [attend(q, k, v).transpose(1, 2).flatten(2), F.gelu(self.proj_mlp(y), approximate="tanh")]
        return x + gate * self.proj_out(torch.cat(both, dim=2))


class Flux(nn.Module):
    """FLUX.1: double blocks as in SD3, then single blocks on the joined stream, with rotary positions.

    forward(x (B, 16, H, W), t (B,) in [0, 1], context (B, L, D_text), pooled (B, P), guidance (B,) or None) -> velocity
    (B, 16, H, W). guidance is the scale that the -dev checkpoint was distilled for, 3.5 say; -schnell takes None.
    Raises ValueError for the other one's guidance, or where H or W is odd.
    Source: Black Forest Labs' flux (2024); equal to diffusers' FluxTransformer2DModel, whose config this takes.
    """
    public_names, file_name = ("FluxTransformer2DModel",), "diffusion_pytorch_model"
    from_pretrained, save_pretrained = classmethod(from_pretrained), save_pretrained
    rename, ignore, lora_prefix = str, (), "transformer."
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",        # image stream, and single blocks
                    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",        # text stream
                    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    blocks = (FluxBlock, FluxSingleBlock)
    patch = 2                                                         # packed outside of diffusers' class, inside ours

    def __init__(self, patch_size=1, in_channels=64, out_channels=None, num_layers=19, num_single_layers=38,
                 attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
                 guidance_embeds=False, axes_dims_rope=(16, 56, 56), **_):
        super().__init__()
        good_axes = sum(axes_dims_rope) == attention_head_dim and [d % 2 for d in axes_dims_rope] == [0, 0, 0]
        if patch_size != 1 or out_channels not in (None, in_channels) or not good_axes:
            raise ValueError(f"patch_size={patch_size}, out_channels={out_channels}, axes_dims_rope={axes_dims_rope}: "
                             f"only 1, in_channels, three even axes that fill a head of {attention_head_dim} are known")
        dim = num_attention_heads * attention_head_dim
        self.config = dict(_class_name="FluxTransformer2DModel", patch_size=patch_size, in_channels=in_channels,
                           out_channels=out_channels, num_layers=num_layers, num_single_layers=num_single_layers,
                           attention_head_dim=attention_head_dim, num_attention_heads=num_attention_heads,
                           joint_attention_dim=joint_attention_dim, pooled_projection_dim=pooled_projection_dim,
                           guidance_embeds=guidance_embeds, axes_dims_rope=list(axes_dims_rope))
        self.axes, self.channels, self.checkpointing = axes_dims_rope, in_channels // 4, False
        self.x_embedder, self.context_embedder = nn.Linear(in_channels, dim), nn.Linear(joint_attention_dim, dim)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": Embedder(256, dim),
                                              "text_embedder": Embedder(pooled_projection_dim, dim)})
        if guidance_embeds:
            self.time_text_embed["guidance_embedder"] = Embedder(256, dim)
        self.transformer_blocks = nn.ModuleList(FluxBlock(dim, num_attention_heads) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleBlock(dim, num_attention_heads) for _ in range(num_single_layers))
        self.norm_out, self.proj_out = Modulation(dim, 2), nn.Linear(dim, in_channels)

    def angles(self, h, w, length, device):
        """Rotary angles (h * w + length, d/2) float64: of (0, row, column) for image tokens, 0 for text tokens."""
        grid = torch.zeros(h, w, 3, dtype=torch.float64, device=device)
        grid[..., 1] = torch.arange(h, device=device)[:, None]
        grid[..., 2] = torch.arange(w, device=device)
        place = F.pad(grid.view(h * w, 3), (0, 0, 0, length))                            # (N + L, 3)
        frequency = [10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d) for d in self.axes]
        return torch.cat([place[:, i:i + 1] * f for i, f in enumerate(frequency)], dim=1)

    def forward(self, x, t, context, pooled, guidance=None):
        embed, p = self.time_text_embed, self.patch
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"{x.shape[2]} x {x.shape[3]} is no multiple of {p}, the side of a patch")
        if (guidance is not None) != ("guidance_embedder" in embed):
            takes = "was distilled for a guidance scale: give one, (B,), usually 3.5"
            raise ValueError(f"this FLUX checkpoint {takes if guidance is None else 'takes no guidance, as -schnell'}")
        condition = embed["timestep_embedder"](sinusoid(t * 1000, 256).to(x.dtype)) + embed["text_embedder"](pooled)
        if guidance is not None:
            condition = condition + embed["guidance_embedder"](sinusoid(guidance * 1000, 256).to(x.dtype))
        c, h, w = self.channels, x.shape[2] // 2, x.shape[3] // 2
        x = x.view(-1, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, h * w, c * 4)      # channel first
        x, context = self.x_embedder(x), self.context_embedder(context)                  # (B, N, D), (B, L, D)
        n, angle = h * w, self.angles(h, w, context.shape[1], x.device)
        rope = torch.stack([angle.cos(), angle.sin()]).to(torch.promote_types(x.dtype, torch.float32))   # (2, N + L, .)
        for block in self.transformer_blocks:
            x, context = checkpointed(self, block, x, context, condition, rope[:, :n])
        x = torch.cat([x, context], dim=1)                                               # (B, N + L, D)
        for block in self.single_transformer_blocks:
            x = checkpointed(self, block, x, condition, rope)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(modulate(x[:, :n], shift, scale))                              # (B, N, 4 C)
        return x.view(-1, h, w, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, h * 2, w * 2)


# --------------------------------------------------------------------------------------------------------------- UNet

class CrossAttention(nn.Module):
    """Attention of image tokens to `context`, or to themselves."""

    def __init__(self, dim, dim_context, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention_head_dim={heads}, the number of heads, does not divide a width of {dim}")
        self.heads, self.to_q = heads, nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(dim_context, dim, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)                      # (B, heads, N or L, D/heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """GEGLU: Linear to twice 4 D, one half times the exact GELU of the other, Linear."""

    def __init__(self, dim):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, 8 * dim)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        value, gate = self.net[0].proj(x).chunk(2, dim=2)
        return self.net[2](value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self attention, attention to the text, feed-forward, each behind a LayerNorm and with a residual."""

    def __init__(self, dim, dim_context, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2 = CrossAttention(dim, dim, heads), CrossAttention(dim, dim_context, heads)
        self.ff = GatedFeedForward(dim)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block on the pixels of a map, between 1 x 1 convolutions."""

    def __init__(self, dim, dim_context, heads, groups):
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(groups, dim, 1e-6), nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, dim_context, heads)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x, context):
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()           # (B, H W, D)
        y = self.transformer_blocks[0](y, context)
        return x + self.proj_out(y.transpose(1, 2).view_as(x))


class UNetStage(nn.Module):
    """One resolution of the UNet: residual blocks, each with a transformer behind it where `dim_context` is given.

    dims_in: the input widths of the residual blocks; resample: "downsamplers", "upsamplers" or None.
    """

    def __init__(self, dims_in, dim, dim_time, dim_context, heads, groups, eps, resample):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(dim_in, dim, dim_time, groups, eps) for dim_in in dims_in)
        if dim_context:
            self.attentions = nn.ModuleList(SpatialTransformer(dim, dim_context, heads, groups) for _ in dims_in)
        if resample:
            self.add_module(resample, nn.ModuleList([Resample(dim, stride=2 if resample == "downsamplers" else 1)]))

    def layer(self, i, x, condition, context):
        """Residual block i and its transformer."""
        x = self.resnets[i](x, condition)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class UNet(nn.Module):
    """The UNet of Stable Diffusion 1.4 and 1.5.

    forward(x (B, 4, H, W), n (B,) DDPM step 0..999, context (B, L, D_text)) -> eps (B, 4, H, W).
    Source: Rombach et al., arXiv:2112.10752; equal to diffusers' UNet2DConditionModel, whose config this takes.
    """
    public_names, file_name = ("UNet2DConditionModel",), "diffusion_pytorch_model"
    from_pretrained, save_pretrained = classmethod(from_pretrained), save_pretrained
    rename, ignore, lora_prefix = str, (), "unet."
    blocks = (ResBlock, SpatialTransformer)
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",                      # self attention
                    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")                     # to the text
    defaults = dict(sample_size=None, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
                    layers_per_block=2, cross_attention_dim=1280, attention_head_dim=8, norm_num_groups=32,
                    norm_eps=1e-5, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    fixed = dict(center_input_sample=False, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, act_fn="silu",
                 mid_block_type="UNetMidBlock2DCrossAttn", mid_block_scale_factor=1, only_cross_attention=False,
                 dual_cross_attention=False, use_linear_projection=False, class_embed_type=None, num_class_embeds=None,
                 addition_embed_type=None, encoder_hid_dim=None, encoder_hid_dim_type=None, num_attention_heads=None,
                 transformer_layers_per_block=1, resnet_time_scale_shift="default", resnet_skip_time_act=False,
                 resnet_out_scale_factor=1.0, time_embedding_type="positional", time_embedding_dim=None,
                 timestep_post_act=None, time_cond_proj_dim=None, conv_in_kernel=3, conv_out_kernel=3, dropout=0.0,
                 attention_type="default", cross_attention_norm=None, time_embedding_act_fn=None,
                 class_embeddings_concat=False)

    def __init__(self, **config):
        super().__init__()
        for name, value in self.fixed.items():                        # SD2, SDXL and others differ in these
            if config.get(name, value) != value:
                raise ValueError(f"{name}={config[name]!r} is not implemented: only {value!r}, Stable Diffusion 1's")
        self.config = c = {"_class_name": "UNet2DConditionModel",
                           **{name: config.get(name, value) for name, value in self.defaults.items()}}
        widths, heads, text = c["block_out_channels"], c["attention_head_dim"], c["cross_attention_dim"]
        if not all(isinstance(value, int) for value in (heads, text, c["layers_per_block"])):
            raise ValueError(f"attention_head_dim={heads}, cross_attention_dim={text}, layers_per_block="
                             f"{c['layers_per_block']}: only one number for all resolutions is implemented")
        for name, kinds in (("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
                            ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D"))):
            if not set(c[name]) <= set(kinds) or len(c[name]) != len(widths):
                raise ValueError(f"{name}={c[name]}: one of {kinds} for each of {len(widths)} resolutions")
        time, layers, last = widths[0] * 4, c["layers_per_block"], len(widths) - 1
        common = dict(heads=heads, groups=c["norm_num_groups"], eps=c["norm_eps"])
        self.width, self.patch, self.channels, self.checkpointing = widths[0], 1, c["in_channels"], False
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = Embedder(widths[0], time)
        self.down_blocks, self.up_blocks, skips = nn.ModuleList(), nn.ModuleList(), [widths[0]]
        for i, (dim, kind) in enumerate(zip(widths, c["down_block_types"])):
            self.down_blocks.append(UNetStage([skips[-1]] + [dim] * (layers - 1), dim, time, text * (kind[0] == "C"),
                                              resample="downsamplers" if i < last else None, **common))
            skips += [dim] * (layers + (i < last))
        self.mid_block = UNetStage([widths[-1]] * 2, widths[-1], time, 0, resample=None, **common)
        self.mid_block.attentions = nn.ModuleList(
            [SpatialTransformer(widths[-1], text, heads, c["norm_num_groups"])])
        before = widths[-1]
        for i, (dim, kind) in enumerate(zip(reversed(widths), c["up_block_types"])):
            dims_in = [(before if j == 0 else dim) + skips.pop() for j in range(layers + 1)]
            self.up_blocks.append(UNetStage(dims_in, dim, time, text * (kind[0] == "C"),
                                            resample="upsamplers" if i < last else None, **common))
            before = dim
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)

    def forward(self, x, n, context):
        condition = self.time_embedding(sinusoid(n, self.width).to(x.dtype))             # (B, 4 D)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down_blocks:
            for i in range(len(stage.resnets)):
                x = checkpointed(self, stage.layer, i, x, condition, context)
                skips.append(x)
            if hasattr(stage, "downsamplers"):
                x = stage.downsamplers[0](x)
                skips.append(x)
        mid = self.mid_block
        x = mid.attentions[0](mid.resnets[0](x, condition), context)
        x = mid.resnets[1](x, condition)
        for stage in self.up_blocks:
            for i in range(len(stage.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)
                x = checkpointed(self, stage.layer, i, x, condition, context)
            if hasattr(stage, "upsamplers"):
                x = stage.upsamplers[0](x, size=skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# --------------------------------------------------------------------------------------------------------------- UViT

class UViTBlock(nn.Module):
    """A pre-norm transformer block. skip: it first takes in an earlier block's output, by one Linear on both."""

    def __init__(self, dim, heads, hidden, skip):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=False), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x, skip=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))                            # (B, N, 2 D) -> (B, N, D)
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))          # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                                   # (B, heads, N, D/heads) each
        x = x + self.attn["proj"](attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class UViT(nn.Module):
    """U-ViT, a transformer with the long skips of a U-Net: all conditions are tokens. ProxT2I's network.

    forward(x (B, C, H, W), t (B,) in [0, 1], lam (B,) > 0 or None, context (B, L, D_text)) -> (B, C, H, W).
    lam is the strength of the proximal operator; None, and only None, for a network without it (a score model). L is
    the config's num_clip_token; predict, noise or v, says what the answer is (proxt2i.py, Eqs. 3 and 9), scheme and
    candidates, of a network with lambda, what steps it was trained for. Raises ValueError where lam, L, D_text, H or W
    do not fit the network.
    Source: Bao et al., arXiv:2209.12152; parameters are named as in the public MS-COCO files, whose small model the
    defaults are. No library has this class: config.json is our own, its options are the authors', and lam.
    """
    public_names, file_name = ("UViT",), "diffusion_pytorch_model"
    from_pretrained, save_pretrained = classmethod(from_pretrained), save_pretrained
    rename, ignore, lora_prefix = str, (), ""
    blocks = (UViTBlock,)
    lora_targets = ("attn.qkv", "attn.proj")
    fixed = dict(qkv_bias=False, qk_scale=None, conv=True, skip=True, use_checkpoint=False)

    def __init__(self, img_size=32, in_chans=4, patch_size=2, embed_dim=512, depth=12, num_heads=8, mlp_ratio=4,
                 clip_dim=768, num_clip_token=77, lam=False, mlp_time_embed=False, predict="noise", scheme="",
                 candidates="", **other):
        super().__init__()
        for name, value in other.items():
            if not name.startswith("_") and (name not in self.fixed or value != self.fixed[name]):
                raise ValueError(f"{name}={value!r} is not implemented: of the other options only {self.fixed}")
        if depth % 2 or embed_dim % (2 * num_heads) or img_size % patch_size:
            raise ValueError(f"depth={depth}, embed_dim={embed_dim}, img_size={img_size}: they must be multiples of 2 "
                             f"(the middle block is not counted), 2 * num_heads={2 * num_heads}, patch_size="
                             f"{patch_size}")
        self.config = dict(_class_name="UViT", img_size=img_size, in_chans=in_chans, patch_size=patch_size,
                           embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
                           clip_dim=clip_dim, num_clip_token=num_clip_token, lam=lam, mlp_time_embed=mlp_time_embed,
                           predict=predict) | ({"scheme": scheme, "candidates": candidates} if scheme else {})
        dim, self.patch, self.channels, self.checkpointing = embed_dim, patch_size, in_chans, False
        self.side = img_size // patch_size                            # patches along an edge of the position table

        def block(skip=False):
            return UViTBlock(dim, num_heads, int(dim * mlp_ratio), skip)

        def mlp():
            return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)})
        self.time_embed = mlp() if mlp_time_embed else nn.Identity()
        self.context_embed = nn.Linear(clip_dim, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_clip_token + self.side ** 2, dim))
        if lam:                                                       # keys of its own, so the public ones stay
            self.lambda_embed, self.lambda_pos = mlp(), nn.Parameter(torch.zeros(1, 1, dim))
        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch_size ** 2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1)

    def positions(self, h, w):
        """Positions of the time, text and h x w image tokens, (1, 1 + L + h w, D).

        At the config's size they are pos_embed itself. At any other (ProxT2I's stage at 512 px, or an image that is
        not square) the image part is interpolated, bicubic: the table keeps its size and is trained through it.
        """
        if h == w == self.side:
            return self.pos_embed
        first, table = self.pos_embed.split([self.pos_embed.shape[1] - self.side ** 2, self.side ** 2], dim=1)
        wide = torch.promote_types(table.dtype, torch.float32)
        table = table.transpose(1, 2).unflatten(2, (self.side, self.side)).to(wide)      # (1, D, side, side)
        table = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False).to(first.dtype)
        return torch.cat([first, table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x, t, lam, context):
        p, dim, tokens = self.patch, self.config["embed_dim"], (self.config["num_clip_token"], self.config["clip_dim"])
        if (lam is not None) != self.config["lam"]:
            raise ValueError("this U-ViT is " + ("conditioned on lambda: give lam, (B,)" if lam is None else
                                                 "not conditioned on lambda: give lam=None, or make it with lam=True"))
        if context.shape[1:] != tokens:
            raise ValueError(f"the text is {tuple(context.shape[1:])} (tokens, features), the network's positions and "
                             f"weights are for {tokens}: pad or cut it, or load the text encoders that belong to it")
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"{x.shape[2]} x {x.shape[3]} is no multiple of {p}, the side of a patch")
        h, w = x.shape[2] // p, x.shape[3] // p
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)                       # (B, h w, D)
        time = self.time_embed(sinusoid(t.float() * 1000, dim).to(x.dtype))[:, None]     # (B, 1, D)
        x = torch.cat([time, self.context_embed(context), x], dim=1) + self.positions(h, w)
        if lam is not None:
            # What moves the prox is lambda's ratio, not its difference, and lambda is 1e-3 to 38: hence the logarithm,
            # -7 to 3.6 (0 stands for 1e-12). Times 10, the fastest wave turns once per factor 1.9 in lambda: smooth
            # between the few values of a training grid, while one percent of lambda is still a tenth of a radian.
            lam = self.lambda_embed(sinusoid(10 * lam.float().clamp(min=1e-12).log(), dim).to(x.dtype))[:, None]
            x = torch.cat([lam + self.lambda_pos, x], dim=1)                             # (B, [1 +] 1 + L + h w, D)
        skips = []
        for block in self.in_blocks:
            x = checkpointed(self, block, x)
            skips.append(x)
        x = checkpointed(self, self.mid_block, x)
        for block in self.out_blocks:
            x = checkpointed(self, block, x, skips.pop())                                # the latest first
        x = self.decoder_pred(self.norm(x[:, -h * w:]))                                  # (B, h w, p*p*C)
        x = x.view(-1, h, w, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)              # channel last
        return self.final_layer(x.reshape(-1, self.channels, h * p, w * p))

    def init_weights(self):
        """Weights to train from, the authors': N(0, 0.02) cut at +-2, convolutions as PyTorch makes them.

        The lambda token starts like all others: behind its first LayerNorm it is as large as the time token, so the
        output depends on lambda from the first step.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
        for table in [self.pos_embed] + ([self.lambda_pos] if self.config["lam"] else []):
            nn.init.trunc_normal_(table, std=0.02)
        return self

    @classmethod
    def from_public(cls, file, config, dtype=torch.float32, device="cpu"):
        """A network of the authors' mscoco_uvit_small.pth or mscoco_uvit_small_deep.pth, strictly.

        config: the options of the class, which such a file does not state, UVITS["small"] say. Only tensors are
        unpickled, so the file cannot run code. To start a network with lambda from it: UViT(**config, lam=True)
        .init_weights().load_state_dict(public.state_dict(), strict=False), which leaves the lambda keys as they are.
        Returns the network in eval mode, without gradients. Raises ValueError or FileNotFoundError naming the file.
        """
        if config.get("lam"):
            raise ValueError(f"{file}: the public files have no lambda: give lam=False, and read UViT.from_public")
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is missing: download it first")
        with torch.device("meta"):                                    # shapes without memory
            net = cls(**config)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise ValueError(f"{file} is damaged, or holds more than tensors, which could run any code when it is "
                             f"read: download it again from its authors") from None
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise ValueError(f"{file} is no plain table of tensors, as the public files are")
        ours, theirs = ({key: tuple(tensor.shape) for key, tensor in s.items()} for s in (net.state_dict(), state))
        wrong = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if wrong:
            raise ValueError(f"{file}: {wrong[0]} is {theirs.get(wrong[0], 'missing')} there and "
                             f"{ours.get(wrong[0], 'missing')} in the network, {len(wrong)} such tensors in all: the "
                             f"file belongs to another configuration")
        net.load_state_dict({key: tensor.to(device, copy=True).to(dtype) for key, tensor in state.items()}, assign=True)
        return net.eval().requires_grad_(False)


UVITS = {                             # 1,653,508, 44,692,644, 58,345,636 and 515,311,568 parameters
    "tiny": dict(img_size=28, in_chans=3, patch_size=4, embed_dim=128, depth=6, num_heads=4, clip_dim=128,
                 num_clip_token=16, lam=True),                        # pixels of the tiny world
    "small": dict(),                                                  # the public MS-COCO files
    "small-deep": dict(depth=16),
    # ProxT2I at 256 px: SD3.5's latents, MetaCLIP's 77 tokens and T5's 77, padded to the width of T5-XXL. The paper
    # says about 500 million parameters, hence U-ViT-H/2's sizes, but neither which T5 nor the lengths of the texts.
    "uvit": dict(in_chans=16, embed_dim=1152, depth=28, num_heads=16, clip_dim=4096, num_clip_token=154, lam=True)}


# ---------------------------------------------------------------------------------------------------------------- VAE

class PixelAttention(nn.Module):
    """Self attention of a map's pixels, one head, with a residual."""

    def __init__(self, dim, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)                                # (B, H W, D)
        y = attend(*(linear(y)[:, None] for linear in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out[0](y).transpose(1, 2).view_as(x)


class VAEStage(nn.Module):
    """One resolution of the autoencoder: residual blocks, then halving or doubling; with attention, its middle."""

    def __init__(self, dims_in, dim, groups, resample=None, attention=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(dim_in, dim, 0, groups, 1e-6) for dim_in in dims_in)
        if attention:
            self.attentions = nn.ModuleList([PixelAttention(dim, groups)])
        if resample == "downsamplers":
            self.downsamplers = nn.ModuleList([Resample(dim, stride=2, padding=0)])
        if resample == "upsamplers":
            self.upsamplers = nn.ModuleList([Resample(dim, stride=1)])

    def forward(self, x):
        x = self.resnets[0](x)
        for i, block in enumerate(self.resnets[1:]):
            x = block(self.attentions[i](x) if hasattr(self, "attentions") else x)
        if hasattr(self, "downsamplers"):
            return self.downsamplers[0](F.pad(x, (0, 1, 0, 1)))                          # right and bottom only
        if hasattr(self, "upsamplers"):
            return self.upsamplers[0](x, size=(x.shape[2] * 2, x.shape[3] * 2))
        return x


class VAE(nn.Module):
    """The autoencoder of SD1, SD3.5 and FLUX: images in [0, 1] to and from scaled latents, 8 times smaller.

    encode(images (B, 3, H, W), generator=None) -> latents (B, C, H/8, W/8): a draw from the posterior, or without a
    generator its mean. decode(latents) -> images. At most `slice_size` at once, of more than 512 px in proportion less.
    Source: Rombach et al., arXiv:2112.10752; equal to diffusers' AutoencoderKL, whose config this takes.
    """
    public_names, file_name, ignore = ("AutoencoderKL",), "diffusion_pytorch_model", ()
    from_pretrained, save_pretrained = classmethod(from_pretrained), save_pretrained
    old_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}         # SD1's public files
    slice_size = 8

    def __init__(self, in_channels=3, out_channels=3, block_out_channels=(64,), layers_per_block=1, latent_channels=4,
                 norm_num_groups=32, sample_size=32, scaling_factor=0.18215, shift_factor=None, use_quant_conv=True,
                 use_post_quant_conv=True, act_fn="silu", mid_block_add_attention=True, latents_mean=None,
                 latents_std=None, **_):
        super().__init__()
        if act_fn != "silu" or not mid_block_add_attention or latents_mean is not None or latents_std is not None:
            raise ValueError(f"act_fn={act_fn!r}, mid_block_add_attention={mid_block_add_attention}, latents_mean="
                             f"{latents_mean}, latents_std={latents_std}: only 'silu', True, None, None is implemented")
        if not isinstance(scaling_factor, (int, float)) or not scaling_factor:
            raise ValueError(f"scaling_factor={scaling_factor!r}: latents are multiplied by a number other than 0")
        widths, layers, groups, count = block_out_channels, layers_per_block, norm_num_groups, len(block_out_channels)
        self.config = dict(_class_name="AutoencoderKL", in_channels=in_channels, out_channels=out_channels,
                           block_out_channels=list(widths), layers_per_block=layers, latent_channels=latent_channels,
                           norm_num_groups=groups, sample_size=sample_size, scaling_factor=scaling_factor,
                           shift_factor=shift_factor, use_quant_conv=use_quant_conv,
                           use_post_quant_conv=use_post_quant_conv,
                           down_block_types=["DownEncoderBlock2D"] * count, up_block_types=["UpDecoderBlock2D"] * count)
        self.scale, self.shift, self.factor = scaling_factor, shift_factor or 0.0, 2 ** (count - 1)
        down, up = ["downsamplers"] * (count - 1) + [None], ["upsamplers"] * (count - 1) + [None]
        encoder, decoder = self.encoder, self.decoder = nn.Module(), nn.Module()
        encoder.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        encoder.down_blocks = nn.ModuleList(
            VAEStage([before] + [dim] * (layers - 1), dim, groups, resample)
            for before, dim, resample in zip((widths[0], *widths), widths, down))
        decoder.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        decoder.up_blocks = nn.ModuleList(                            # in running order: the smallest map first
            VAEStage([before] + [dim] * layers, dim, groups, resample)
            for before, dim, resample in zip((widths[-1], *widths[::-1]), widths[::-1], up))
        for part, last, channels in ((encoder, widths[-1], 2 * latent_channels), (decoder, widths[0], out_channels)):
            part.mid_block = VAEStage([widths[-1]] * 2, widths[-1], groups, attention=True)
            part.conv_norm_out = nn.GroupNorm(groups, last, 1e-6)
            part.conv_out = nn.Conv2d(last, channels, 3, padding=1)
        if use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        if use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @classmethod
    def rename(cls, key):
        stem, _, end = key.rpartition(".")
        stem, _, layer = stem.rpartition(".")
        return f"{stem}.{cls.old_names.get(layer, layer)}.{end}"

    def slices(self, x, pixels):
        """x in the VAE's dtype, in parts that take the memory of slice_size images of 512 px; pixels: of one image."""
        count = min(self.slice_size, self.slice_size * 512 ** 2 // pixels)
        return x.to(self.encoder.conv_in.weight.dtype).split(max(1, count))

    def encode(self, images, generator=None):
        part, outputs = self.encoder, []
        for x in self.slices(images * 2 - 1, images.shape[2:].numel()):
            x = part.conv_in(x)
            for stage in part.down_blocks:
                x = stage(x)
            x = part.conv_out(F.silu(part.conv_norm_out(part.mid_block(x))))             # (b, 2 C, H/8, W/8)
            outputs.append(self.quant_conv(x) if hasattr(self, "quant_conv") else x)
        mean, logvar = torch.cat(outputs).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
            mean = mean + (logvar.clamp(-30, 20) / 2).exp() * noise.to(mean.device)
        return (mean - self.shift) * self.scale

    def decode(self, latents):
        part, outputs = self.decoder, []
        for x in self.slices(latents / self.scale + self.shift, latents.shape[2:].numel() * self.factor ** 2):
            x = part.conv_in(self.post_quant_conv(x) if hasattr(self, "post_quant_conv") else x)
            x = part.mid_block(x)
            for stage in part.up_blocks:
                x = stage(x)
            outputs.append(part.conv_out(F.silu(part.conv_norm_out(x))))                 # (b, 3, H, W) in [-1, 1]
        return (torch.cat(outputs) / 2 + 0.5).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------- CLIPText

class CLIPLayer(nn.Module):
    """A pre-norm transformer layer: causal attention for text, whole for images."""

    def __init__(self, dim, heads, mlp, act, eps, causal=True):
        super().__init__()
        self.heads, self.act, self.causal = heads, act, causal
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(dim, dim) for name in ("k_proj", "v_proj", "q_proj", "out_proj")})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, mlp), "fc2": nn.Linear(mlp, dim)})

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](y).unflatten(2, (self.heads, -1)).transpose(1, 2)      # (B, heads, L, D/heads)
                   for name in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](y)
        y = self.mlp["fc1"](self.layer_norm2(x))
        y = y * torch.sigmoid(1.702 * y) if self.act == "quick_gelu" else F.gelu(y)
        return x + self.mlp["fc2"](y)


class CLIPText(nn.Module):
    """The text tower of CLIP, as SD3 (L and bigG), FLUX and SD1.4 use it.

    forward(ids (B, L)) -> hidden (B, L, D) of the last-but-one layer, without the final norm, and pooled (B, P): the
    final-normed state at the end-of-text token, projected where the checkpoint has a text_projection.
    Source: Radford et al., arXiv:2103.00020; equal to transformers' CLIPTextModel and CLIPTextModelWithProjection.
    """
    public_names, file_name = ("CLIPTextModelWithProjection", "CLIPTextModel"), "model"
    from_pretrained, save_pretrained = classmethod(from_pretrained), save_pretrained
    ignore = ("position_ids",)                                        # in old files

    def __init__(self, vocab_size=49408, hidden_size=512, intermediate_size=2048, projection_dim=512,
                 num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu",
                 layer_norm_eps=1e-5, bos_token_id=49406, eos_token_id=49407,
                 architectures=("CLIPTextModelWithProjection",), **_):
        super().__init__()                                           # the defaults are transformers'
        if hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act={hidden_act!r} is not implemented: 'quick_gelu' or 'gelu'")
        if hidden_size % num_attention_heads:
            raise ValueError(f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}")
        self.config = dict(architectures=list(architectures), model_type="clip_text_model", vocab_size=vocab_size,
                           hidden_size=hidden_size, intermediate_size=intermediate_size, projection_dim=projection_dim,
                           num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
                           max_position_embeddings=max_position_embeddings, hidden_act=hidden_act,
                           layer_norm_eps=layer_norm_eps, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        self.eos = eos_token_id
        body = self.text_model = nn.Module()
        body.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, hidden_size),
                                         "position_embedding": nn.Embedding(max_position_embeddings, hidden_size)})
        body.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            CLIPLayer(hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
            for _ in range(num_hidden_layers))})
        body.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        if "CLIPTextModelWithProjection" in architectures:
            self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)

    @staticmethod
    def rename(key):
        return "text_model." + key                                    # transformers 5 leaves it out

    def states(self, ids):
        """The states (B, L, D) before and after the last layer, neither final-normed."""
        embeddings = self.text_model.embeddings
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight[:ids.shape[1]]  # (B, L, D)
        for layer in self.text_model.encoder["layers"]:
            before, x = x, layer(x)
        return before, x

    def last_hidden(self, ids):
        """The last layer's states, final-normed, (B, L, D): what Stable Diffusion 1 looks at."""
        return self.text_model.final_layer_norm(self.states(ids)[1])

    def forward(self, ids):
        hidden, x = self.states(ids)
        # Old configs say 2 and mean: the largest id, which in CLIP's vocabulary is the end of text.
        end = ids.argmax(1) if self.eos == 2 else (ids == self.eos).int().argmax(1)                      # (B,)
        pooled = self.text_model.final_layer_norm(x[torch.arange(len(ids), device=ids.device), end])     # (B, D)
        return hidden, self.text_projection(pooled) if hasattr(self, "text_projection") else pooled

    def init_weights(self):
        """Weights to train from: normal .02, biases at zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return self


# ---------------------------------------------------------------------------------------------------------- T5Encoder

class T5Layer(nn.Module):
    """A pre-norm T5 layer: attention with a position bias and without 1/sqrt(d), then a gated feed-forward."""

    def __init__(self, dim, inner, heads, mlp, eps, buckets):
        super().__init__()
        attention, mixer, norm = nn.Module(), nn.Module(), "layer_norm"
        self.heads = heads
        attention.q, attention.k, attention.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        attention.o = nn.Linear(inner, dim, bias=False)
        if buckets:
            attention.relative_attention_bias = nn.Embedding(buckets, heads)
        mixer.wi_0, mixer.wi_1 = (nn.Linear(dim, mlp, bias=False) for _ in range(2))
        mixer.wo = nn.Linear(mlp, dim, bias=False)
        self.layer = nn.ModuleList([nn.ModuleDict({"SelfAttention": attention, norm: RMSNorm(dim, eps=eps)}),
                                    nn.ModuleDict({"DenseReluDense": mixer, norm: RMSNorm(dim, eps=eps)})])

    def forward(self, x, bias):
        first, second = self.layer
        attention, y = first["SelfAttention"], first["layer_norm"](x)
        q, k, v = (linear(y).unflatten(2, (self.heads, -1)).transpose(1, 2)              # (B, heads, L, inner/heads)
                   for linear in (attention.q, attention.k, attention.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        x = x + attention.o(y.transpose(1, 2).flatten(2))
        mixer, y = second["DenseReluDense"], second["layer_norm"](x)
        return x + mixer.wo(F.gelu(mixer.wi_0(y), approximate="tanh") * mixer.wi_1(y))


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1, as SD3 and FLUX use it (XXL).

    forward(ids (B, L)) -> hidden (B, L, D). No mask: padding is attended, as in those pipelines. bfloat16 or float32;
    float16 overflows. Source: Raffel et al., arXiv:1910.10683; equal to transformers' T5EncoderModel.
    """
    public_names, file_name, ignore = ("T5EncoderModel",), "model", ()
    from_pretrained, save_pretrained = classmethod(from_pretrained), save_pretrained

    def __init__(self, vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8,
                 relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
                 feed_forward_proj="relu", **_):
        super().__init__()                                            # the defaults are transformers'
        if feed_forward_proj != "gated-gelu":
            raise ValueError(f"feed_forward_proj={feed_forward_proj!r} is not implemented: only T5 v1.1's 'gated-gelu'")
        self.config = dict(architectures=["T5EncoderModel"], model_type="t5", vocab_size=vocab_size, d_model=d_model,
                           d_kv=d_kv, d_ff=d_ff, num_layers=num_layers, num_heads=num_heads,
                           relative_attention_num_buckets=relative_attention_num_buckets,
                           relative_attention_max_distance=relative_attention_max_distance,
                           layer_norm_epsilon=layer_norm_epsilon, feed_forward_proj=feed_forward_proj)
        self.buckets, self.distance = relative_attention_num_buckets, relative_attention_max_distance
        self.shared, self.encoder = nn.Embedding(vocab_size, d_model), nn.Module()
        self.encoder.block = nn.ModuleList(
            T5Layer(d_model, d_kv * num_heads, num_heads, d_ff, layer_norm_epsilon, self.buckets if i == 0 else 0)
            for i in range(num_layers))
        self.encoder.final_layer_norm = RMSNorm(d_model, eps=layer_norm_epsilon)

    @staticmethod
    def rename(key):
        return "shared.weight" if key == "encoder.embed_tokens.weight" else key          # one tensor under two names

    def bucket(self, length, device):
        """The bucket of every pair (query, key), (L, L): exact up to a quarter of them, then by the logarithm."""
        half = self.buckets // 2                                                         # before and after
        place = torch.arange(length, device=device)
        away = place[None, :] - place[:, None]                                           # (L, L), key - query
        far, exact = away.abs(), half // 2
        log = (far.float().clamp(min=1) / exact).log() / math.log(self.distance / exact) * (half - exact)
        return (away > 0) * half + torch.where(far < exact, far, (exact + log.long()).clamp(max=half - 1))

    def forward(self, ids):
        table = self.encoder.block[0].layer[0]["SelfAttention"].relative_attention_bias
        bias = table(self.bucket(ids.shape[1], ids.device)).permute(2, 0, 1)[None]       # (1, heads, L, L), for all;
        bias = bias.contiguous()                                                         # else no fused kernel on CUDA
        x = self.shared(ids)                                                             # (B, L, D)
        for layer in self.encoder.block:
            x = layer(x, bias)
        return self.encoder.final_layer_norm(x)


# --------------------------------------------------------------------------------------------------------- tokenizers

class CLIPTokenizer:
    """CLIP's byte-pair tokenizer from vocab.json and merges.txt, or tokenizer.json: strings -> ids (B, length) int64.

    The end-of-text token survives truncation. tokenizer_config.json names the length, at most 77, and the padding: the
    end of text for CLIP-L; "!", id 0, for bigG, and as in transformers every "!" of a prompt is then that special token
    too. Where it names none, these are 77 and the end of text.
    """

    def __init__(self, directory):
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
        directory = Path(directory)
        vocab, merges, both = (directory / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
        absent = [file for file in (vocab, merges) if not file.is_file()]
        if absent and not both.is_file():
            raise FileNotFoundError(f"{absent[0]} is missing: a CLIP tokenizer is vocab.json and merges.txt, or "
                                    f"tokenizer.json")
        options = dict(unk_token="<|endoftext|>", end_of_word_suffix="</w>")
        if absent:
            vocab, merges, model = both, both, read_json(both).get("model") or {}
            if not {"vocab", "merges"} <= model.keys():
                raise ValueError(f"{both} holds no byte-pair model of vocab and merges: it is another tokenizer's file")
            table, pairs = model["vocab"], model["merges"]
        else:
            table, pairs = read_json(vocab), merges.read_text(encoding="utf-8", errors="replace").splitlines()
            pairs = [line for line in pairs if line and not line.startswith("#version")]
        try:
            pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
            self.core = Tokenizer(models.BPE(table, pairs, **options))
        except Exception as error:                                    # the library raises nothing more precise
            names = both if absent else f"{vocab} or {merges}"
            raise ValueError(f"{names} is damaged ({error}): download it again") from None
        config = read_json(directory / "tokenizer_config.json")
        start, end = "<|startoftext|>", "<|endoftext|>"
        pad = config.get("pad_token") or end
        pad = pad.get("content") if isinstance(pad, dict) else pad
        length = config.get("model_max_length") or 77                                    # transformers' for none: 1e30
        if not isinstance(pad, str) or not isinstance(length, (int, float)) or not length >= 3:
            raise ValueError(f"{directory}/tokenizer_config.json: model_max_length={length!r}, pad_token={pad!r}: at "
                             f"least 3, and a token are wanted")
        self.length = int(min(length, 77))
        made = {"".join(pair) for pair in pairs}                      # of half a file: prompts would be read by letters
        for token in table:
            if len(token.removesuffix("</w>")) > 1 and token not in made and not token.startswith("<"):
                raise ValueError(f"{merges} is damaged, nothing in it makes {token!r}: download it again")
        for token in (start, end, pad):
            if self.core.token_to_id(token) is None:
                raise ValueError(f"{vocab}: the special token {token!r} is missing: this is another tokenizer's file")
        self.core.add_special_tokens([start, end, pad])
        self.core.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        self.core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.core.decoder = decoders.ByteLevel()
        self.start, self.end, self.pad = (self.core.token_to_id(token) for token in (start, end, pad))

    def __call__(self, texts):
        rows = [[self.start] + encoding.ids[:self.length - 2] + [self.end]
                for encoding in self.core.encode_batch(texts)]
        rows = [row + [self.pad] * (self.length - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.length)        # no texts: (0, length)


class T5Tokenizer:
    """T5's unigram tokenizer from tokenizer.json: a list of strings -> ids (B, length) int64.

    No start of text; its end, </s>, survives truncation; then <pad>. transformers writes tokenizer.json for a directory
    that holds only spiece.model. Source: Kudo and Richardson, arXiv:1808.06226.
    """

    def __init__(self, directory, length):
        from tokenizers import Tokenizer
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: tokenizer.json is needed, spiece.model is not read. transformers makes the one of "
                f"the other:\n    pip install transformers sentencepiece protobuf && "
                f"python -c 'from transformers import T5TokenizerFast as T; "
                f"T.from_pretrained(\"{directory}\").save_pretrained(\"{directory}\")'")
        kind = (read_json(file).get("model") or {}).get("type")
        if kind != "Unigram":
            raise ValueError(f"{file} holds a {kind} model: T5's is Unigram, this is another tokenizer's file")
        try:
            self.core = Tokenizer.from_file(str(file))
        except Exception as error:                                    # the library raises nothing more precise
            raise ValueError(f"{file} is damaged ({error}): download it again") from None
        self.core.no_truncation()
        self.core.no_padding()                                     # a file may hold the settings of its last use
        self.length, self.end, self.pad = length, *map(self.core.token_to_id, ("</s>", "<pad>"))
        if self.end is None or self.pad is None:
            raise ValueError(f"{file}: the special tokens </s> and <pad> are missing: this is another tokenizer's file")

    def __call__(self, texts):
        rows = [encoding.ids[:self.length - 1] + [self.end]
                for encoding in self.core.encode_batch(texts, add_special_tokens=False)]
        rows = [row + [self.pad] * (self.length - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.length)        # no texts: (0, length)


# ----------------------------------------------------------------------------------------------------- original files

# Each row names the same layer twice: in the authors' file and here. # is a number, -# the same counted from the end;
# {a,b} here stands for {c,d} there; [a,b,c] are stacked there, along the output, in one layer. Beyond names, where a
# layer gives only a shift and a scale, they come in this order there and in the other, diffusers', here.

MMDIT_NAMES = """
    pos_embed                                               pos_embed.pos_embed
    x_embedder.proj                                         pos_embed.proj
    context_embedder                                        context_embedder
    {t,y}_embedder.mlp.{0,2}                                time_text_embed.{timestep,text}_embedder.linear_{1,2}
    joint_blocks.#.{x,context}_block.adaLN_modulation.1     transformer_blocks.#.{norm1,norm1_context}.linear
    joint_blocks.#.x_block.{attn,attn2}.qkv                 transformer_blocks.#.{attn,attn2}.[to_q,to_k,to_v]
    joint_blocks.#.x_block.{attn,attn2}.ln_{q,k}            transformer_blocks.#.{attn,attn2}.norm_{q,k}
    joint_blocks.#.x_block.{attn,attn2}.proj                transformer_blocks.#.{attn,attn2}.to_out.0
    joint_blocks.#.context_block.attn.qkv                   transformer_blocks.#.attn.[add_q_proj,add_k_proj,add_v_proj]
    joint_blocks.#.context_block.attn.ln_{q,k}              transformer_blocks.#.attn.norm_added_{q,k}
    joint_blocks.#.context_block.attn.proj                  transformer_blocks.#.attn.to_add_out
    joint_blocks.#.{x,context}_block.mlp.{fc1,fc2}          transformer_blocks.#.{ff,ff_context}.net.{0.proj,2}
    final_layer.adaLN_modulation.1                          norm_out.linear
    final_layer.linear                                      proj_out
"""
FLUX_NAMES = """
    {img,txt}_in                                         {x,context}_embedder
    {time,vector,guidance}_in.{in,out}_layer             time_text_embed.{timestep,text,guidance}_embedder.linear_{1,2}
    double_blocks.#.{img,txt}_mod.lin                    transformer_blocks.#.{norm1,norm1_context}.linear
    double_blocks.#.img_attn.qkv                         transformer_blocks.#.attn.[to_q,to_k,to_v]
    double_blocks.#.txt_attn.qkv                         transformer_blocks.#.attn.[add_q_proj,add_k_proj,add_v_proj]
    double_blocks.#.img_attn.norm.{query,key}_norm.scale transformer_blocks.#.attn.norm_{q,k}.weight
    double_blocks.#.txt_attn.norm.{query,key}_norm.scale transformer_blocks.#.attn.norm_added_{q,k}.weight
    double_blocks.#.{img,txt}_attn.proj                  transformer_blocks.#.attn.{to_out.0,to_add_out}
    double_blocks.#.{img,txt}_mlp.{0,2}                  transformer_blocks.#.{ff,ff_context}.net.{0.proj,2}
    single_blocks.#.modulation.lin                       single_transformer_blocks.#.norm.linear
    single_blocks.#.linear1                         single_transformer_blocks.#.[attn.to_q,attn.to_k,attn.to_v,proj_mlp]
    single_blocks.#.norm.{query,key}_norm.scale          single_transformer_blocks.#.attn.norm_{q,k}.weight
    single_blocks.#.linear2                              single_transformer_blocks.#.proj_out
    final_layer.adaLN_modulation.1                       norm_out.linear
    final_layer.linear                                   proj_out
"""
VAE_NAMES = """
    {encoder,decoder}.{conv_in,norm_out,conv_out}   {encoder,decoder}.{conv_in,conv_norm_out,conv_out}
    encoder.down.#.block.#.{norm,conv}#             encoder.down_blocks.#.resnets.#.{norm,conv}#
    encoder.down.#.block.#.nin_shortcut             encoder.down_blocks.#.resnets.#.conv_shortcut
    encoder.down.#.downsample.conv                  encoder.down_blocks.#.downsamplers.0.conv
    {encoder,decoder}.mid.block_{1,2}.{norm,conv}#  {encoder,decoder}.mid_block.resnets.{0,1}.{norm,conv}#
    {encoder,decoder}.mid.attn_1.norm               {encoder,decoder}.mid_block.attentions.0.group_norm
    {encoder,decoder}.mid.attn_1.{q,k,v,proj_out}   {encoder,decoder}.mid_block.attentions.0.{to_q,to_k,to_v,to_out.0}
    decoder.up.-#.block.#.{norm,conv}#              decoder.up_blocks.#.resnets.#.{norm,conv}#
    decoder.up.-#.block.#.nin_shortcut              decoder.up_blocks.#.resnets.#.conv_shortcut
    decoder.up.-#.upsample.conv                     decoder.up_blocks.#.upsamplers.0.conv
    {quant,post_quant}_conv                         {quant,post_quant}_conv
"""
ORIGINAL = {                       # the prefixes that set a network apart in a file of several, and its names
    MMDiT: (("model.diffusion_model.",), MMDIT_NAMES), Flux: (("model.diffusion_model.",), FLUX_NAMES),
    VAE: (("first_stage_model.", "vae."), VAE_NAMES),
    CLIPText: ((), None), T5Encoder: ((), None)}                      # their files have transformers' names


def written_out(theirs, ours):
    """The pairs of names that a row of the tables stands for; a stacked name there meets each of its parts here."""
    here, there = re.search(r"[{[](.*?)[]}]", ours), re.search(r"{(.*?)}", theirs)
    if here is None:
        return [(theirs, ours)]
    parts = here[1].split(",")
    if here[0][0] == "[":
        names = [theirs] * len(parts)
    else:
        names = [theirs.replace(there[0], name, 1) for name in there[1].split(",")]
    return [pair for name, part in zip(names, parts, strict=True)
            for pair in written_out(name, ours.replace(here[0], part, 1))]


def original_names(net):
    """{name in the original file: the names here of what it holds}: one name, or those that are stacked, in order."""
    table = ORIGINAL[type(net)][1]
    if table is None:
        return {name: [name] for name in net.state_dict()}
    names = {}
    for theirs, ours in [pair for row in table.strip().splitlines() for pair in written_out(*row.split())]:
        pattern = re.compile(ours.replace(".", r"\.").replace("#", r"(\d+)") + r"(\.weight|\.bias|)")
        for match in filter(None, map(pattern.fullmatch, net.state_dict())):
            *numbers, end = match.groups()
            turn = map(int, numbers)                                                     # -# only in the VAE
            key = re.sub("-?#", lambda slot: str(next(turn) if slot[0] == "#" else
                                                 len(net.decoder.up_blocks) - 1 - next(turn)), theirs)
            names.setdefault(key + end, []).append(match[0])
    return names


def from_single_file(cls, file, config, dtype=torch.float32, device="cpu", prefixes=None):
    """A network from the file its authors published: SD3's, FLUX's, their VAE's, clip_l, clip_g or t5xxl.safetensors.

    cls: MMDiT, Flux, VAE, CLIPText or T5Encoder; config: the options of cls, which such a file does not state;
    prefixes: the network's own in a file of several, where it is a text encoder. Tensors under other networks' prefixes
    are skipped, all else is strict. One tensor at a time is read, renamed and, where it is stacked, split: memory never
    holds a second copy. Returns the network in eval mode, without gradients. Raises ValueError or FileNotFoundError
    naming file and tensor.
    """
    if cls not in ORIGINAL:
        raise ValueError(f"{file}: the original names of a {cls.__name__} are not known: use a directory as diffusers'")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is missing: download it first")
    with torch.device("meta"):                                        # shapes without memory
        net = cls(**config)
    ours, names, ignore, optional = net.state_dict(), original_names(net), cls.ignore, ()
    want = {key: torch.cat([ours[name] for name in parts]) for key, parts in names.items()}
    if cls is VAE:                                                    # there, its attention is 1 x 1 convolutions
        want |= {key: w[..., None, None] for key, w in want.items() if ".attn_1." in key and w.ndim == 2}
    if cls is CLIPText:
        ignore += ("text_projection.weight", "logit_scale")           # FLUX and SD1 take the pooled state unprojected
        if net.config["hidden_act"] == "quick_gelu" and "text_projection.weight" in ours:
            optional = ("text_projection.weight",)                    # and so does SD3 of CLIP-L: its clip_l has none
    swapped = {f"{name}.linear" for name, module in net.named_modules()
               if isinstance(module, Modulation) and module.parts == 2}
    state = {name: torch.eye(*ours[name].shape, dtype=dtype, device=device) for name in optional}
    for key, tensor in read_tensors([file], want, cls.rename, ignore, prefixes or ORIGINAL[cls][0], optional):
        if names[key][0].rpartition(".")[0] in swapped:
            tensor = tensor.roll(len(tensor) // 2, dims=0)            # (shift, scale) -> (scale, shift)
        for name, part in zip(names[key], tensor.split([len(ours[name]) for name in names[key]])):
            state[name] = part.view(ours[name].shape).to(device, copy=True).to(dtype)
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------- pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
SHIPPED = {name: HERE / "tests" / name for name in ("tiny", "tiny-prox", "tiny-score")}
TINY_DIR = SHIPPED["tiny"]
FAMILIES = {                                                          # model_index.json's class -> the pipeline's parts
    "StableDiffusion3Pipeline": ("sd3", {"transformer": MMDiT, "vae": VAE, "text_encoder": CLIPText,
                                         "text_encoder_2": CLIPText, "text_encoder_3": T5Encoder}),
    "FluxPipeline": ("flux", {"transformer": Flux, "vae": VAE, "text_encoder": CLIPText, "text_encoder_2": T5Encoder}),
    "StableDiffusionPipeline": ("sd14", {"unet": UNet, "vae": VAE, "text_encoder": CLIPText}),
    "UViTPipeline": ("uvit", {"transformer": UViT, "vae": VAE, "text_encoder": CLIPText, "text_encoder_2": T5Encoder})}
UNUSED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")         # parts that nothing here needs
SOURCES = {"sd35m": "stabilityai/stable-diffusion-3.5-medium", "flux": "black-forest-labs/FLUX.1-dev",
           "sd14": "CompVis/stable-diffusion-v1-4"}
GATED = ("sd35m", "flux")
DUPLICATES = {                                                        # what the sources hold twice, or for nobody here
    "sd35m": ("sd3.5_medium.safetensors", "text_encoders/*", "*.fp16*"),
    "flux": ("flux1-dev.safetensors", "ae.safetensors"), "sd14": ("*.bin", "*.fp16*", "safety_checker/*")}
VAE_CONFIG = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, latent_channels=16,
                  use_quant_conv=False, use_post_quant_conv=False)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12, eos_token_id=2)
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, projection_dim=1280, num_hidden_layers=32,
              num_attention_heads=20, hidden_act="gelu", eos_token_id=2)
T5_XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
CONFIGS = {                           # the public files', for what comes without: init="random", original single files
    "sd35m": ("StableDiffusion3Pipeline", 3.0, {
        "transformer": dict(sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        "vae": dict(VAE_CONFIG, scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}),
    "flux": ("FluxPipeline", 0.0, {
        "transformer": dict(guidance_embeds=True), "vae": dict(VAE_CONFIG, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": dict(CLIP_L, architectures=["CLIPTextModel"]), "text_encoder_2": T5_XXL}),
    "sd14": ("StableDiffusionPipeline", 1.0, {
        "unet": dict(sample_size=64, cross_attention_dim=768),
        "vae": dict(VAE_CONFIG, sample_size=512, latent_channels=4, use_quant_conv=True, use_post_quant_conv=True),
        "text_encoder": dict(CLIP_L, architectures=["CLIPTextModel"])}),
    "uvit": ("UViTPipeline", 1.0, {                                   # in public nowhere: ProxT2I's sizes
        "transformer": UVITS["uvit"], "vae": dict(VAE_CONFIG, scaling_factor=1.5305, shift_factor=0.0609)})}
BESIDE = {"vae": ("ae",), "text_encoder": ("text_encoders/clip_l", "clip_l"),            # of an original single file
          "text_encoder_2": ("text_encoders/clip_g", "clip_g"),
          "text_encoder_3": ("text_encoders/t5xxl_fp16", "text_encoders/t5xxl", "t5xxl_fp16", "t5xxl")}


class TextToImage:
    """A text-to-image model: its network, text encoders and, unless it works in pixels, its VAE. Made by `load`.

    family: sd3, flux (flow: net(x, t, *encode_text(prompts)) is the velocity) or sd14 (ddpm: t is a step n, the network
    predicts the noise). shift: of the checkpoint's schedule, 0 where it depends on the resolution; guidance: what a
    distilled FLUX is told; offload: the VAE waits on the CPU; source: the directory that it was read from; blank: how
    many tokens of zeros stand for the T5 that an SD3 is without.
    """

    def __init__(self, family, net, encoders=(), tokenizers=(), vae=None, shift=1.0):
        self.family, self.net, self.encoders, self.tokenizers, self.vae = family, net, encoders, tokenizers, vae
        self.ddpm, self.shift, self.guidance, self.offload = family == "sd14", shift, 3.5, False
        self.folder, self.features, self.source, self.blank = None, {}, None, 0

    # -- text ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, prompts):
        """prompts, B strings -> what the network takes beside x and t: (context (B, L, D), pooled (B, P)) and guidance.

        sd14 has the context alone, FLUX.1-dev the third. Each distinct prompt is encoded once, and kept: on disk after
        `prepare`, the last 1024 in memory.
        """
        import data
        device = next(self.net.parameters()).device
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        for prompt in place:
            if prompt not in self.features:      # alone: in a batch the last bits depend on the company, so on history
                self.features[prompt] = [part[0] for part in self._kept(prompt)]
        rows = data.sent(torch.tensor([place[prompt] for prompt in prompts]), device)    # (B,)
        ctx = tuple(torch.stack(parts) for parts in zip(*(self.features[prompt] for prompt in place)))
        ctx = tuple((part if part.device == device else data.sent(part, device))[rows] for part in ctx)
        for prompt in list(self.features)[:-1024]:
            del self.features[prompt]
        if self.family == "flux" and self.net.config["guidance_embeds"]:
            ctx += (torch.full((len(prompts),), self.guidance, device=device),)
        return ctx

    def encode(self, prompts):
        """encode_text without its memory, and without guidance: each pipeline's own rule.

        sd3    CLIPs side by side, zeros up to the network's width; T5's tokens, or zeros for them, behind theirs;
               pooled CLIPs side by side
        flux   T5's tokens; CLIP's pooled state
        sd14   CLIP's last states, final-normed
        uvit   the same, then T5's tokens where there is a T5, both padded with zeros to the network's width
        """
        def ids(tokenizer, encoder):
            return tokenizer(prompts).to(next(encoder.parameters()).device)
        if not self.encoders:
            raise RuntimeError(f"the text encoders were freed before {prompts[0]!r} was encoded: prepare it too")
        if self.family in ("sd14", "uvit"):
            hidden = [getattr(encoder, "last_hidden", encoder)(ids(tokenizer, encoder))
                      for encoder, tokenizer in zip(self.encoders, self.tokenizers)]
            width = self.net.config["clip_dim"] if self.family == "uvit" else hidden[0].shape[2]
            return torch.cat([F.pad(part, (0, width - part.shape[2])) for part in hidden], dim=1),
        outputs = [encoder(ids(tokenizer, encoder)) for encoder, tokenizer in zip(self.encoders, self.tokenizers)]
        if self.family == "flux":
            (_, pooled), tokens = outputs
            return tokens, pooled
        clip = [output for output in outputs if isinstance(output, tuple)]
        t5 = [output for output in outputs if torch.is_tensor(output)]                   # none, or one
        hidden, pooled = (torch.cat(parts, dim=-1) for parts in zip(*clip))
        hidden = F.pad(hidden, (0, self.net.config["joint_attention_dim"] - hidden.shape[2]))
        t5 = t5 or [hidden.new_zeros(len(hidden), self.blank, hidden.shape[2])]          # attended, as in diffusers
        return torch.cat([hidden, *t5], dim=1), pooled

    def _file(self, prompt):
        return self.folder and self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def is_kept(self, prompt):
        """Is a prompt in the folder on disk, or no folder needed: the encoders are here, or features are random?"""
        return bool(self.encoders) or self.folder is None or self._file(prompt).is_file()

    def _kept(self, prompt):
        """encode of one prompt, through the folder on disk where there is one. A list of tensors (1, ...)."""
        file = self._file(prompt)
        if file and file.is_file():
            try:
                with safe_open(file, framework="pt") as tensors:
                    return [tensors.get_tensor(key) for key in sorted(tensors.keys())]
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}): delete it, the next run encodes it again") from None
        parts = self.encode([prompt])
        if file:
            state = {str(i): part.cpu().contiguous() for i, part in enumerate(parts)}
            write_tensors(file, state, uuid.uuid4().hex)
        return parts

    @torch.no_grad()
    def prepare(self, prompts, folder="", rank=0, world=1):
        """Encode the prompts of a run into a folder on disk, this process its share, and free the text encoders.

        The folder's sub-folder is named by the encoders' weights and options, the files by the text. An empty folder is
        weights/text, unless the encoders are so small (under 10 M parameters) that nothing needs to be kept or freed.
        Raises ValueError where the folder cannot be made or its disk is too small for all.
        """
        size = sum(p.numel() for encoder in self.encoders for p in encoder.parameters())
        if not self.encoders or not folder and size < 10_000_000:
            return
        from tqdm import tqdm
        lengths = [tokenizer.length for tokenizer in self.tokenizers] + ([self.blank] if self.blank else [])
        widths = [self.net.config.get(name) for name in ("joint_attention_dim", "clip_dim")]                # padded to
        digest = hashlib.sha256(repr([self.family, lengths, widths]).encode())
        for encoder, tokenizer in zip(self.encoders, self.tokenizers):
            digest.update(repr((encoder.config, next(encoder.parameters()).dtype, tokenizer.core.to_str())).encode())
            for p in encoder.parameters():                            # a fingerprint: a few numbers of every tensor
                digest.update(p.flatten()[::max(1, p.numel() // 64)].double().cpu().numpy().tobytes())
        self.folder = Path(folder or HERE / "weights" / "text") / digest.hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make --text-cache {self.folder}: {error.strerror}") from None
        mine = [prompt for prompt in sorted(set(prompts))[rank::world] if not self._file(prompt).is_file()]
        if mine:                                                      # all are as large as the first
            need = sum(part.nbytes for part in self._kept(mine[0])) * (len(mine) - 1) * world
            free = shutil.disk_usage(self.folder).free
            if need > free:
                raise ValueError(f"the features of {len(mine) * world:,} prompts need {need / 1e9:.2f} GB more under "
                                 f"{self.folder}, {free / 1e9:.2f} GB are free: give --text-cache a folder with room")
        for prompt in tqdm(mine, desc="encoding prompts", disable=rank > 0 or not mine, dynamic_ncols=True):
            self._kept(prompt)
        self.encoders = ()
        self.features = {prompt: [part.cpu() for part in parts] for prompt, parts in self.features.items()}  # as all

    # -- images -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, images):
        """images (B, 3, H', W') in [0, 1] -> latents (B, C, H, W): the VAE's mean, or the pixels in [-1, 1]."""
        return images * 2 - 1 if self.vae is None else self._fetched("encode", images)

    @torch.no_grad()
    def decode(self, latents):
        """latents (B, C, H, W) -> images (B, 3, H', W') float32 in [0, 1]."""
        return (latents.float() / 2 + 0.5).clamp(0, 1) if self.vae is None else self._fetched("decode", latents)

    def _fetched(self, method, x):
        """The VAE's encode or decode of x, where x is: with offload it comes from the CPU and goes back."""
        if self.offload:
            self.vae.to(x.device)
        y = getattr(self.vae, method)(x).float()
        if self.offload:
            self.vae.to("cpu")
        return y

    def latent_shape(self, resolution=None):
        """(C, H, W) of one image's latent at a resolution in pixels; None or 0: the checkpoint's own.

        Raises ValueError for a resolution that the network cannot make.
        """
        factor, config = self.vae.factor if self.vae else 1, self.net.config
        own = config.get("sample_size") or config.get("img_size") or 128                 # FLUX's config names none
        size = resolution or own * factor
        if size % (factor * self.net.patch):
            raise ValueError(f"resolution={size} is not a multiple of {factor * self.net.patch}, the side of a patch")
        most = config.get("pos_embed_max_size", math.inf) * factor * self.net.patch
        if size > most:
            raise ValueError(f"resolution={size} is more than {most}, the side of the checkpoint's position table")
        return self.net.channels, size // factor, size // factor

    def _suited(self, flag, kind, *flow):
        """kind, or where it is empty ddim for DDPM steps and else flow[0]; ValueError for one of the other sort."""
        kind = kind or ("ddim" if self.ddpm else flow[0])
        if (kind == "ddim") != self.ddpm:
            knows, suits = ("DDPM steps", "ddim") if self.ddpm else ("flow times", " or ".join(flow))
            raise ValueError(f"--{flag} {kind} does not suit {self.family}, whose network knows {knows}: try --{flag} "
                             f"{suits}")
        return kind

    def times(self, steps, kind="", shift=0.0, resolution=None):
        """The sampler's times by `schedule`; kind "" is linear (ddim for DDPM steps), shift 0 the checkpoint's own.

        Raises ValueError for a kind that does not suit the network: ddim gives DDPM steps, the others flow times; and
        for a shift of DDPM steps.
        """
        kind = self._suited("schedule", kind, "linear")
        if shift and self.ddpm:
            raise ValueError(f"--shift {shift:g} does not suit {self.family}: DDPM steps have none; leave it away")
        if not shift and self.family == "flux" and not self.shift:
            shift = flux_shift(math.prod(self.latent_shape(resolution)[1:]) // 4)
        return schedule(steps, shift or self.shift, kind)

    def solver(self, name=""):
        """The ODE solver's name; empty: ddim for a DDPM network, else euler. ValueError for one that cannot be."""
        return self._suited("solver", name, "euler", "dpm")

    def sde(self, kind="", noise_level=0.0):
        """The kind of stochastic step; empty: ddim for a DDPM network, else flow. ValueError for one that cannot be, or
        for more noise than it can have."""
        kind = self._suited("sde", kind, "flow", "dance", "cps")
        if self.ddpm and noise_level > 1:
            raise ValueError(f"--noise-level {noise_level} is DDIM's eta on {self.family}: 1 is DDPM's own noise, and "
                             f"more has no mean; try 1")
        return kind


class RandomText:
    """In place of text encoders, where a model without weights is measured: noise, a function of the text."""

    def __init__(self, pipe, lengths):
        self.pipe, self.lengths = pipe, lengths

    def __call__(self, prompts):
        config = self.pipe.net.config
        names = ("joint_attention_dim", "cross_attention_dim", "clip_dim")
        width = next(config[name] for name in names if name in config)
        shapes = [(self.lengths, width)] + [(config[name],) for name in ("pooled_projection_dim",) if name in config]
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big") for prompt in prompts]
        return tuple(torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
                     .to(compute_dtype(self.pipe.net)) for shape in shapes)


def check_widths(pipe, directory, names):
    """Raise ValueError if the encoders, parts `names`, give other widths than the network takes, or their tokenizers
    other ids or lengths than they: parts of different models. Warn of a CLIP that is pooled at a token other than its
    tokenizer's end, as a made-up small one may be."""
    config, widths = pipe.net.config, [(type(e) is T5Encoder, e.config) for e in pipe.encoders]
    clip = [c for t5, c in widths if not t5]
    tokens = [c["d_model"] for t5, c in widths if t5]
    pooled = sum(c["projection_dim"] if "CLIPTextModelWithProjection" in c["architectures"] else c["hidden_size"]
                 for c in clip)
    room = next(config[name] for name in ("joint_attention_dim", "cross_attention_dim", "clip_dim") if name in config)
    width = sum(c["hidden_size"] for c in clip)
    good = {"sd3": 0 < width <= room and pooled == config.get("pooled_projection_dim") and tokens in ([], [room]),
            "flux": pooled == config.get("pooled_projection_dim") and tokens == [room], "sd14": width == room,
            "uvit": 0 < max([width, *tokens]) <= room}
    if not good[pipe.family]:
        raise ValueError(f"{directory}: the text encoders give {width} (CLIP) and {tokens} (T5) features a token and "
                         f"{pooled} pooled, the network takes {room} and {config.get('pooled_projection_dim')}: these "
                         f"parts are of different models")
    if pipe.family == "sd3" and len({t.length for t in pipe.tokenizers if isinstance(t, CLIPTokenizer)}) > 1:
        raise ValueError(f"{directory}: the CLIP tokenizers' model_max_length differ, and SD3 joins their tokens")
    for name, encoder, tokenizer in zip(names, pipe.encoders, pipe.tokenizers):
        ids, room = max(tokenizer.core.get_vocab().values()) + 1, encoder.config["vocab_size"]
        length = encoder.config.get("max_position_embeddings", tokenizer.length)
        if ids > room or tokenizer.length > length:
            raise ValueError(f"{directory / name.replace('text_encoder', 'tokenizer')} makes {tokenizer.length} tokens "
                             f"of {ids} kinds, {directory / name} takes {length} of {room}: parts of different models")
        if pipe.family in ("sd3", "flux") and isinstance(encoder, CLIPText) and encoder.eos not in (2, tokenizer.end):
            warnings.warn(f"{directory}: a CLIP's eos_token_id is {encoder.eos}, its tokenizer ends a text with "
                          f"{tokenizer.end}, so its pooled features do not depend on the prompt: are these parts of "
                          f"different models?", stacklevel=2)


def read_index(directory):
    """(the class, the parts that it has) of a pipeline's model_index.json. Raises as `read_json` does."""
    index = read_json(Path(directory) / "model_index.json")
    return str(index.get("_class_name")), [name for name, value in index.items()
                                           if isinstance(value, list) and any(value[:1])]


def read_shift(directory):
    """The shift in a pipeline's scheduler_config.json; 0 where it depends on the resolution (FLUX.1-dev).

    1 where model_index.json names no scheduler. Raises FileNotFoundError where it names one that is not there, and
    ValueError for times other than those of `schedule`, a scheduler of no flow times, a line of shifts other than
    `flux_shift`'s, or DDPM steps other than ALPHA_BAR's.
    """
    file = Path(directory) / "scheduler" / "scheduler_config.json"
    pipeline, parts = read_index(directory)
    if not file.is_file() and "scheduler" not in parts:
        return 1.0
    config = read_json(file)
    if pipeline == "StableDiffusionPipeline":
        config = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, shift=1.0) | config     # the defaults
        only = dict(prediction_type="epsilon", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                    num_train_timesteps=1000, trained_betas=None, rescale_betas_zero_snr=False)
    else:
        only = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, invert_sigmas=False,
                    stochastic_sampling=False, shift_terminal=None)
        if pipeline != "FluxPipeline":
            only["use_dynamic_shifting"] = False
        elif config.get("use_dynamic_shifting"):
            only |= dict(base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
                         time_shift_type="exponential")
    for name, value in only.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: {name}={config[name]!r} is not implemented: only {value!r}")
    name = str(config.get("_class_name"))
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas")                 # whose default is 1
    shift = config.get("shift", config.get("flow_shift", 1.0) if flow else None)
    if not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
        raise ValueError(f"{file}: a {name} with shift={shift!r}: flow times have one above 0, as a FlowMatchEuler"
                         f"DiscreteScheduler has, or flow_shift where use_flow_sigmas is true")
    return 0.0 if config.get("use_dynamic_shifting") else float(shift)


def random_pipeline(pipeline, shift, configs, dtype, device, text_length):
    """A pipeline of random networks in `dtype` on `device`, without a copy elsewhere. configs: {part: config}."""
    family, classes = FAMILIES[pipeline]
    nets, default = {}, torch.get_default_dtype()
    for name, config in configs.items():
        try:
            torch.set_default_dtype(torch.promote_types(dtype, torch.float32) if name == "vae" else dtype)
            with torch.device(device):
                nets[name] = classes[name](**config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)
    vae = nets.pop("vae", None)
    pipe = TextToImage(family, *nets.values(), vae=vae, shift=shift)
    lengths = {"sd3": 77 + (text_length or 128), "sd14": 77, "uvit": pipe.net.config.get("num_clip_token"),
               "flux": text_length or (512 if pipe.net.config.get("guidance_embeds") else 256)}
    pipe.encode = RandomText(pipe, lengths[family])
    return pipe


def t5_room(net, clip, text_length=None):
    """T5's tokens in a U-ViT: those that CLIP's tokenizer leaves. ValueError for none, or for another text_length."""
    total = net.config["num_clip_token"]
    room = total - clip.length
    if room < 1 or (text_length or room) != room:
        raise ValueError(f"--text-length {text_length or 0}: this U-ViT takes {total} tokens of text, CLIP's tokenizer "
                         f"makes {clip.length}, {room} are left for T5: leave the flag away, or take the text encoders "
                         f"that belong to the network")
    return room


def fresh_uvit(model, weights, lam, dtype, device, seed, predict="noise"):
    """A pipeline with an untrained U-ViT: tiny-prox and tiny-score, or uvit beside the encoders and VAE of a directory.

    weights: the directory with text_encoder/, tokenizer/ and so on; None: the tiny model's, or weights/uvit. lam: with
    the condition on lambda, for a proximal model; predict: noise or v. Raises FileNotFoundError naming what is missing.
    """
    tiny = model.startswith("tiny")
    directory = Path(weights or (TINY_DIR if tiny else HERE / "weights" / "uvit"))
    if not (directory / "text_encoder").is_dir():
        raise FileNotFoundError(f"{directory / 'text_encoder'} does not exist: training --model {model} takes its text "
                                f"encoders and VAE from there (text_encoder, a CLIPTextModel, text_encoder_2, a T5, "
                                f"vae and their tokenizers, as diffusers has them: weights/flux fits as it is)")
    torch.manual_seed(seed)
    net = UViT(**UVITS["tiny" if tiny else "uvit"] | {"lam": lam, "predict": predict}).init_weights().to(device, dtype)
    encoders, tokenizers = [], []
    for suffix, cls in (("", CLIPText), ("_2", T5Encoder)):
        if (directory / f"text_encoder{suffix}").is_dir():
            encoders.append(cls.from_pretrained(directory / f"text_encoder{suffix}", dtype, device))
            folder = directory / f"tokenizer{suffix}"
            tokenizers.append(CLIPTokenizer(folder) if cls is CLIPText else
                              T5Tokenizer(folder, t5_room(net, tokenizers[0])))
    vae = VAE.from_pretrained(directory / "vae", device=device) if (directory / "vae").is_dir() else None
    pipe = TextToImage("uvit", net, encoders, tokenizers, vae)
    pipe.source = directory
    return pipe


def link_or_copy(source, target):
    """A hard link to a large file, 10 GB of T5 say; of a small one, which may be edited, or to another disk, a copy."""
    if os.path.exists(target):
        if os.path.samefile(source, target):
            return
        os.remove(target)                                             # not written into: it may be a link to others
    if os.path.getsize(source) > 100e6:
        with contextlib.suppress(OSError):
            return os.link(os.path.realpath(source), target)
    shutil.copy2(source, target)


def save_uvit(pipe, directory, dtype):
    """Write a U-ViT's pipeline: its network, and the text encoders and VAE of the directory that they came from.

    Those of init="random" came from none and are not kept.
    """
    directory = Path(directory)
    save_pretrained(pipe.net, directory / "transformer", dtype)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    index = {"_class_name": "UViTPipeline", "transformer": ["models", "UViT"]}
    for name, library in (("text_encoder", "transformers"), ("tokenizer", "transformers"),
                          ("text_encoder_2", "transformers"), ("tokenizer_2", "transformers"), ("vae", "diffusers")):
        if pipe.source and (pipe.source / name).is_dir():
            for old in [*(directory / name).glob("*.safetensors*"), directory / name / "vocab.json"]:
                if not (pipe.source / name / old.name).is_file():
                    old.unlink(missing_ok=True)                       # of another run: it would be read first
            shutil.copytree(pipe.source / name, directory / name, copy_function=link_or_copy, dirs_exist_ok=True)
            index[name] = [library, "as beside it"]
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def family(model, weights=""):
    """sd3, flux, sd14 or uvit of a name or a directory, by its model_index.json alone; None where there is none."""
    if model in CONFIGS:
        return FAMILIES[CONFIGS[model][0]][0]
    try:
        return FAMILIES.get(read_index(locate(model, weights)[1])[0], (None,))[0]
    except (OSError, ValueError):
        return None


def locate(model, weights=None):
    """(original single file or None, directory) of a name or a directory. They need not exist."""
    given = model not in CONFIGS and Path(model).is_dir()             # ./flux beside weights/flux is written ./flux
    path = Path(weights or SHIPPED.get(model) or (model if given else HERE / "weights" / model))
    return (path, path.parent) if path.is_file() else (None, path)


def parameter_count(model, weights=""):
    """How many parameters the network of a directory has, by its config.json alone; None where there is none."""
    directory = locate(model, weights)[1]
    try:
        name, cls = next(iter(FAMILIES[read_index(directory)[0]][1].items()))
        return sum(p.numel() for p in skeleton(cls, directory / name).parameters())
    except (OSError, ValueError, KeyError):                           # load says what is wrong
        return None


def find(model, weights=None, init=None):
    """(original single file or None, directory, built-in configs or None) of what load reads; arguments as there.

    Raises FileNotFoundError that says how the weights come, where there are none.
    """
    file, directory = locate(model, weights)
    known = CONFIGS.get(model) if init or file else None              # these need no directory that describes them
    if directory.is_dir() or (init and known):
        return file, directory, known
    if directory.suffix == ".safetensors":
        raise FileNotFoundError(f"--weights {directory} does not exist: give a directory as diffusers has them, or "
                                f"an original single file of the network")
    if model in SOURCES:
        exclude = "".join(f' --exclude "{pattern}"' for pattern in DUPLICATES[model])
        licence, login = ((f", once you accept the licence on https://huggingface.co/{SOURCES[model]},",
                           "hf auth login && ") if model in GATED else ("", ""))
        raise FileNotFoundError(f"no weights for --model {model}: {directory} does not exist. If they are elsewhere: "
                                f"--weights DIR. They come{licence} by: pip install 'huggingface_hub>=1' && {login}"
                                f"hf download {SOURCES[model]}{exclude} --local-dir {directory}")
    if model == "uvit":
        raise FileNotFoundError(f"no weights for --model {model}: {directory} does not exist, and none are public. "
                                f"They come by: python proxt2i.py train --model {model} --preset paper --weights "
                                f"ENCODERS --images IMAGES --out OUT, then --weights OUT/model")
    raise FileNotFoundError(f"no weights for --model {model}: {directory} does not exist. A model is "
                            f"{', '.join([*SHIPPED, *CONFIGS])} or a directory in the diffusers layout")


def load(model, weights=None, dtype=torch.float32, device="cpu", init=None, text_length=None, net_dtype=None):
    """A whole pipeline from a name (tiny, tiny-prox, tiny-score, sd35m, flux, sd14, uvit), or from a directory in the
    diffusers layout.

    weights: the directory where it is not weights/<model>, or an original single file (sd3.5_medium.safetensors,
    flux1-dev.safetensors), whose directory then holds the rest. init="random": full-size networks with random weights
    and text features on the device, for measuring. text_length: T5's tokens; None: 128 for SD3, as the released RL
    code; 512 for FLUX.1-dev, 256 for -schnell. net_dtype: the network's, where it is not dtype. The VAE stays in
    float32 (float64 if dtype is).
    Raises ValueError or FileNotFoundError that name the file and what to do.
    """
    if init not in (None, "random"):
        raise ValueError(f"init={init!r}: 'random' or nothing")
    file, directory, known = find(model, weights, init)
    if known and not (directory / "model_index.json").is_file():
        pipeline, shift, configs = known
        parts = list(configs)
    else:
        (pipeline, parts), shift, configs = read_index(directory), read_shift(directory), {}
        parts = [name for name in parts if name not in UNUSED]
    if pipeline not in FAMILIES:
        raise ValueError(f"{directory}/model_index.json describes a {pipeline}: only {', '.join(FAMILIES)} can be read")
    family, classes = FAMILIES[pipeline]
    if model in CONFIGS and family != FAMILIES[CONFIGS[model][0]][0]:
        raise ValueError(f"{directory} holds a {pipeline}, --model {model} is a {CONFIGS[model][0]}: give --model "
                         f"{directory} instead of the name")
    unknown = [name for name in parts if name.replace("tokenizer", "text_encoder") not in classes]
    if unknown:
        raise ValueError(f"{directory}/model_index.json: a {pipeline} has no part {unknown[0]}")
    net_name, wide = next(iter(classes)), torch.promote_types(dtype, torch.float32)
    if file and classes[net_name] not in ORIGINAL:
        raise ValueError(f"--weights {file}: an original single file can be read of SD3 and FLUX, not of a {pipeline}: "
                         f"give a directory as diffusers has them")
    if net_name not in parts:
        raise ValueError(f"{directory}/model_index.json names no {net_name}: this is no complete pipeline")

    def config(name):
        return configs.get(name) or skeleton(classes[name], directory / name).config
    if init:
        return random_pipeline(pipeline, shift, {name: config(name) for name in (net_name, "vae") if name in parts},
                               dtype, device, text_length)

    def part(name, dtype):
        cls, folder = classes[name], directory / name
        if file is None or any(folder.glob("*.safetensors*")) and name != net_name:
            return cls.from_pretrained(folder, dtype, device)
        stems = BESIDE["text_encoder_3"] if cls is T5Encoder else BESIDE.get(name, ())   # FLUX's second is T5, too
        inside = ORIGINAL[cls][0] or (f"text_encoders.{stems[-1]}.transformer.",)
        with open_tensors(file) as tensors:                           # what the file itself holds comes first
            own = name == net_name or any(key.startswith(inside) for key in tensors.keys())
        beside = [path for stem in stems if not own and (path := directory / f"{stem}.safetensors").is_file()]
        source, options = (beside or [file])[0], config(name)
        try:
            return from_single_file(cls, source, options, dtype, device, inside)
        except ValueError as error:
            if name == net_name or beside:
                raise
            names = " or ".join(f"{stem}.safetensors" for stem in stems)
            raise FileNotFoundError(f"the {name} is neither in {folder} nor, as {names}, beside {file}, nor inside it "
                                    f"({error})") from None
    names, tokenizers = [name for name in classes if name.startswith("text_encoder") and name in parts], []
    for name in names:
        folder = directory / name.replace("text_encoder", "tokenizer")
        is_t5 = classes[name] is T5Encoder
        tokenizers.append(T5Tokenizer(folder, text_length or 128) if is_t5 else CLIPTokenizer(folder))
    encoders = [part(name, dtype) for name in names]
    if family == "flux" and encoders and hasattr(encoders[0], "text_projection"):        # its CLIP is a CLIPTextModel,
        encoders[0].config["architectures"] = ["CLIPTextModel"]                          # whatever the file holds
        del encoders[0].text_projection
    pipe = TextToImage(family, part(net_name, net_dtype or dtype), encoders, tokenizers,
                       part("vae", wide) if "vae" in parts else None, shift)
    pipe.source = directory
    check_widths(pipe, directory, names)
    if family == "flux" and not text_length:
        tokenizers[1].length = 512 if pipe.net.config["guidance_embeds"] else 256
    if family == "uvit" and len(tokenizers) == 2:
        tokenizers[1].length = t5_room(pipe.net, tokenizers[0], text_length)
    if family == "sd3" and "text_encoder_3" not in names:
        narrow = sum(encoder.config["hidden_size"] for encoder in encoders) < pipe.net.config["joint_attention_dim"]
        pipe.blank = (text_length or 128) if narrow else 0
    return pipe


# ---------------------------------------------------------------------------------------------------------- schedules

# prod_m (1 - beta_m), m <= n, of Stable Diffusion 1's 1000 DDPM steps: sqrt(beta) runs evenly between two roots.
ALPHA_BAR = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).tolist()


@functools.cache
def alpha_bar(device, dtype):
    """ALPHA_BAR as a tensor (1000,), made once: to copy a list to a GPU is to wait for it."""
    return torch.tensor(ALPHA_BAR, device=device, dtype=dtype)


def flux_shift(tokens):
    """FLUX.1-dev's shift for an image of so many tokens: e^mu, mu from 0.5 at 256 tokens to 1.15 at 4096, a line."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def schedule(steps, shift=1.0, kind="linear"):
    """The times of a sampler: steps + 1 floats from (about) 1 down to 0.

    linear  shift(linspace(1, 0)), shift(t) = s t / (1 + (s - 1) t)              Esser et al., arXiv:2403.03206, Eq. 23
            with shift = flux_shift(tokens) FLUX.1-dev's own, with shift 1 -schnell's
    sd3     as diffusers' FlowMatchEulerDiscreteScheduler makes it: the low end is shifted twice and 0 is appended
    dpm     the times of DGPO's DPM-Solver++ on flow sigmas: starts just under 1, where its log-SNR is finite
    ddim    integer DDPM steps instead, for ALPHA_BAR: diffusers' DDIMScheduler as Stable Diffusion 1 configures it
            ("leading", offset 1), and 0, whose alpha_bar is the one that its last step arrives at
    Raises ValueError for steps < 1 (and for ddim > 999: the offset is one step) or an unknown kind.
    """
    if steps < 1 or (kind == "ddim" and steps > 999):
        raise ValueError(f"steps={steps}: a sampler takes at least one step, DDIM at most 999")

    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)
    if kind == "linear":
        return [shifted(1 - i / steps) for i in range(steps + 1)]
    if kind == "sd3":
        low = shifted(1 / 1000)
        return [shifted(1 + (low - 1) * i / max(steps - 1, 1)) for i in range(steps)] + [0.0]
    if kind == "dpm":
        return [shifted((1 - 1 / 1000) * (1 - i / steps)) for i in range(steps)] + [0.0]
    if kind == "ddim":
        return [i * (1000 // steps) + 1 for i in reversed(range(steps))] + [0]
    raise ValueError(f"schedule kind={kind!r}: 'linear', 'sd3', 'dpm' or 'ddim'")


# --------------------------------------------------------------------------------------------------------------- LoRA

class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank * B A x (Hu et al., arXiv:2106.09685).

    `add_lora` makes it of a Linear in place, so that W keeps its name; A and B are trained in float32.
    """

    def forward(self, x):
        if self.lora_merged:                                           # compiled blocks look at this: one graph each
            return super().forward(x)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return super().forward(x) + F.linear(self.lora_scale * F.linear(x, a), b)


def lora_layers(net):
    """The layers that `add_lora` changed, {name: module} in the network's order."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LoRALinear)}


def add_lora(net, rank, alpha, targets, whole=False):
    """Freeze a network and give each Linear whose name ends in one of `targets` a trained low-rank update, in float32.

    A is N(0, 1/rank^2) (peft's "gaussian"), B is 0, so the network starts unchanged. whole: targets are whole names,
    not ends. Returns the trained parameters. Raises ValueError for a rank under 1, an alpha not above 0, a second LoRA,
    no targets or one that no layer's name ends in.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank}, alpha={alpha}: a LoRA has rank 1 or more (0 on the command line trains all "
                         f"weights), and an alpha above 0")
    if lora_layers(net):
        raise ValueError("the network has a LoRA already: load the network anew, or load_lora into the one it has")
    if isinstance(targets, str) or not (targets := tuple(targets)):
        raise ValueError(f"targets={targets!r}: give a LoRA a tuple of ends of layers' names, such as ('attn.to_q',)")
    linear = {name: module for name, module in net.named_modules() if type(module) is nn.Linear}

    def meant(name, target):                                           # all of it, or its last words
        return name == target or not whole and name.endswith("." + target)
    for target in targets:
        if not any(meant(name, target) for name in linear):
            raise ValueError(f"the LoRA target {target} ends the name of no Linear layer; one that would do is "
                             f"{list(linear)[-1]}")
    net.requires_grad_(False)
    for name, module in linear.items():
        if any(meant(name, target) for target in targets):
            module.__class__ = LoRALinear
            module.lora_scale, module.lora_merged, device = alpha / rank, False, module.weight.device
            dtype = torch.promote_types(module.weight.dtype, torch.float32)
            drawn = torch.randn(rank, module.in_features, device="cpu", dtype=dtype)      # the same for every device
            module.lora_A = nn.Parameter(drawn.to(device) / rank)
            module.lora_B = nn.Parameter(torch.zeros(module.out_features, rank, device=device, dtype=dtype))
    return trainable(net)


def trainable(net):
    """The parameters that receive gradients, in the network's order."""
    return [p for p in net.parameters() if p.requires_grad]


@contextlib.contextmanager
def merged(net, on=True):
    """Run a block, without gradients, with the LoRA added into the weights: no extra work per layer. on: do it at all.

    In bf16 the sum is rounded to the weights' dtype, so the network is not quite the trained one: for evaluation, and
    rollouts whose log-probs nobody asks for. The weights' own values wait beside, and come back bit for bit.
    """
    layers = [module for module in lora_layers(net).values() if on and not module.lora_merged]
    own = [module.weight.data for module in layers]
    try:
        for module in layers:
            update = module.lora_scale * module.lora_B.data @ module.lora_A.data                 # (out, in) float32
            module.weight.data = (module.weight.data + update).to(module.weight.dtype)
            module.lora_merged = True
        yield
    finally:
        for module, weight in zip(layers, own):
            module.weight.data, module.lora_merged = weight, False


def save_lora(net, file):
    """Write the LoRA as diffusers' load_lora_weights reads it. B is written times alpha / rank.

    Such a file states no alpha, and every version of diffusers then takes alpha / rank = 1. Raises ValueError for a
    network without a LoRA and for a full disk, FileNotFoundError for a folder that does not exist.
    """
    import data
    layers, state = lora_layers(net), {}
    if not layers:
        raise ValueError(f"{file}: the network has no LoRA to write: call add_lora first, or save_pretrained for the "
                         f"network itself")
    if not Path(file).parent.is_dir():
        raise FileNotFoundError(f"{Path(file).parent} does not exist: make this folder before a LoRA goes into it")
    for name, module in layers.items():
        name, a, b = net.lora_prefix + name, module.lora_A.detach(), module.lora_B.detach() * module.lora_scale
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = a.cpu().contiguous(), b.cpu().contiguous()
    data.write_atomic(file, save(state, {"format": "pt"}))


def lora_file(path):
    """The LoRA file of a path: itself, or in a folder peft's, else diffusers'. FileNotFoundError for neither."""
    if not Path(path).is_dir():
        return path
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    for file in (Path(path) / name for name in names):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path} holds no {' and no '.join(names)}: give the LoRA's file itself")


FOREIGN = {                                                           # in a tensor's name -> whose LoRA is not read
    "text_encoder": "a text encoder's", "lora_te": "a text encoder's", "lora_unet_": "in kohya's format",
    "lora_transformer_": "in kohya's format", ".processor.": "in an old format of diffusers, or in XLabs'"}


def lora_file_scale(file):
    """alpha / rank as a LoRA file states it: diffusers in the header, peft in a file beside it, DanceGRPO's code in its
    lora_config.json there; 1 where none does.

    A file is peft's by its tensors' names or its own. Raises ValueError where it is damaged or of another kind, and
    FileNotFoundError where it is peft's, without adapter_config.json.
    """
    with open_tensors(file) as tensors:
        header, keys = (tensors.metadata() or {}).get("lora_adapter_metadata", "{}"), list(tensors.keys())
    for key, mark in itertools.product(keys, FOREIGN):
        if mark in key:
            raise ValueError(f"{file}: {key} is {FOREIGN[mark]}: only the network's LoRA is read, in today's format of "
                             f"diffusers, which converts it: load_lora_weights(FILE, adapter_name='default') of a "
                             f"pipeline, then save_lora_adapter(FOLDER) of its transformer or unet")
    try:
        config = {**json.loads(header)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged, its lora_adapter_metadata ({error}): download it again") from None
    by_peft = any(key.startswith("base_model.model.") for key in keys)
    if not config and (by_peft or Path(file).name == "adapter_model.safetensors"):
        beside = Path(file).with_name("adapter_config.json")
        if not beside.is_file():
            raise FileNotFoundError(f"{beside} is missing, and only it states alpha and rank of {Path(file).name}, "
                                    f"which peft wrote: copy it there too")
        config = read_json(beside)
    beside = Path(file).with_name("lora_config.json")
    if not config and beside.is_file():
        stated = read_json(beside).get("lora_params") or {}
        config = {"r": stated.get("lora_rank"), "lora_alpha": stated.get("lora_alpha")}
        if not all(config.values()):
            raise ValueError(f"{beside} states no lora_params with lora_rank and lora_alpha")
    config = {key.removeprefix("transformer.").removeprefix("unet."): value for key, value in config.items()}
    for option in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
        if config.get(option):
            raise ValueError(f"{file}: {option} is not implemented: one rank and one alpha for all layers")
    alpha, rank = (config.get(name) for name in ("lora_alpha", "r")) if "r" in config else (1, 1)
    if not all(isinstance(number, (int, float)) and number > 0 for number in (alpha, rank)):
        raise ValueError(f"{file}: its lora_alpha is {alpha!r}, its r {rank!r}: both are numbers above 0")
    return alpha / rank


def load_lora(net, file):
    """Read a LoRA of `save_lora`, diffusers or peft into a network, strictly. file: a folder of the latter two, too.

    A network that `add_lora` prepared keeps its own alpha / rank: B takes up the file's. One without a LoRA gets the
    file's, on its layers and at its rank. Raises as `lora_file`, `lora_file_scale`, `add_lora` and `read_tensors` do,
    and ValueError where the ranks differ.
    """
    file, end, bare, trained = lora_file(file), ".lora_A.weight", not lora_layers(net), trainable(net)
    scale = lora_file_scale(file)

    def rename(key):
        key = key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")    # diffusers' scripts for SD1
        key = key.replace(".default.weight", ".weight")                                  # peft's in memory
        return key.removeprefix(net.lora_prefix).removeprefix("base_model.model.")
    if bare:
        with open_tensors(file) as tensors:
            ranks = {rename(key).removesuffix(end): next(iter(tensors.get_slice(key).get_shape()), 0)
                     for key in tensors.keys() if rename(key).endswith(end)}
        if len(set(ranks.values())) != 1:
            raise ValueError(f"{file} holds no LoRA of one rank, but {sorted(set(ranks.values())) or 'none'}")
        rank = next(iter(ranks.values()))
        try:
            add_lora(net, rank, rank, ranks, whole=True)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    layers = lora_layers(net)
    want = {f"{name}.{part}.weight": getattr(module, part)
            for name, module in layers.items() for part in ("lora_A", "lora_B")}
    try:
        found = dict(read_tensors([file], want, rename))
    except (OSError, ValueError):
        for module in layers.values() if bare else ():                # as it was
            module.__class__ = nn.Linear
            del module.lora_A, module.lora_B, module.lora_scale, module.lora_merged
        for p in trained:
            p.requires_grad_(True)
        raise
    with torch.no_grad():
        for name, tensor in found.items():
            want[name].copy_(tensor)
        for module in layers.values():
            module.lora_B *= scale / module.lora_scale


@contextlib.contextmanager
def using(params, values):
    """Run a block under other weights: the tensors in `values` stand in for the parameters, and nothing is copied.

    This is how one network serves as policy, old policy and reference. values None: the parameters as they are.
    A backward pass belongs inside the block: after it, autograd would meet the parameters' own values. And no block
    belongs between a pass with gradients and its backward pass: FSDP2 gathers the shards again for that, on a stream
    which does not wait for the values that are put back.
    """
    if values is None:
        yield
        return
    own = [p.data for p in params]
    if is_sharded(params):                       # FSDP2 gathers from memory of its own: there, values are copied over
        own = [data.clone() for data in own]
    try:
        _swap(params, values)
        yield
    finally:
        _swap(params, own)


def _swap(params, values):
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            if is_sharded([p]):
                p.copy_(value)
            else:
                p.data = value


# -------------------------------------------------------------------------------------------------- shards and memory

def shard(net, dtype):
    """Cut a network's weights into one shard a process (FSDP2): kept in float32, gathered block by block in `dtype`.

    Gradients are summed, not averaged, over the processes. The process group must exist.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    wide = torch.promote_types(dtype, torch.float32)
    mesh = init_device_mesh(next(net.parameters()).device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)     # times stay wide
    for module in [module for module in net.modules() if isinstance(module, net.blocks)] + [net]:
        # One block at a time in float32. Freed after every pass, also the outermost, so that new values are seen.
        fully_shard(module.to(wide), mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)                # by a plain sum: gloo has no other
    net.compute_dtype = dtype


def compute_dtype(net):
    """The dtype that a network's inputs want: its shards', its weights' own, or float32 of a plain function."""
    weights = net.parameters() if isinstance(net, nn.Module) else ()
    return getattr(net, "compute_dtype", None) or next((p.dtype for p in weights), torch.float32)


def is_sharded(tensors):
    """Are these parameters shards of FSDP2?"""
    return bool(tensors) and hasattr(tensors[0], "to_local")         # a DTensor, whose import takes half a second


def local(tensors):
    """The plain tensors behind a list of parameters: this process's shards, or the parameters' own values."""
    return [tensor.to_local() if is_sharded([tensor]) else tensor.detach() for tensor in tensors]


@torch.no_grad()
def move(average, params, weight):
    """Move a moving average towards the parameters by weight, in place: average += weight (params - average)."""
    torch._foreach_lerp_(local(average), local(params), weight)


# ---------------------------------------------------------------------------------------------------------- curvature

def fisher_product(mean, std, params, v):
    """F v of the Gaussian policy N(mean, std^2), F = J'J / std^2 averaged over images and dimensions, J = dmean/dp.

    mean: (n, C, H, W), twice differentiable in params; v: tensors like params; returns such a list. No matrix is made:
    J v is the derivative in u of J'u, which is linear in u.
    """
    u = torch.zeros_like(mean, requires_grad=True)
    back = torch.autograd.grad(mean, params, u, create_graph=True, materialize_grads=True)             # J'u = 0
    jv, = torch.autograd.grad(sum((b * x).sum() for b, x in zip(back, v)), u, retain_graph=True)       # (n, C, H, W)
    return torch.autograd.grad(mean, params, jv / (mean.numel() * std ** 2), materialize_grads=True)


def largest_eigenvalue(product, v, steps=12):
    """The largest eigenvalue of a positive matrix by power iteration from v (n,), product: v -> F v. From below."""
    for _ in range(steps):
        v = product(v / v.norm())
    return v.norm().item()


def fisher(policy, steps, images, params, v, run):
    """(lambda_max of the policy's Fisher matrix, E|grad log pi|^2), the means over images, steps and processes.

    policy(i, images): step i's log-probs (n,) per dimension, mean (n, C, H, W), std, and more; steps, images: lists of
    indices; v: (parameters,) noise to start from, the same on every process of data's `run`.
    """
    def product(v):
        parts, out = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in params]), params)], torch.zeros_like(v)
        for i, j in itertools.product(steps, images):                  # one graph at a time: an image of SD3.5 takes GB
            mean, std = policy(i, [j])[1:3]
            out += torch.cat([g.flatten() for g in fisher_product(mean, std, params, parts)])
        return run.sum(out) / (len(steps) * len(images) * run.world)

    with run.uncounted(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):          # has second derivatives
        square = torch.zeros((), device=v.device, dtype=v.dtype)
        for j in images:
            total = [torch.zeros_like(p) for p in params]
            for i in steps:
                logp = policy(i, [j])[0].sum() / len(steps)
                torch._foreach_add_(total, torch.autograd.grad(logp, params, materialize_grads=True))
            square += sum(g.square().sum() for g in total) / len(images)
        return largest_eigenvalue(product, v), (run.sum(square) / run.world).item()


MEMORY = {      # family -> GB of one GPU -> images at once, a LoRA at 512 px: with gradient checkpointing; without (0:
    "sd3": {24: (24, 0), 48: (48, 16), 80: (48, 24), 141: (96, 48)},                             # too few would fit)
    "flux": {48: (12, 0), 80: (24, 0), 141: (48, 8)},
    "sd14": {24: (16, 16), 48: (32, 32), 80: (64, 64), 141: (96, 96)},
    "uvit": {24: (96, 16), 48: (96, 32), 80: (96, 48), 141: (192, 96)}}
PUBLIC = {"sd3": 2_243_171_520, "flux": 11_901_408_320, "sd14": 859_520_964, "uvit": 515_311_568}    # of its networks


def memory_plan(family, gigabytes, lora_rank=0, guided=False, shards=0, parameters=None):
    """--gpu-memory: {micro_batch, checkpointing, offload} for a model family on a GPU of so many GB.

    For a LoRA at 512 px; guided, with gradients through both of guidance's passes, half as many images; full
    fine-tuning (lora_rank 0) a quarter, always with checkpointing, which costs a forward pass of every update.
    shards: the processes that --fsdp shares weights, moments and averages out to, 0 without it. These may take 0.9 of a
    GPU, of shards 0.6: blocks are gathered beside them, and such runs are not counted.
    parameters: the network's, None for the family's public one; a larger one (SD3.5 Large) has fewer images: each
    takes more, in proportion, of what its weights leave. By csrc/count.py a step's tensors take at most 0.79 of the
    GPU (0.84 in rollouts of FLUX on 48 GB with the LoRA merged); rewards, CUDA and what the allocator loses have the
    rest. Raises ValueError with what would fit.
    """
    plans, public = MEMORY.get(family, {}), PUBLIC.get(family)
    parameters = parameters or public
    if gigabytes not in (24, 48, 80, 141):
        raise ValueError(f"--gpu-memory {gigabytes}: 24, 48, 80 or 141")
    if gigabytes not in plans:
        known = "known are sd35m, flux, sd14, uvit and their directories"
        fits = f"it wants --gpu-memory {min(plans)}" if plans else known
        raise ValueError(f"--gpu-memory {gigabytes}: there is no plan for this model: {fits}")
    byte = 2e-9 if lora_rank else 24e-9 / max(shards, 1)              # GB a parameter: bf16, or all that training keeps
    if not lora_rank and byte * parameters > (0.6 if shards else 0.9) * gigabytes:
        more = "more processes" if shards else "torchrun and --fsdp"
        raise ValueError(f"--gpu-memory {gigabytes}: all weights of this model, their moments and averages take about "
                         f"{math.ceil(byte * parameters)} GB: --lora-rank 64, or {more}")

    def fitting(size):                                                # (images, checkpointing)
        checkpointed, plain = plans[size]
        images = plain or checkpointed if lora_rank else checkpointed / 4
        if parameters > public:
            left, usual = (0.9 * size - byte * count for count in (parameters, public))
            images *= left / usual * public / parameters
        return int(images), not (lora_rank and plain)
    images, checkpointing = fitting(gigabytes)
    if images < 1:
        larger = [size for size in sorted(plans) if size > gigabytes and fitting(size)[0] > 0]
        fits = f"it wants --gpu-memory {larger[0]}" if larger else "try --micro-batch 1 instead, or torchrun and --fsdp"
        raise ValueError(f"--gpu-memory {gigabytes}: beside the {parameters / 1e9:.1f} B parameters of this model "
                         f"there is no room for an image: {fits}")
    images = max(1, images // 2) if guided else images
    return {"micro_batch": images, "checkpointing": checkpointing, "offload": gigabytes == 24}


# -------------------------------------------------------------------------------------------------------- pretraining

TINY = dict(sample_size=28, patch_size=4, in_channels=3, out_channels=3, num_layers=4, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128,
            pos_embed_max_size=8, qk_norm="rms_norm")                 # SD3.5's transformer, small, on pixels
TINY_TEXT = dict(hidden_size=128, intermediate_size=512, projection_dim=128, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=16)


def train_tokenizer(words, directory, length):
    """Make a CLIP tokenizer with one token for each of `words`; write CLIP's files. Returns the vocabulary's size.

    Byte-pair encoding, the most frequent pair first, of equals the first by name: the library's trainer breaks ties
    by chance, and a pretraining that goes on needs the same tokens. Source: Sennrich et al., arXiv:1508.07909.
    """
    from tokenizers import pre_tokenizers
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = [word for text in words for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]
    parts, merges = [[*word[:-1], word[-1] + "</w>"] for word in found], []
    while pairs := collections.Counter(pair for part in parts for pair in itertools.pairwise(part)):
        merges.append(best := min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for part in parts:
            for i in range(len(part) - 1):
                if tuple(part[i:i + 2]) == best:                       # part has got shorter: past its end, no match
                    part[i:i + 2] = ["".join(best)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]           # the end has the largest id
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "bos_token": "<|startoftext|>",
         "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, indent=2) + "\n")
    return len(tokens)


def pretrain(args):
    """Make the tiny model: flow matching on the tiny world, network and text encoder together, from one seed.

    Loss: E |v_theta((1 - t) x_0 + t eps, t, caption) - (eps - x_0)|^2, t logit-normal(0, 1), a tenth of the captions
    emptied (Esser et al., arXiv:2403.03206, Sec. 3). Matrices are trained by Muon, the rest by AdamW; the rate is
    constant and falls to zero over the last fifth. The moving average of the weights is what is saved.
    """
    import data
    from tqdm import tqdm
    out, device = Path(args.out), args.device
    torch.manual_seed(args.seed)
    vocab = train_tokenizer(data.WORLD_WORDS, out / "tokenizer", TINY_TEXT["max_position_embeddings"])
    tokenizer = CLIPTokenizer(out / "tokenizer")
    net = MMDiT(**TINY).init_weights().to(device)
    ends = dict(vocab_size=vocab, bos_token_id=vocab - 2, eos_token_id=vocab - 1)
    text = CLIPText(**TINY_TEXT, **ends).init_weights().to(device)
    both = nn.ModuleDict({"transformer": net, "text_encoder": text})
    matrices = [p for name, p in both.named_parameters() if p.ndim == 2 and "embedding" not in name]
    rest = [p for name, p in both.named_parameters() if p.ndim != 2 or "embedding" in name]
    optimizers = [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99))]
    ema, first, file = [p.detach().clone() for p in both.parameters()], 0, Path(args.state)
    settings = {name: getattr(args, name) for name in ("seed", "images", "batch", "lr")}
    if file.is_file():
        state = torch.load(file, map_location=device, weights_only=True)
        if state.get("settings") != settings:
            raise ValueError(f"--state {file} is of a run with {state.get('settings', 'another vocabulary')}: choose "
                             f"another, or delete it")
        both.load_state_dict(state["net"])
        ema, first = state["ema"], state["step"]
        for opt, value in zip(optimizers, state["optimizers"]):
            opt.load_state_dict(value)

    def save(step):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"net": both.state_dict(), "ema": ema, "optimizers": [opt.state_dict() for opt in optimizers],
                    "step": step, "settings": settings}, f"{file}.new")
        os.replace(f"{file}.new", file)

    def velocity(x_t, t, ids):
        return net(x_t, t, *text(ids))

    steps, size = args.images // args.batch, TINY["sample_size"]
    velocity = torch.compile(velocity) if args.compile else velocity
    artist = ThreadPoolExecutor(1)
    ahead = artist.submit(data.world_batch, args.seed, first, args.batch, size)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="pretrain", mininterval=5, dynamic_ncols=True)
    for step in bar:
        images, captions, _ = ahead.result()                                             # drawn while the last step ran
        ahead = artist.submit(data.world_batch, args.seed, step + 1, args.batch, size)
        draw = torch.Generator().manual_seed(data.mix(args.seed, step))
        captions = ["" if u < 0.1 else c for u, c in zip(torch.rand(len(captions), generator=draw).tolist(), captions)]
        t = torch.randn(args.batch, generator=draw).sigmoid().to(device)                 # (B,)
        eps = torch.randn(images.shape, generator=draw).to(device)
        x_0 = images.to(device) * 2 - 1                                                  # (B, 3, size, size)
        x_t = x_0 + t[:, None, None, None] * (eps - x_0)
        rate = args.lr * min(1, (step + 1) / 200, (steps - step) / (0.2 * steps))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.bf16):
            v = velocity(x_t, t, tokenizer(captions).to(device))                         # (B, 3, size, size)
        loss = (v.float() - (eps - x_0)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for opt in optimizers:
            opt.param_groups[0]["lr"] = rate
            opt.step()
            opt.zero_grad(set_to_none=True)
        torch._foreach_lerp_(ema, [p.data for p in both.parameters()], max(1 - 0.9985, 1 / (step + 1)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", images=f"{(step + 1) * args.batch:,}")
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save(step + 1)
    with using(list(both.parameters()), ema):
        for name in both:
            save_pretrained(both[name], out / name, torch.float16)
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
             "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "text_encoder_2": [None, None],
             "tokenizer_2": [None, None], "text_encoder_3": [None, None], "tokenizer_3": [None, None],
             "vae": [None, None], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Make the tiny model by flow matching on the tiny world.")
    parser.add_argument("command", choices=["pretrain"])
    parser.add_argument("--out", default="runs/pretrain/tiny", help="the model's directory, diffusers layout")
    parser.add_argument("--state", default="runs/pretrain/state.pt", help="what a resume needs; found, it is resumed")
    parser.add_argument("--images", type=int, default=512_000, help="training images in all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak rate of Muon and AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between states")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile: x 1.3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    import data
    with data.exit_codes():
        pretrain(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
