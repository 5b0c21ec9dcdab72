"""DGPO: direct group preference optimization for flow-matching text-to-image models, in one file.

Sample a group of images per prompt with a fast ODE, score them, and teach the network to denoise the better ones better
than the reference does, the worse ones worse. No stochastic policy, no log-probs, no trajectory to store.
Paper: Luo et al., arXiv:2510.08425. (n) is this file's number, [n] the paper's. B = P G images: P prompts, G of each.

    (1) [12]      A_i = (r_i - mean_g r) / std_g r                                                  group_advantage
    (2) [13, 14]  G+ = {A > 0}, G- = {A <= 0}, w = |A|: sum_G+ w (.) - sum_G- w (.) = sum_i A_i (.)     dgpo_loss
    (3) [22]      l_i = lambda_t |x_0hat - x_0|^2,  x_t = (1 - t) x_0 + t eps,  x_0hat = x_t - t v            dsm_loss
    (4) [17]      L = -log sigmoid(-beta/G sum_i A_i (l_i - l_ref,i))                                    dgpo_loss
    (5) Alg. 1    t ~ U[t_min, 1], one t and one eps a group; theta- samples, theta_ref anchors              train
    (6)           + kl_beta |v - v_ref|^2 + hold |v - v_start|^2, this one at t < min(hold_below, t_min)  learn, hold

l is denoising score matching's loss, `dsm` in the code; v the network's answer; theta the weights in training, theta-
those that sample, theta_ref the reference's.
Why (4): DPO gives an image the reward beta ln(p/p_ref) + beta ln Z, the first term about -beta (l - l_ref); (4) says
that G+ beats G- (Bradley-Terry), the rewards summed with weights w. As sum_i A_i = 0 in a group, its unknown Z drops
out; not where --adv-clip cuts an A, which by the group's std can happen only in groups of more than 26 images.
Departs from the paper: l is a mean over the latent's D dimensions; beta is the paper's times T, G and D, as in the
released code; the loss is divided by beta. (6)'s KL, the clip of l, the cut of advantages, times from the sampler's
grid and a moving reference are the released code's; hold is ours: README, "What keeps DGPO stable".

    python dgpo.py                                              # the tiny model, minutes on a laptop CPU
    torchrun --nproc_per_node 2 dgpo.py                         # the same run on two processes
"""
import math
from dataclasses import dataclass
from functools import partial

import data                             # first: sets GOMP_SPINCOUNT, which torch reads once
import torch
import torch.nn.functional as F

import models
from csrc import ops

# ============================================================================================================= Config


