"""A script of ours as csrc/bench.py model times it: as it is, or on the network of diffusers and the LoRA of peft.

    python csrc/peer.py released dgpo --model sd35m --init random ...

The loop, its batches and its flags are the script's, so that the work is the same; network, LoRA and VAE are theirs.
The first word says how they hold the network: `bfloat16`, or `released`, as Flow-GRPO's and DGPO's code for a LoRA, in
float32 under autocast. Both run the LoRA beside the weights in rollouts, too. They need diffusers and peft, as the
tests do; `ours` changes nothing and needs neither. T2I_GPU_CAP=24 makes the GPU one of 24 GB: PyTorch gets 23.5. What
its allocator took at most is the last line on stderr. A run ends with the process that started it, however that ends.
"""
import importlib
import os
import pathlib
import signal
import sys
import threading
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import models  # noqa: E402


class Peer(torch.nn.Module):
    """diffusers' network on the tensors of ours, called as ours is. Source of the calls: diffusers' own pipelines."""

    blocks, lora_prefix = (), ""

    def __init__(self, net, released):
        super().__init__()
        with torch.device("meta"):
            self.net = getattr(diffusers, net.config["_class_name"]).from_config(net.config)
        self.net.load_state_dict(net.state_dict(), assign=True)
        self.config, self.patch, self.channels = net.config, net.patch, net.channels
        self.lora_targets = net.lora_targets
        self.call = getattr(self, net.config["_class_name"])
        if released:
            self.net.float()
        device = next(self.net.parameters()).device.type
        self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=released)

    def forward(self, x, t, *ctx):
        with self.autocast():
            return self.call(x, t, *ctx)

    def SD3Transformer2DModel(self, x, t, context, pooled):
        return self.net(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t * 1000).sample

    def UNet2DConditionModel(self, x, n, context):
        return self.net(x, n, encoder_hidden_states=context).sample

    def FluxTransformer2DModel(self, x, t, context, pooled, guidance=None):
        b, c, h, w = x.shape
        packed = diffusers.FluxPipeline._pack_latents(x, b, c, h, w)
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, torch.float32)
        v = self.net(packed, timestep=t, guidance=guidance, encoder_hidden_states=context, pooled_projections=pooled,
                     img_ids=ids, txt_ids=torch.zeros(context.shape[1], 3, device=x.device)).sample
        return diffusers.FluxPipeline._unpack_latents(v, h * 8, w * 8, 8)

    @property
    def checkpointing(self):
        return self.net.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on):
        if on:
            self.net.enable_gradient_checkpointing()

    def save_pretrained(self, *_):
        """Nothing: a benchmark's weights are of no use."""


class PeerVAE(torch.nn.Module):
    """diffusers' VAE in float32 on the tensors of ours, a whole batch at once, as the released code decodes."""

    def __init__(self, vae):
        super().__init__()
        with torch.device("meta"):
            self.vae = diffusers.AutoencoderKL.from_config(vae.config)
        self.vae.load_state_dict(vae.state_dict(), assign=True)
        self.vae.float()
        self.factor, self.scale, self.shift = vae.factor, vae.scale, vae.shift

    def decode(self, latents):
        return (self.vae.decode(latents.float() / self.scale + self.shift).sample / 2 + 0.5).clamp(0, 1)


def patch(released):
    """From here on models.load gives peers, and models.add_lora peft's LoRA, as strong and as wide as ours."""
    global diffusers, peft                                               # not needed for our own side
    import diffusers
    import peft
    load = models.load

    def peers(*args, **settings):
        pipe = load(*args, **settings)
        pipe.net = Peer(pipe.net, released)
        pipe.vae = pipe.vae and PeerVAE(pipe.vae)
        return pipe

    def add_lora(net, rank, alpha, targets):
        net.requires_grad_(False)
        net.net = peft.get_peft_model(net.net, peft.LoraConfig(
            r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets)))
        return models.trainable(net)
    models.load, models.add_lora, models.save_lora = peers, add_lora, lambda *_: None
    torch.backends.cuda.enable_cudnn_sdp = lambda on: None               # attention by whatever PyTorch takes itself


def end_with(parent):
    """Wait until the parent has ended, then end at once: an orphan, which would finish its step, keeps a GPU busy."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv):
    how, script, *flags = argv
    if how not in ("ours", "released", "bfloat16"):
        raise SystemExit(f"{how}: ours, released or bfloat16")
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    if how != "ours":
        patch(how == "released")
    run, gigabytes = importlib.import_module(script).main, float(os.environ.get("T2I_GPU_CAP", 0))
    if gigabytes and torch.cuda.is_available():                          # half a GB is CUDA's own, about
        share = (gigabytes - 0.5) * 1e9 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    run(flags)
    if torch.cuda.is_available():
        print(f"\nreserved {torch.cuda.max_memory_reserved() / 1e9:.3f} GB", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