# [source] behind a default: where it comes from; [source: 16]: there it is 16.
@dataclass
class Config:
    model: str = "tiny"                 # tiny, sd35m, flux, sd14, or a directory in the diffusers layout
    weights: str = ""                   # the model's directory or original single file, if not weights/<model>
    init: str = ""                      # random: random weights at full size, to measure without a download
    method: str = "dgpo"                # dgpo, or diffusion-dpo: only the best and the worst of each group   [Eq. 7]
    preset: str = ""                    # tiny, paper (Alg. 1, else as released), official (the released GenEval run)
    reward: str = "shapes"              # a name, a weighted sum a:0.7,b:1.4, or file.py:function
    reward_mix: str = "reward"          # a sum of rewards, or of each one's advantages        [DanceGRPO, Alg. 1]
    eval_reward: str = ""               # what is reported; empty: shapes-strict, or --reward; public presets: their own
    gold_reward: str = ""               # logged beside it, to see a proxy being hacked; empty: shapes-strict or none
    reward_device: str = ""             # where rewards are computed, such as cpu or cuda:1; empty: where the run is
    reward_dtype: str = "float32"       # of the matrix products in --reward's CLIPs and imagereward: float32, bfloat16
    overlap: bool = False               # images are scored while the next are sampled: for GPUs and judges, not a CPU
    prompts: str = "shapes"             # shapes, geneval, geneval-unseen, ocr; a .txt, .jsonl, .json, .csv, a folder
    steps: int = 100000                 # rollouts; each is followed by `updates` optimizer steps
    minutes: float = 4.0                # stop after so many, evaluation at the end not counted
    sample_steps: int = 10              # network evaluations of a rollout                         [paper, Sec. 3.2]
    eval_steps: int = 10                # network evaluations of an image in evaluation
    groups: int = 8                     # prompts a rollout, over all processes
    group_size: int = 24                # G, images a prompt                                       [released code: 16]
    resolution: int = 0                 # pixels; 0: the checkpoint's own
    solver: str = ""                    # of the ODE: euler, dpm (DPM-Solver++(2M)), ddim; empty: euler, SD1's ddim
    sde: bool = False                   # rollouts by Flow-GRPO's SDE, its last step without noise: the paper's ablation
    schedule: str = ""                  # times of the samplers: linear, sd3, dpm, ddim; empty: linear, SD1's ddim
    shift: float = 0.0                  # shift of the schedule; 0: the checkpoint's own           [SD3: 3]
    noise_level: float = 0.7            # a of the SDE sampler                                     [Flow-GRPO]
    beta: float = 100.0                 # Eq. (4); App. D: 10, trained longer, hacks the reward    [released code]
    dsm: str = "v"                      # lambda_t of Eq. (3): v (1/t^2, released code), x0 (1), elbo ((1-t)/t^3)
    t_min: float = 0.5                  # timestep clip: t ~ U[t_min, 1]; 0: none       [paper, Sec. 3.2, no value]
    timesteps: int = 1                  # draws of (t, eps) for each group and update              [released code: 4]
    grid: bool = False                  # t from the sampler's times, without replacement    [released code: True]
    updates: int = 4                    # optimizer steps a rollout, each on all groups            [released code: 1]
    ref: str = "ema"                    # theta_ref: start (frozen, paper), ema, or old (the weights that sampled)
    rollout: str = "current"            # theta-: current, ema, or start (offline: groups from the first model)
    ema: float = 0.98                   # decay of the moving average, per update; evaluated and saved (0: off)
    ema_ramp: float = 0.0               # if above 0 update n's decay is min(ema, ema_ramp (n-1))  [released code: .001]
    rollout_after: int = 0              # updates before --rollout is heeded, current until then   [released code: 501]
    clip_range: float = 0.0             # no gradient past exp(l_old - l) = 1 + sign(A) c; 0: off  [released code: 1e-2]
    clip_old: str = "rollout"           # whose l_old the clip uses: rollout (theta-) or ema       [released code: ema]
    kl_beta: float = 0.05               # weight of the velocity KL mean |v - v_ref|^2             [released code: .02]
    kl_ref: str = "ref"                 # v_ref of the KL: theta_ref's (ref), or start's       [released code: start]
    hold: float = 0.1                   # weight of (6)'s hold: the sampler's last steps stay what they were; 0: off
    hold_below: float = 0.25            # hold acts at times below this, and only below t_min
    adv_clip: float = 5.0               # cuts advantages; by a group's std |A| <= sqrt(G - 1) anyway    [released code]
    adv_std: str = "group"              # (1): group, batch or none    [released code: group; OCR, PickScore: batch]
    cfg_rollout: float = 1.0            # guidance scale of the rollouts, 1 = off                  [released code: 4.5]
    cfg_train: float = 1.0              # guidance scale of the trained network in the loss
    cfg_ref: float = 1.0                # guidance scale of the reference in the loss
    cfg_eval: float = 1.0               # guidance scale of evaluation
    cfg_also: float = 3.0               # guidance scale of a second test evaluation, before and after training; 0: none
    lora_rank: int = 0                  # 0: train all weights                                     [released code: 64]
    lora_alpha: float = 128.0           # the LoRA is scaled by alpha / rank                       [released code]
    lr: float = 2e-4                    # AdamW                                                    [released code: 3e-4]
    weight_decay: float = 1e-4          # AdamW                                                    [released code]
    max_grad_norm: float = 0.05         # gradients are clipped to it; norms here are .02 to .06   [released code: 1]
    micro_batch: int = 96               # images at once in the network; rewards see whole groups
    gpu_memory: int = 0                 # GB, 24, 48, 80 or 141: chooses micro_batch, checkpointing and offload; 0: off
    checkpointing: bool = False         # gradient checkpointing: blocks are computed again in the backward pass
    offload: bool = False               # the VAE waits on the CPU while the network works
    compile: bool = False               # torch.compile of the network's blocks
    merge_lora: bool = False            # the LoRA is added into the weights in rollouts and evaluation; rounds in bf16
    fsdp: bool = False                  # FSDP2: weights and optimizer in shards (full fine-tuning, torchrun)
    text_length: int = 0                # T5's tokens; 0: SD3 128 (released code), FLUX.1-dev 512, -schnell 256
    text_cache: str = ""                # folder of the encoded prompts; empty: weights/text, nothing for small encoders
    guidance: float = 3.5               # the scale that FLUX.1-dev was distilled for; not the cfg_* scales
    dtype: str = "float32"              # the network computes in float32, bfloat16; float64 for tests
    eval_every: int = 10                # steps between evaluations on validation prompts (0: none)
    eval_images: int = 600              # test images, before and after
    val_images: int = 240               # validation images, on the way
    save_every: int = 10                # steps between checkpoints
    seed: int = 0                       # everything random is a function of (seed, step, group)
    out: str = ""                       # the run's folder; empty: a free runs/dgpo-NNN
    resume: bool = False                # go on from OUT/last with OUT's settings; on a CPU bit for bit
    fused: bool = True                  # compiled ops where built; --fused: build them first; --no-fused: plain PyTorch

    def __post_init__(self):
        data.check(self, words=dict(method=("dgpo", "diffusion-dpo"), dsm=("v", "x0", "elbo"),
                                    ref=("start", "ema", "old"), kl_ref=("ref", "start"), clip_old=("rollout", "ema"),
                                    rollout=("current", "ema", "start"), adv_std=("group", "batch", "none")),
                   least=dict(timesteps=1, clip_range=0, ema_ramp=0, kl_beta=0, hold=0),
                   positive=("beta", "hold_below"))
        if not 0 <= self.t_min < 1:
            raise ValueError(f"--t-min {self.t_min}: 0 or more, and less than 1")
        if self.hold_below > 1:
            raise ValueError(f"--hold-below {self.hold_below}: a time, so at most 1")
        if not self.ema and "ema" in (self.ref, self.rollout, self.clip_old):
            raise ValueError("--ema 0: --ref, --rollout and --clip-old ema want a moving average")


RELEASED = dict(prompts="geneval", reward="geneval", eval_reward="geneval",        # the released GenEval run, SD3.5-M;
                resolution=512, dtype="bfloat16", lr=3e-4, timesteps=4, updates=1, ref="start", kl_beta=0.02,
                hold=0.0, max_grad_norm=1.0,
                minutes=1e6, cfg_also=0.0, eval_every=50, micro_batch=24, merge_lora=True,
                overlap=True)                                          # these two lines ours
OFFICIAL = dict(groups=8, group_size=16, t_min=0.8, grid=True, clip_range=1e-2, clip_old="ema", ema=0.3, ema_ramp=1e-3,
                rollout="ema", rollout_after=501)                      # the released code's departures from Alg. 1
PAPER = dict(timesteps=1, ema=0.0, kl_beta=0.0, group_size=24, groups=32, t_min=0.6)      # Alg. 1; sizes and t_min ours
MODEL = {
    "sd3": dict(solver="dpm", schedule="dpm", shift=3.0, eval_steps=14, lora_rank=64, cfg_rollout=4.5, cfg_eval=4.5),
    "flux": dict(eval_steps=28, lora_rank=64, guidance=3.5),           # no run of these two is published: their own
    "sd14": dict(sample_steps=20, eval_steps=50, lora_rank=64, cfg_rollout=5.0, cfg_eval=5.0)}    # samplers, our choice
PRESETS = {                                                           # preset -> model family -> values
    "tiny": {},
    "paper": {family: {**RELEASED, **PAPER, **values} for family, values in MODEL.items()},
    "official": {family: {**RELEASED, **OFFICIAL, **values} for family, values in MODEL.items()}}


# =============================================================================================================== math

# == same: advantage (dgpo grpo proxt2i slas) ==
def group_advantage(reward, group_size, std="group"):
    """Group-relative advantages: A_i = (r_i - mean_g r) / (std + 1e-4).

    reward: (B,) float32, groups contiguous; NaN marks a failed one: out of every mean and std, advantage 0.
    std: "group", the population std of the group; "batch", of all rewards; "none", 1. A constant group gives 0.
    Returns (B,). Raises ValueError for another shape or std, a group_size < 2, or B no multiple of it.
    """
    ops.check_rewards("group_advantage", reward, group_size, std, ops.STD)
    if ops.compiled(reward):
        return ops.group_advantage(reward, group_size, std)            # the same in one kernel
    r = reward.view(-1, group_size)                                    # (P, G)
    r = r - r.nan_to_num(math.inf).amin(1, keepdim=True)               # so that a constant group is exactly 0
    dr = r - r.nanmean(1, keepdim=True)                                # NaN where a sample failed
    by = {"group": dr.square().nanmean(1, keepdim=True).sqrt(),        # (P, 1)
          "batch": (reward - reward.nanmean()).square().nanmean().sqrt(),
          "none": 1 - 1e-4}[std]                                       # 1 with what the next line adds
    return (dr / (by + 1e-4)).flatten().nan_to_num(0.0)                # A_i  (B,)
# == end ==


def noised(x_0, eps, t, ddpm=False):
    """x_t, between image and noise: (1 - t) x_0 + t eps; of a DDPM step t = n, sqrt(a_n) x_0 + sqrt(1 - a_n) eps.

    x_0, eps: (B, C, H, W); t: (B,), flow times, or with ddpm integer steps, a being models.ALPHA_BAR.
    """
    t = t[:, None, None, None]
    if not ddpm:
        return torch.lerp(x_0, eps, t)
    a = models.alpha_bar(t.device, t.dtype)[t.long()]                  # (B, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def dsm_loss(v, x_0, eps, t, weight="v", ddpm=False):
    """The denoising loss of Eq. (3), mean over dimensions: lambda_t |x_0hat - x_0|^2, where x_0hat = x_t - t v.

    v, x_0, eps: (B, C, H, W) float32; t: (B,) in (0, 1]. Since x_0hat - x_0 = t (v* - v) with v* = eps - x_0, weight
    "v", lambda_t = 1/t^2, is the velocity error. "x0": lambda_t = 1. "elbo": lambda_t = (1 - t)/t^3, minus half the
    slope of the signal-to-noise ratio (1 - t)^2/t^2: [22] with DDPM's eta, times T (which beta then lacks), as T grows.
    ddpm: v is the predicted noise, t a DDPM step; weight "v" is then the noise's own error, as Diffusion-DPO's; "elbo"
    is not defined there, KeyError. Returns (B,).
    """
    if ddpm:
        error, a = (eps - v).square().flatten(1).mean(1), models.alpha_bar(t.device, t.dtype)[t.long()]
        return {"v": 1.0, "x0": (1 - a) / a}[weight] * error           # |x_0hat - x_0|^2 = (1 - a)/a |eps_hat - eps|^2
    error = (eps - x_0 - v).square().flatten(1).mean(1)                # t^-2 |x_0hat - x_0|^2  (B,)
    return {"v": 1.0, "x0": t ** 2, "elbo": (1 - t) / t}[weight] * error


def dgpo_loss(dsm, dsm_ref, adv, group_size, beta):
    """Direct group preference loss, Eq. (4): z_g = beta/G sum_i A_i (l_i - l_ref,i), L = mean_g -log sigmoid(-z_g).

    dsm, dsm_ref: (B,) float32, the mean over dimensions, groups contiguous; adv: (B,), positive for G+, so that A_i is
    w_i with its sign. Its gradient, to dsm alone, grows with beta: `learn` trains on L / beta, which the weights of (6)
    go with. Returns the loss (). Raises ValueError for shapes that do not fit. Source: DGPO, Eq. 17.
    """
    if not dsm.shape == dsm_ref.shape == adv.shape or group_size < 1 or len(dsm) % group_size:
        raise ValueError(f"dgpo_loss: {len(dsm)}, {len(dsm_ref)}, {len(adv)} values do not fill groups of {group_size}")
    if ops.compiled(dsm):
        return ops.dgpo_loss(dsm, dsm_ref.to(dsm.dtype), adv.to(dsm.dtype), group_size, beta)
    z = beta / group_size * (adv * (dsm - dsm_ref)).view(-1, group_size).sum(1)            # (P,)
    return -F.logsigmoid(-z).mean()


def dgpo_slope(dsm, dsm_ref, adv, group_size, beta):
    """sigmoid(z_g) of Eq. (4) for each image, (B,): what lets a group be trained in parts.

    dL/dl_i = beta / (P G) sigmoid(z_g) A_i, so that with this factor, held fixed, mean_i sigmoid(z_g) A_i l_i has the
    gradient of L / beta. Arguments as in dgpo_loss.
    """
    z = beta / group_size * (adv * (dsm - dsm_ref)).view(-1, group_size).sum(1)            # (P,)
    return z.sigmoid().repeat_interleave(group_size)


def clip_dsm(dsm, dsm_old, adv, clip_range):
    """The PPO-like clip of the released code: no gradient to l_i once r = exp(l_old - l) has gone far enough.

    Far enough: r > 1 + c where A > 0, r < 1 - c where A < 0. dsm, dsm_old, adv: (B,). Returns (B,), values unchanged.
    """
    ratio = (dsm_old - dsm.detach()).exp()                             # (B,)
    stop = ((adv > 0) & (ratio > 1 + clip_range)) | ((adv < 0) & (ratio < 1 - clip_range))
    return torch.where(stop, dsm.detach(), dsm)


def best_and_worst(adv, group_size):
    """Diffusion-DPO's pairs: indices (2P,) of each group's best and worst image in turn, and their advantages 1, -1."""
    table = adv.view(-1, group_size)                                   # (P, G)
    first = torch.arange(len(table), device=adv.device) * group_size
    pairs = torch.stack([first + table.argmax(1), first + table.argmin(1)], 1)             # (P, 2)
    differ = table.amax(1) > table.amin(1)                             # a group without a better image teaches nothing
    sign = torch.tensor([1.0, -1.0], device=adv.device, dtype=adv.dtype)
    return pairs.flatten(), (differ[:, None] * sign).flatten()


# ============================================================================================================ sampler
# DGPO needs guided, euler_step, dpm_step and ode. Log-probs and the SDE are grpo.py's, for --sde; ddim_step is SD1's.

# == same: log-prob (dgpo grpo proxt2i slas) ==
def gaussian_logp(x, mean, std):
    """log N(x; mean, std^2 I), a mean over dimensions: (B,) in nats. x (not differentiated), mean: (B, ...);
    std: a float > 0."""
    logp = -((x.detach() - mean) / std).square() / 2 - math.log(std) - math.log(2 * math.pi) / 2
    return logp.flatten(1).mean(1)
# == end ==


# == same: sampler (dgpo grpo slas) ==
def guided(net, x, t, ctx, null, scale, detach=False):
    """The network with classifier-free guidance, uncond + scale (cond - uncond): one pass at scale 1, else two at once.

    net(x, t, *ctx), x (B, C, H, W); t: flow time or DDPM step, a number or (B,); ctx: what encode_text gave, text
    (B, L, width) and maybe pooled (B, width'); null: the same of "", B = 1. detach: two separate passes, the
    unconditional one without gradients. Returns the velocity or noise (B, C, H, W) in float32, float64 of float64.
    """
    dtype = models.compute_dtype(net)
    wide = torch.promote_types(dtype, torch.float32)
    t = t if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device, dtype=wide)
    if scale == 1:
        return net(x.to(dtype), t, *ctx).to(wide)                                          # (B, C, H, W)
    if detach:
        with torch.no_grad():
            uncond = net(x.to(dtype), t, *(n.expand_as(c) for n, c in zip(null, ctx))).to(wide)
        return ops.cfg_combine(uncond, net(x.to(dtype), t, *ctx).to(wide), scale)
    both = [torch.cat([n.expand_as(c), c]) for n, c in zip(null, ctx)]                     # unconditional first
    uncond, cond = net(torch.cat([x, x]).to(dtype), torch.cat([t, t]), *both).to(wide).chunk(2)
    return ops.cfg_combine(uncond, cond, scale)


def euler_step(v, x_t, t, t_next):
    """One Euler step of the probability-flow ODE dx = v dt. v, x_t (B, C, H, W) float32; t, t_next: floats."""
    return x_t + (t_next - t) * v


def dpm_step(x_0hat, x_0hat_last, x_t, t_last, t, t_next):
    """One step of DPM-Solver++(2M) on flow times: alpha = 1 - t, sigma = t, lambda = ln(alpha / sigma).

    x_0hat: this step's clean estimate x_t - t v; x_0hat_last, t_last: the step's before, None at the first step. First
    order without them, after t_last = 1 and for t_next = 0 (lambda is infinite). Source: Lu et al., arXiv:2211.01095,
    Alg. 2.
    """
    if t_next == 0:
        return x_0hat
    lam, lam_next = (math.log((1 - s) / s) if s < 1 else -math.inf for s in (t, t_next))
    h, d = lam_next - lam, x_0hat
    if x_0hat_last is not None:
        r = (lam - math.log((1 - t_last) / t_last)) / h if t_last < 1 else math.inf
        d = x_0hat + (x_0hat - x_0hat_last) / (2 * r)
    return t_next / t * x_t - (1 - t_next) * math.expm1(-h) * d


def arrive(mean, std, eps, x_next):
    """Take a step, x_next = mean + std eps, or score the x_next of one taken; returns of sde_step and ddim_step."""
    if std and eps is None and x_next is None:
        raise ValueError("give eps to take the step, or x_next to score one taken")
    if x_next is None:
        x_next = mean + std * eps if std else mean
    return x_next, gaussian_logp(x_next, mean, std) if std else None, mean, std


def sde_step(v, x_t, t, t_next, noise_level, eps=None, x_next=None, kind="flow", t_cap=None):
    """One step of a reverse SDE and its log-density. Give eps to take the step, x_next to score one taken.

    v, x_t, eps, x_next: (B, C, H, W) float32; t, t_next: floats, 0 <= t_next < t <= 1; dt = t_next - t < 0.
    kind "flow":  s = a sqrt(t / (1 - t)), a = noise_level. Infinite at t = 1, so from t = .999 on t_cap < 1, the
                  schedule's second time, stands for t in 1 - t (released: at 1 alone; schedule dpm starts at .9997);
                  ValueError for t = 1 without it.
                                                                           Flow-GRPO, arXiv:2505.05470, Eq. 9
    kind "dance": s = a, a constant.                                       DanceGRPO, arXiv:2505.07818
         both:    mean = x + (v + s^2/(2t) (x + (1 - t) v)) dt,  std = s sqrt(-dt)
    kind "cps":   std = t_next sin(a pi/2), mean = (1 - t_next) x_0hat + sqrt(t_next^2 - std^2) x_1hat.  Flow-CPS;
                  its code takes -mean (x_next - mean)^2 for logp: a clip range of its means another thing here
    Returns x_next, logp (B,) in nats per latent dimension (None where std = 0: there is no density), mean, std.
    """
    dt = t_next - t
    x_0hat, x_1hat = x_t - t * v, x_t + (1 - t) * v                                        # clean and noise estimates
    if kind == "cps":
        std = t_next * math.sin(noise_level * math.pi / 2)
        mean = (1 - t_next) * x_0hat + math.sqrt(t_next ** 2 - std ** 2) * x_1hat
    elif kind in ("flow", "dance"):
        if kind == "flow" and t == 1 and t_cap is None:
            raise ValueError("sde_step: at t = 1 the noise of kind 'flow' is infinite; give t_cap, the second time")
        cap = t if t_cap is None or t < .999 else t_cap
        s = noise_level * (math.sqrt(t / (1 - cap)) if kind == "flow" else 1)
        std = s * math.sqrt(-dt)
        mean = x_t + (v + s ** 2 / (2 * t) * x_1hat) * dt
    else:
        raise ValueError(f"sde_step: kind={kind!r} is unknown: flow, dance or cps")
    return arrive(mean, std, eps, x_next)


def ddim_step(eps_hat, x_n, alpha_bar, alpha_bar_next, eta, eps=None, x_next=None):
    """One DDIM step of a DDPM network that predicts noise, and its log-density. Arguments and results as in sde_step.

    eps_hat, x_n, eps, x_next: (B, C, H, W) float32; alpha_bar <= alpha_bar_next: a and a', floats in (0, 1]; eta: 0 is
    deterministic, 1 DDPM's own noise.  std = eta sqrt((1 - a') / (1 - a) (1 - a/a')),
    mean = sqrt(a') x_0hat + sqrt(1 - a' - std^2) eps_hat.                 Song et al., arXiv:2010.02502, Eqs. 12, 16
    """
    a, a_next = alpha_bar, alpha_bar_next
    x_0hat = (x_n - math.sqrt(1 - a) * eps_hat) / math.sqrt(a)
    std = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    mean = math.sqrt(a_next) * x_0hat + math.sqrt(1 - a_next - std ** 2) * eps_hat
    return arrive(mean, std, eps, x_next)


@torch.no_grad()
def ode(net, x, ts, ctx, null, scale, solver="euler"):
    """Follow the probability-flow ODE from noise x (B, C, H, W) along the times ts. Returns x_0 (B, C, H, W).

    solver: euler, dpm, DPM-Solver++(2M), or ddim, where ts are DDPM steps.
    """
    last, t_last = None, None
    for t, t_next in zip(ts, ts[1:]):
        v = guided(net, x, t, ctx, null, scale)
        if solver == "ddim":
            x, *_ = ddim_step(v, x, models.ALPHA_BAR[t], models.ALPHA_BAR[t_next], eta=0.0)
        elif solver == "euler":
            x = euler_step(v, x, t, t_next)
        elif solver == "dpm":
            x_0hat = x - t * v
            x, last, t_last = dpm_step(x_0hat, last, x, t_last, t, t_next), x_0hat, t
        else:
            raise ValueError(f"ode: solver={solver!r} is unknown: euler, dpm or ddim")
    return x


def sample(pipe, prompts, keys, cfg, scale):
    """Images (B, 3, H, W) in [0, 1] in eval_steps steps of the ODE, from noise that is a function of the keys."""
    ts, latents = pipe.times(cfg.eval_steps, cfg.schedule, cfg.shift, cfg.resolution), []
    shape, null, wide = pipe.latent_shape(cfg.resolution), pipe.encode_text([""]), data.wide(cfg.dtype)
    with models.merged(pipe.net, cfg.merge_lora):
        for i in range(0, len(prompts), cfg.micro_batch):
            ctx, some = pipe.encode_text(prompts[i:i + cfg.micro_batch]), keys[i:i + cfg.micro_batch]
            x = data.noises(shape, some, ctx[0].device, wide)
            latents.append(ode(pipe.net, x, ts, ctx, null, scale, pipe.solver(cfg.solver)))
    return torch.cat([pipe.decode(x_0) for x_0 in latents])            # the copy that `merged` held is gone
# == end ==


@torch.no_grad()
def rollout(pipe, ctx, null, cfg, step, groups):
    """Images to learn from, (B, C, H, W) latents: whole groups, each group's noise a function of (seed, step, group).

    groups: their numbers, counted over all processes.
    """
    ts = pipe.times(cfg.sample_steps, cfg.schedule, cfg.shift, cfg.resolution)
    shape, device, wide = (cfg.group_size, *pipe.latent_shape(cfg.resolution)), ctx[0].device, data.wide(cfg.dtype)

    def draw(name):                                                    # (B, C, H, W)
        return data.noises(shape, [(cfg.seed, step, g, name) for g in groups], device, wide).flatten(0, 1)
    x = draw("start")
    pieces = [slice(k, k + cfg.micro_batch) for k in range(0, len(x), cfg.micro_batch)]    # several: G > micro_batch
    with models.merged(pipe.net, cfg.merge_lora):
        if not cfg.sde:
            return torch.cat([ode(pipe.net, x[p], ts, [c[p] for c in ctx], null, cfg.cfg_rollout,
                                  pipe.solver(cfg.solver)) for p in pieces])
        for i, (t, t_next) in enumerate(zip(ts, ts[1:])):
            v = torch.cat([guided(pipe.net, x[p], t, [c[p] for c in ctx], null, cfg.cfg_rollout) for p in pieces])
            noise = cfg.noise_level if i < len(ts) - 2 else 0.0        # the last step's would stay in the image
            if pipe.ddpm:
                a, a_next = models.ALPHA_BAR[t], models.ALPHA_BAR[t_next]
                take = partial(ddim_step, alpha_bar=a, alpha_bar_next=a_next, eta=noise)
            else:
                take = partial(sde_step, t=t, t_next=t_next, noise_level=noise, t_cap=ts[1])
            x, *_ = ops.fused_step(take, v, x, draw(f"sde {i}") if noise else None)        # one pass, if compiled
        return x


# ============================================================================================================== train

def draw_time(cfg, times, ddpm, seed, step, group, update, draw):
    """The t of one group's draw: uniform on [t_min, 1], or one of `times`, each once before any comes again.

    ddpm: a step instead, uniform on 1000 t_min .. 999.
    """
    if cfg.grid:
        order = data.uniform(len(times), seed, step, group, update, "t")
        return times[sorted(range(len(times)), key=order.__getitem__)[draw % len(times)]]
    t = 1 - data.uniform(1, seed, step, group, update, draw, "t")[0] * (1 - cfg.t_min)
    return min(int(t * 1000), 999) if ddpm else t


def draw_noise(cfg, times, ddpm, keys, G, like):
    """One t and one eps for each group, Alg. 1, repeated for its G images: (n G,), (n G, C, H, W). keys: n groups'."""
    t = data.sent(torch.tensor([draw_time(cfg, times, ddpm, *key) for key in keys], dtype=like.dtype), like.device)
    eps = data.noises(like.shape[1:], [(*key, "eps") for key in keys], like.device, like.dtype)
    return t.repeat_interleave(G), eps.repeat_interleave(G, 0)


def learn(net, params, ref, kl_ref, clip_old, x_0, eps, t, ctx, null, adv, G, total, cfg, ddpm):
    """Add the gradient of Eq. (4) / beta + kl_beta KL for whole groups, weighted so that chunks add up to the mean.

    ref, kl_ref, clip_old: the weights of the reference, the KL's, the clip's; x_0, eps: (B, C, H, W); t, adv: (B,);
    total: images in the batch. Returns what these images add to the means of loss, KL and denoising loss, (3,).
    """
    x_t, logs = noised(x_0, eps, t, ddpm), x_0.new_zeros(3)
    pieces = [slice(k, k + cfg.micro_batch) for k in range(0, len(t), cfg.micro_batch)]    # several: G > micro_batch

    def velocity(scale, p):                                            # (b, C, H, W)
        return guided(net, x_t[p], t[p], [c[p] for c in ctx], null, scale)

    def dsm_of(v, p=slice(None)):                                      # (b,)  Eq. (3)
        return dsm_loss(v, x_0[p], eps[p], t[p], cfg.dsm, ddpm)

    def frozen(weights, scale):                                        # (B, C, H, W), without gradients
        with torch.no_grad(), models.using(params, weights):           # the same network, other weights in it
            return torch.cat([velocity(scale, p) for p in pieces])
    v_ref = frozen(ref, cfg.cfg_ref)
    v_kl, dsm_ref = v_ref if kl_ref is ref else frozen(kl_ref, cfg.cfg_ref), dsm_of(v_ref)
    dsm_old = dsm_of(frozen(clip_old, cfg.cfg_train)) if cfg.clip_range else None
    if len(pieces) > 1:                                                # z_g wants all l of its group before any part
        dsm = dsm_of(frozen(None, cfg.cfg_train))                      # None: params as they are
        slope, group_loss = dgpo_slope(dsm, dsm_ref, adv, G, cfg.beta), dgpo_loss(dsm, dsm_ref, adv, G, cfg.beta)
    for p in pieces:
        v = velocity(cfg.cfg_train, p)
        dsm = dsm_of(v, p)
        if cfg.clip_range:
            dsm = clip_dsm(dsm, dsm_old[p], adv[p], cfg.clip_range)
        if len(pieces) > 1:
            loss = (slope[p] * adv[p] * dsm).mean()
        else:
            group_loss = dgpo_loss(dsm, dsm_ref, adv, G, cfg.beta)     # Eq. (4)
            loss = group_loss / cfg.beta
        kl, share = (v - v_kl[p]).square().mean(), len(v) / total
        ((loss + cfg.kl_beta * kl) * share).backward()
        logs += torch.stack([group_loss, kl, dsm.mean()]).detach() * share
    return logs


def hold(net, params, start, x_0, eps, ctx, null, keys, G, total, cfg, ddpm):
    """Add the gradient of (6)'s hold |v - v_start|^2, on a quarter of each group (of a pair, the better one) at times
    t < min(hold_below, t_min) of their own.

    What the timestep clip leaves untrained is held where it was. The weights that train at the noisy times serve the
    others, too, and no loss sees those. There the network drifts until the sampler's last steps paint the patches' grid
    on the ground; README, "What keeps DGPO stable". Arguments as in learn; keys: the groups'. Returns what these images
    add to the mean, ().
    """
    log, below = x_0.new_zeros(()), min(cfg.hold_below, cfg.t_min)
    t = torch.tensor([u * below for key in keys for u in data.uniform(G, *key, "hold")], dtype=x_0.dtype)
    t = data.sent((t * 1000).floor() if ddpm else t, x_0.device)       # (B,)
    held = torch.arange(len(t), device=t.device).view(-1, G)[:, ::4].flatten()             # images 0, 4, ... of a group
    n = total * len(held) // len(t)                                    # such images in the batch
    for few in held.split(cfg.micro_batch):
        x_t, text = noised(x_0[few], eps[few], t[few], ddpm), [c[few] for c in ctx]
        with torch.no_grad(), models.using(params, start):
            v_start = guided(net, x_t, t[few], text, null, cfg.cfg_train)
        v = guided(net, x_t, t[few], text, null, cfg.cfg_train)
        error = (v - v_start).square().flatten(1).mean(1).sum()
        (cfg.hold * error / n).backward()
        log += error.detach() / n
    return log


def train(cfg):
    run = data.Run(cfg, "dgpo")
    scoring, rows = data.load_inputs(cfg, run)                         # the reward, the prompts to train on
    pipe, params = data.load_policy(cfg, run)
    net = pipe.net
    start = [p.detach().clone() for p in params]                       # the model before RL
    ema = [p.clone() for p in start] if cfg.ema else None
    opt = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    times = [t for t in pipe.times(cfg.sample_steps, cfg.schedule, cfg.shift, cfg.resolution)
             if t >= cfg.t_min * (1000 if pipe.ddpm else 1) and t > 0]
    if cfg.grid and not times:
        raise ValueError(f"--grid: none of the sampler's {cfg.sample_steps} times is --t-min {cfg.t_min} or above: "
                         f"take more --sample-steps, or a lower --t-min")
    if cfg.sde:
        pipe.sde("", cfg.noise_level)                                  # refuses more noise than DDPM's
    if pipe.ddpm and cfg.dsm == "elbo":
        raise ValueError(f"--dsm elbo is a weight of flow times, and {cfg.model} knows DDPM steps: try --dsm v")
    holds = cfg.hold and min(cfg.hold_below, cfg.t_min) > 0            # from t_min on all times are trained
    run.begin(pipe, sample, params, ema, opt, rows)                    # from here on these are evaluated and saved
    null = pipe.encode_text([""])
    for step in run.steps():
        # 1. Roll out with theta-. A group never spans two processes.
        prompts, metas = run.groups(rows, step)                        # B strings, B dicts: whole groups
        ctx = pipe.encode_text(prompts)                                # text (B, L, width), pooled (B, width')
        source = cfg.rollout if run.count["updates"] >= cfg.rollout_after else "current"   # whose weights sample
        # None stands for params as they are
        theta_minus = old = {"current": None, "ema": ema, "start": start}[source]
        if cfg.ref == "old" or (cfg.clip_range and cfg.clip_old == "rollout"):             # needed while params move
            old = [p.detach().clone() for p in theta_minus or params]
        x_0 = []
        with models.using(params, theta_minus):
            for s, groups in run.chunks(cfg.group_size):               # one is scored while the next is sampled
                x_0.append(rollout(pipe, [c[s] for c in ctx], null, cfg, step, groups))
                scoring.add(pipe.decode(x_0[-1]), prompts[s], metas[s])
        x_0 = torch.cat(x_0)                                           # (B, C, H, W)
        # 2. Reward
        reward = scoring.result()                                      # (all B,)
        # 3. Advantage, over the whole batch of all processes; each keeps its slice
        cut = cfg.adv_clip if cfg.method == "dgpo" else math.inf       # of pairs only the order counts
        adv = group_advantage(reward, cfg.group_size, cfg.adv_std).clamp(-cut, cut)        # Eq. (1)
        row = scoring.row(adv)                                         # what is logged of images, rewards, advantages
        adv, G = run.mine(adv).to(run.device, x_0.dtype), cfg.group_size
        if cfg.method == "diffusion-dpo":                              # Eq. [7]: two images a group
            keep, adv = best_and_worst(adv, G)
            x_0, ctx, G = x_0[keep], [c[keep] for c in ctx], 2
        # 4. Update. One t and one eps a group; gradients of all chunks and draws add up to the mean over the batch.
        ref = {"start": start, "ema": ema, "old": old}[cfg.ref]
        kl_ref, clip_old = {"ref": ref, "start": start}[cfg.kl_ref], {"rollout": old, "ema": ema}[cfg.clip_old]
        total, logs = cfg.groups * G * cfg.timesteps, x_0.new_zeros(4)                     # logs: loss, kl, dsm, hold
        for update in range(cfg.updates):
            for draw in range(cfg.timesteps):
                for s, groups in run.chunks(G):
                    keys = [(cfg.seed, step, g, update, draw) for g in groups]
                    t, eps = draw_noise(cfg, times, pipe.ddpm, keys, G, x_0)               # (n G,), (n G, C, H, W)
                    text = [c[s] for c in ctx]
                    logs[:3] += learn(net, params, ref, kl_ref, clip_old, x_0[s], eps, t, text, null, adv[s], G, total,
                                      cfg, pipe.ddpm)
                    if holds:
                        logs[3] += hold(net, params, start, x_0[s], eps, text, null, keys, G, total, cfg, pipe.ddpm)
            grad_norm = run.update(opt, params, cfg.max_grad_norm)
            if ema:
                decay = min(cfg.ema, cfg.ema_ramp * max(run.count["updates"] - 1, 0)) if cfg.ema_ramp else cfg.ema
                models.move(ema, params, 1 - decay)
        # 5. Report
        loss, kl, dsm, held = (run.sum(logs) / cfg.updates).tolist()
        run.report(len(reward), row | {"loss": loss, "kl": kl, "dsm": dsm, "hold": held, "grad_norm": grad_norm})
    data.finish(run, start)


def main(argv=None):
    with data.exit_codes():
        train(data.cli(Config, PRESETS, argv))


if __name__ == "__main__":
    main()
