"""SLAS: DanceGRPO (or Flow-GRPO) whose advantages grow faster than the differences of the rewards, in one file.

Sample G images per prompt with an SDE, score them, make the steps that led to better-than-average ones more likely.
Papers: Liu et al., Flow-GRPO, arXiv:2505.05470v5: (n) is this file's number, [n] that version's. Xue et al., DanceGRPO,
arXiv:2505.07818, --method dance: a constant s in (2), no KL, one initial noise a group; on SD1.4 DDIM's steps for (2).

    (1) [4]  A_i = (r_i - mean_g r) / std_g r                                                       group_advantage
    (2) [9]  x' = x + [v + s^2/2t (x + (1-t) v)] dt + s sqrt|dt| eps,  s = a sqrt(t/(1-t))                 sde_step
    (3) [5]  L = -mean_i min(q_i A_i, clip(q_i, 1-c, 1+c) A_i),  q_i = exp(logp - logp_old)             policy_loss
    (4)      KL = |mean - mean_ref|^2 / (2 s^2 |dt|), in the released code without the dt                    kl_loss
Sun et al., SLAS, arXiv:2605.10937, "Power Reinforcement Post-Training of Text-to-Image Models", has its own [n]:
    (5) [9]  dr_i = r_i - mean_g r; dividing it by std_g r, as (1), blows up near-equal rewards      group_advantage
    (6) [20] A_i = sign(dr_i) |dr_i|^(1+gamma), with the whole batch's std in place of the group's    slas_advantage
    (7) [83] E|dr|^(2(1+gamma)) <= 2 delta / (eta^2 lambda_max G2)                                         max_gamma
(6), a = dr: the step d of the policy pi, int d = 0, that gains most, int d a, where it costs int d^2 / (2 pi |a|^gamma)
[17, 18], is d = pi |a|^gamma (a - lam), lam = E|a|^gamma a / E|a|^gamma: what is far from the mean moves cheaply. The
paper drops lam as a baseline and has pi sign(a) |a|^(1+gamma) [19], the same only where E sign(a) |a|^(1+gamma) = 0:
for gamma = 0 [15] or a symmetric a. --recenter keeps lam.
(7): a step eta g, g = E A grad log pi, moves the policy by KL <= eta^2/2 lambda_max |g|^2, lambda_max the Fisher
matrix's, and |g|^2 <= E A^2 G2, G2 = E |grad log pi|^2. So E A^2 <= 2 delta / (eta^2 lambda_max G2) keeps KL <= delta,
nats per dimension and step. Adam's eta: |dtheta| / |g|. No guarantee: few --fisher-images overestimate lambda_max.

Departs from Flow-GRPO's paper: log-probs are averaged, not summed, over latent dimensions, and the KL of the released
code lacks the dt of the true Gaussian KL (--kl-form names the three in use).

    python slas.py                                              # the tiny model, minutes on a laptop CPU
    torchrun --nproc_per_node 2 slas.py                         # the same run on two processes
"""
import math
from dataclasses import dataclass
from functools import partial

import data                             # first: sets GOMP_SPINCOUNT, which torch reads once
import torch

import models
from csrc import ops

# ============================================================================================================= Config


# [source] behind a default: where it comes from; [source: 16]: there it is 16.
@dataclass
class Config:
    model: str = "tiny"                 # tiny, sd35m, flux, sd14, or a directory in the diffusers layout
    weights: str = ""                   # the model's directory or original single file, if not weights/<model>
    init: str = ""                      # random: random weights at full size, to measure without a download
    method: str = "dance"               # flow (Flow-GRPO), dance (DanceGRPO): its SDE, never a KL, one noise a group
    preset: str = ""                    # tiny, paper, official (released runs: Flow-GRPO's, DanceGRPO's)
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
    sample_steps: int = 10              # T, network evaluations of a rollout                 [Flow-GRPO, App. B.3]
    eval_steps: int = 10                # network evaluations of an image in evaluation, by ODE    [Flow-GRPO: 40]
    groups: int = 8                     # prompts a rollout, over all processes                    [Flow-GRPO: 48]
    group_size: int = 24                # G, images a prompt                                       [Flow-GRPO, App. B.3]
    resolution: int = 0                 # pixels; 0: the checkpoint's own
    solver: str = ""                    # of evaluation's ODE: euler, dpm (DPM-Solver++(2M)); empty: euler, SD1's ddim
    schedule: str = ""                  # times of the samplers: linear, sd3, dpm, ddim; empty: linear, SD1's ddim
    shift: float = 0.0                  # shift of the schedule; 0: the checkpoint's own           [SD3: 3]
    sde: str = ""                       # kind of SDE, Eq. (2): flow, dance, cps, or SD1's ddim; empty: the method's
    noise_level: float = 0.3            # a in Eq. (2), SD1's eta; --method flow: 0.7              [DanceGRPO's code]
    shared_noise: bool = True           # the images of a group start from one noise               [DanceGRPO's code]
    clean_final: bool = False           # the reward sees the last step's x_0hat, not its state [DanceGRPO's FLUX: True]
    window: int = 0                     # SDE steps in a row, their place drawn anew each rollout, ODE elsewhere; 0: all
    train_steps: int = 3                # SDE steps trained of each rollout, drawn anew; 0: all but the last
    updates: int = 2                    # optimizer steps a rollout, on disjoint groups [Flow-GRPO's code: by images]
    drop_constant: bool = False         # groups whose rewards are all alike are left out    [Flow-GRPO's code: True]
    clip_range: float = 2e-3            # c in Eq. (3)                                          [Flow-GRPO's code: 1e-4]
    kl_beta: float = 0.0                # weight of Eq. (4)                                     [Flow-GRPO's code: .04]
    kl_form: str = "flow-grpo"          # flow-grpo (no dt, released code), gaussian (exact), velocity |v - v_ref|^2
    ema: float = 0.9                    # decay of the moving average; evaluated and saved (0: off) [Flow-GRPO's code]
    ema_every: int = 1                  # updates between two steps of the moving average       [Flow-GRPO's code: 8]
    adv_clip: float = 5.0               # cuts advantages; by a group's std |A| <= sqrt(G - 1) anyway [Flow-GRPO's code]
    gamma: str = "1"                    # in (6), 0 or more; auto: the most that (7) allows, --adv-std before     [ours]
    kl_budget: float = 1.0              # delta in (7), nats per dimension and step; measured KLs are far lower   [ours]
    fisher_every: int = 10              # rollouts between estimates of lambda_max and G2; 0: none, and no KL logged
    fisher_images: int = 4              # about so many images for lambda_max, G2 and the KL, one a process or more
    recenter: bool = False              # (6) by the true maximiser, with lam                      [paper: without]
    adv_std: str = ""                   # dr's std divides before (6), after, batch (both), none; empty: batch/before
    cfg_rollout: float = 1.0            # guidance scale of the rollouts, 1 = off               [Flow-GRPO's code: 4.5]
    cfg_train: float = 1.0              # guidance scale of the policy in the loss; the ratio wants the rollout's
    cfg_detach: bool = False            # no gradient through cfg_train's unconditional pass  [Flow-GRPO's code: True]
    cfg_ref: float = 1.0                # guidance scale of the reference in the KL
    cfg_eval: float = 1.0               # guidance scale of evaluation
    cfg_also: float = 3.0               # guidance scale of a second test evaluation, before and after training; 0: none
    lora_rank: int = 0                  # 0: train all weights                                  [Flow-GRPO's code: 32]
    lora_alpha: float = 64.0            # the LoRA is scaled by alpha / rank                    [Flow-GRPO's code]
    lr: float = 5e-5                    # AdamW                                                 [Flow-GRPO's code: 3e-4]
    weight_decay: float = 1e-4          # AdamW                                                 [Flow-GRPO's code]
    max_grad_norm: float = 1.0          # gradients are clipped to it                           [Flow-GRPO's code]
    micro_batch: int = 96               # images at once in the network; rewards see whole groups
    gpu_memory: int = 0                 # GB, 24, 48, 80 or 141: chooses micro_batch, checkpointing and offload; 0: off
    checkpointing: bool = False         # gradient checkpointing: blocks are computed again in the backward pass
    offload: bool = False               # the VAE waits on the CPU while the network works
    compile: bool = False               # torch.compile of the network's blocks
    merge_lora: bool = False            # the LoRA is added into the weights in evaluation; rounds in bf16
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
    out: str = ""                       # the run's folder; empty: a free runs/slas-NNN
    resume: bool = False                # go on from OUT/last with OUT's settings; on a CPU bit for bit
    fused: bool = True                  # compiled ops where built; --fused: build them first; --no-fused: plain PyTorch

    def __post_init__(self):
        data.check(self, words=dict(method=("flow", "dance"), sde=("", "flow", "dance", "cps", "ddim"),
                                    kl_form=("flow-grpo", "gaussian", "velocity"),
                                    adv_std=("", "batch", "before", "after", "none")),
                   least=dict(kl_beta=0, ema_every=1, fisher_every=0, fisher_images=1),
                   positive=("noise_level", "clip_range", "kl_budget"))
        if self.gamma != "auto" and not 0 <= data.number(self.gamma) < math.inf:
            raise ValueError(f"--gamma {self.gamma}: a number such as 0.5, 0 or more, or auto")
        if self.fisher_every and (self.fsdp or self.compile):
            raise ValueError("--fsdp and --compile give no second derivatives: --fisher-every 0, and a --gamma by hand")
        self.adv_std = self.adv_std or ("before" if self.gamma == "auto" else "batch")       # as (7) bounds E|dr|
        if self.gamma == "auto" and (not self.fisher_every or self.adv_std != "before"):
            raise ValueError("--gamma auto wants --fisher-every above 0 and --adv-std before, or (7) holds no gamma")
        if self.method == "dance" and self.kl_beta:
            raise ValueError(f"--method dance has no KL: --kl-beta {self.kl_beta} is Flow-GRPO's, --method flow")
        if self.sde == "cps" and self.sample_steps == 1:
            raise ValueError("--sample-steps 1: the last step of --sde cps has no noise, so there is nothing to learn")
        if self.sde == "cps" and self.noise_level > 1:
            raise ValueError(f"--noise-level {self.noise_level}: --sde cps takes 0 to 1, at which all noise is new")
        if not 0 <= self.window <= self.sample_steps or not 0 <= self.train_steps <= self.sample_steps:
            raise ValueError(f"--window {self.window} and --train-steps {self.train_steps}: between 0 (all) and "
                             f"--sample-steps {self.sample_steps}")


FLOW = dict(prompts="geneval", reward="geneval", eval_reward="geneval", resolution=512, dtype="bfloat16",
            sde="flow", schedule="sd3", shift=3.0, lora_rank=32, lr=3e-4, groups=48, train_steps=0, clip_range=1e-4,
            cfg_rollout=4.5, cfg_train=4.5, cfg_detach=True, cfg_ref=4.5, cfg_eval=4.5, eval_steps=40, kl_beta=0.04,
            drop_constant=True, ema=0.81, ema_every=8,     # its average moves twice then, by .9
            method="flow",                                 # Flow-GRPO's GenEval run, but in fp16; the next line is ours
            minutes=1e6, cfg_also=0.0, eval_every=60, micro_batch=24, overlap=True)
DANCE = dict(method="dance", reward="hpsv2", eval_reward="hpsv2", prompts="weights/hpdv2/train.txt", dtype="bfloat16",
             shared_noise=True, lr=1e-5, clip_range=1e-4,              # DanceGRPO's code; the next line is ours
             fisher_every=0,                                   # ours: too costly for all weights, none in shards
             minutes=1e6, cfg_also=0.0, eval_every=50, micro_batch=4, overlap=True)
FLUX = {**DANCE, "resolution": 720, "sample_steps": 16, "sde": "dance", "noise_level": 0.3, "train_steps": 9,
        "shift": 3.0, "groups": 16, "group_size": 12, "ema": 0.995, "ema_every": 2, "max_grad_norm": 0.01, "fsdp": True,
        "checkpointing": True, "clean_final": True,     # its FLUX run on 8 GPUs; on 16: norm 1, no average, 3 updates
        "save_every": 40, "eval_steps": 28}                            # eval_steps ours: it evaluates nothing
SD14 = {**DANCE, "resolution": 512, "sample_steps": 50, "noise_level": 1.0, "train_steps": 0, "groups": 32,
        "group_size": 16, "cfg_rollout": 5.0, "cfg_train": 5.0, "ema": 0.0,        # its SD1.4 run: four prompts a GPU
        "cfg_eval": 5.0, "eval_steps": 50}
METHODS = {                             # a method's own numbers: below its own preset's, above another method's
    "flow": dict(sde="", noise_level=0.7, shared_noise=False, clean_final=False),
    "dance": dict(sde="", noise_level=0.3, shared_noise=True, kl_beta=0.0)}
TWO, MIX = ("hpsv2:0.7,clip-dfn:1.4", "hpsv2:1,clip-dfn:1"), {}        # FLUX, SD1.4; a raw sum: [Sec. 6.1]
TABLE = dict(MIX, groups=32, group_size=12, max_grad_norm=1.0, ema=0.0)                  # DanceGRPO, App. A, Table 6
PRESETS = {                                                           # preset -> model family -> values
    "tiny": {},
    "paper": {"sd3": {**FLOW, "kl_form": "gaussian", "updates": 1},    # its dt: 4 to 25 times the code's; updates ours
              "flux": {**FLUX, **TABLE, "sample_steps": 25, "train_steps": 15, "updates": 4, "reward": TWO[0]},
              "sd14": {**SD14, **TABLE, "train_steps": 30, "updates": 1, "reward": TWO[1]}},
    "official": {"sd3": FLOW, "flux": {**FLUX, "reward": TWO[0]}, "sd14": {**SD14, "reward": TWO[1]}}}


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


def slas_advantage(reward, group_size, gamma, recenter=False, std="batch"):
    """Super-linear advantages, Eq. (6): A_i = sign(dr_i) |dr_i|^(1+gamma), or |dr_i|^gamma (dr_i - lam) to recenter.

    reward, group_size: as in group_advantage; gamma >= 0. std says when the batch's std divides: "before", dr; "after",
    A; "batch", both: std 1 for every gamma, however close rewards are; "none"; else ValueError. Returns (B,).
    """
    stds = {"batch": (1, 1), "before": (1, 0), "after": (0, 1), "none": (0, 0)}
    if ops.compiled(reward) or std not in stds:                        # which names the error
        return ops.slas_advantage(reward, group_size, gamma, recenter, std)
    before, after = stds[std]
    valid, dr = ~reward.isnan(), group_advantage(reward, group_size, "none")               # (B,), (B,)  Eq. (5)
    dr = dr / (dr[valid].std(correction=0) + 1e-4) if before else dr
    weight, lam = dr.abs().pow(gamma) * valid, 0                       # phi(|dr|) of [17]: the metric divides by it
    if recenter:
        w, d = weight.view(-1, group_size), dr.view(-1, group_size)
        lam = ((w * d).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp(min=1e-30)).expand_as(d).flatten()
    adv = weight * (dr - lam)
    return (adv / (adv[valid].std(correction=0) + 1e-4) if after else adv).where(valid, 0)


def max_gamma(limit, dr=None, R=None, K=None, most=4.0):
    """The largest gamma in [0, most] that Eq. (7) allows, 0 if none; limit: 2 delta / (eta^2 lambda_max G2).

    Give one of dr (B,) and the floats R, K: the moment E|dr|^2p, p = 1 + gamma, is dr's own (Thm. 4), or the bound R^2p
    if |dr| <= R (Cor. 1: all if R <= 1), or 2 K^2p Gamma(p+1) if E exp(dr^2/K^2) <= 2 (Cor. 2: gamma grows as a log).
    """
    def moment(p):                                                     # convex in p, so an interval is allowed
        if dr is not None:
            return dr.double().abs().pow(2 * p).mean().item()
        return 2 * K ** (2 * p) * math.gamma(p + 1) if R is None else R ** (2 * p)
    low = max((g for g in (most * i / 1000 for i in range(1001)) if moment(1 + g) <= limit), default=0.0)
    high = min(most, low + most / 1000)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if moment(1 + middle) <= limit else (low, middle)
    return low


# == same: policy loss (grpo proxt2i slas) ==
def policy_loss(logp, logp_old, adv, clip_range):
    """Clipped surrogate, to be minimised.

    logp, logp_old, adv: (B,) float32, log-probs in nats per latent dimension; clip_range: c > 0.
    Returns the loss () and, for the log, {ratio, approx_kl, clip_frac}, each () and detached. Source: PPO,
    arXiv:1707.06347, Eq. 7.
    """
    ratio = (logp - logp_old).clamp(max=20).exp()                      # q_i  (B,); capped: inf * 0 would be NaN
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)              #      (B,)
    loss = -torch.minimum(ratio * adv, clipped * adv).mean()
    return loss, {"ratio": ratio.detach().mean(), "approx_kl": (logp - logp_old).detach().square().mean() / 2,
                  "clip_frac": (ratio != clipped).float().mean()}      # outside 1 +- c, whichever the minimum takes
# == end ==


# == same: KL (grpo slas) ==
def kl_loss(mean, mean_ref, v, v_ref, std, dt, form):
    """Distance of one step's policy from the reference's, Eq. (4), averaged over dimensions and batch.

    mean, mean_ref, v, v_ref: (B, C, H, W) float32; std: the step's, s sqrt(-dt), a float; dt: < 0, read by flow-grpo.
    Returns (), in one of three forms:
    gaussian   |mean - mean_ref|^2 / (2 std^2)         the exact KL of two Gaussians with equal std, per dimension
    flow-grpo  |mean - mean_ref|^2 / (2 s^2)           the same times -dt: the released code, whose beta goes with it
    velocity   |v - v_ref|^2                           DGPO's
    """
    if form == "velocity":
        return (v - v_ref).square().mean()
    return (mean - mean_ref).square().mean() / (2 * std ** 2) * (-dt if form == "flow-grpo" else 1)
# == end ==


# ============================================================================================================ sampler

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


# == same: rollout (grpo slas) ==
def sde_kind(pipe, cfg):
    """--sde, or what method and model mean: ddim for a DDPM network, else the method's own. ValueError: a misfit."""
    return pipe.sde(cfg.sde or ("" if pipe.ddpm else cfg.method), cfg.noise_level)


def transition(v, x, i, ts, noise_level, kind, eps=None, x_next=None):
    """Step i of the sampler, taken by eps or scored at x_next: sde_step, ddim_step for kind "ddim", as they return.

    v: the network's answer at x (B, C, H, W) and ts[i], velocity or noise; ts: flow times, or DDPM steps for "ddim".
    In one pass over memory where the fused ops are compiled, and then without the mean of a step that is taken.
    """
    if kind == "ddim":
        a, a_next = models.ALPHA_BAR[ts[i]], models.ALPHA_BAR[ts[i + 1]]
        step = partial(ddim_step, alpha_bar=a, alpha_bar_next=a_next, eta=noise_level)
    else:
        step = partial(sde_step, t=ts[i], t_next=ts[i + 1], noise_level=noise_level, kind=kind, t_cap=ts[1])
    return ops.fused_step(step, v, x, eps, x_next)


@torch.no_grad()
def rollout(pipe, ctx, null, ts, window, cfg, step, groups):
    """One SDE trajectory an image: x (T + 1, B, C, H, W), logp {i: (B,)} of the SDE steps, and what is to be decoded.

    window: the indices of the SDE steps; the others are ODE steps. Each group's noise is a function of (seed, step,
    group); groups: their numbers, counted over all processes.
    """
    shape, device, wide = (cfg.group_size, *pipe.latent_shape(cfg.resolution)), ctx[0].device, data.wide(cfg.dtype)

    def draw(name, shared=False):                                      # (B, C, H, W)
        size = shape[1:] if shared else shape
        eps = data.noises(size, [(cfg.seed, step, g, name) for g in groups], device, wide)
        return (eps[:, None].expand(-1, *shape) if shared else eps).flatten(0, 1)
    xs, logps = [draw("start", cfg.shared_noise)], {}
    pieces = [slice(k, k + cfg.micro_batch) for k in range(0, len(ctx[0]), cfg.micro_batch)]       # as the update's
    for i, t in enumerate(ts[:-1]):
        v = torch.cat([guided(pipe.net, xs[i][p], t, [c[p] for c in ctx], null, cfg.cfg_rollout, cfg.cfg_detach)
                       for p in pieces])
        eps = draw(f"sde {i}") if i in window else None
        x, logp, *_ = transition(v, xs[i], i, ts, cfg.noise_level if i in window else 0.0, sde_kind(pipe, cfg), eps)
        if logp is not None:                                           # the last step of cps has no noise
            logps[i] = logp
        xs.append(x)
    clean = xs[-2] - ts[-2] * v if cfg.clean_final else xs[-1]         # the last step's x_0hat, or where it arrived
    return torch.stack(xs), logps, clean
# == end ==


# ============================================================================================================== train

def train(cfg):
    run = data.Run(cfg, "slas")
    scoring, rows = data.load_inputs(cfg, run)                         # the reward, the prompts to train on
    pipe, params = data.load_policy(cfg, run)
    net = pipe.net
    start = [p.detach().clone() for p in params]                       # the model before RL, and the reference
    ema = [p.clone() for p in start] if cfg.ema else None
    opt = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    kind = sde_kind(pipe, cfg)
    if cfg.clean_final and pipe.ddpm:
        raise ValueError(f"--clean-final is for flow models, and {cfg.model} knows DDPM steps: leave it out")
    ts = pipe.times(cfg.sample_steps, cfg.schedule, cfg.shift, cfg.resolution)     # T + 1 times, from 1 down to 0
    dts = [b - a if kind in ("flow", "dance") else -1 for a, b in zip(ts, ts[1:])]  # -1: no dt in std to undo
    run.begin(pipe, sample, params, ema, opt, rows)                    # from here on these are evaluated and saved
    null = pipe.encode_text([""])
    checked = False

    def rescore(x, i, text, scale):
        """Step i of stored x (T + 1, n, C, H, W) under the current weights; text: its ctx. logp (n,), mean, std, v."""
        v = guided(net, x[i], ts[i], text, null, scale, cfg.cfg_detach)                 # (n, C, H, W)
        _, logp, mean, std = transition(v, x[i], i, ts, cfg.noise_level, kind, x_next=x[i + 1])
        return logp, mean, std, v

    for step in run.steps():
        # 1. Roll out. A group never spans two processes.
        x = part = logp_old = None                                     # frees the last rollout before the next is made
        prompts, metas = run.groups(rows, step)                        # B strings, B dicts: whole groups
        ctx = pipe.encode_text(prompts)                                # text (B, L, width), pooled (B, width')
        choice, length = data.uniform(cfg.sample_steps, cfg.seed, step, "steps"), cfg.window or cfg.sample_steps
        first = int(data.uniform(1, cfg.seed, step, "window")[0] * max(1, cfg.sample_steps - length))
        window = range(first, first + length)                          # a shorter one leaves out the last step
        chunks, parts = run.chunks(cfg.group_size), []
        for s, groups in chunks:                                       # one is scored while the next is sampled
            parts.append(rollout(pipe, [c[s] for c in ctx], null, ts, window, cfg, step, groups))
            scoring.add(pipe.decode(parts[-1][2]), prompts[s], metas[s])
        x = torch.cat([part[0] for part in parts], 1)                  # (T + 1, B, C, H, W)
        logp_old = {i: torch.cat([part[1][i] for part in parts]) for i in parts[0][1]}     # {step: (B,)}
        # The schedule's last step is not trained, as released. Its noise stays in the image: next to none from SD3's
        # last t = .009, std .07 to .1 from t = .1, which blurs the reward; --clean-final scores x_0hat instead.
        trained = [i for i in logp_old if i < cfg.sample_steps - 1 or cfg.sample_steps == 1]
        trained = sorted(sorted(trained, key=choice.__getitem__)[:cfg.train_steps or None])
        del parts                                                      # their trajectories live on in x alone
        # 2. Reward
        reward = scoring.result()                                      # (all B,)
        # 3. Advantage, over the whole batch of all processes; each keeps its slice. First (7)'s estimates.
        few = list(range(0, len(prompts), max(1, len(prompts) * run.world // cfg.fisher_images)))

        def policy(i, j=few):                                          # logp, mean, std, v of step i as the weights are
            return rescore(x[:, j], i, [c[j] for c in ctx], cfg.cfg_train)
        trust = run.count.setdefault("trust", {})                      # the last rollout's; saved and logged
        before = [p.detach().clone() for p in params] if cfg.fisher_every else []
        if cfg.fisher_every and step % cfg.fisher_every == 0:
            u = data.noise((sum(p.numel() for p in params),), cfg.seed, step, "power", device=run.device, dtype=x.dtype)
            trust["lambda_max"], trust["g2"] = models.fisher(policy, trained, few, params, u, run)
        trust["gamma"] = 0.0 if cfg.gamma == "auto" else float(cfg.gamma)              # auto: 0 until a step was seen
        if cfg.gamma == "auto" and trust.get("eta"):
            limit = 2 * cfg.kl_budget / (trust["eta"] ** 2 * trust["lambda_max"] * trust["g2"])
            trust["gamma"] = max_gamma(limit, slas_advantage(reward, cfg.group_size, 0.0, std="before"))       # Eq. (7)
        adv = slas_advantage(reward, cfg.group_size, trust["gamma"], cfg.recenter, cfg.adv_std)                # Eq. (6)
        adv = adv.clamp(-cfg.adv_clip, cfg.adv_clip)                   # (6)'s tails, too: to a std of .88 at gamma 2
        row = scoring.row(adv)                                         # what is logged of images, rewards, advantages
        kept = (adv.view(-1, cfg.group_size).any(1) | (not cfg.drop_constant)).tolist()    # the groups to be trained on
        adv = run.mine(adv).to(run.device, x.dtype)                    # (B,)
        # 4. Update. Score the stored steps again under the current weights, one at a time to save memory.
        if not checked:                                                # the same weights must give the same log-probs
            with torch.no_grad(), run.uncounted():
                data.check_ratio(run, [rescore(x[:, p], i, [c[p] for c in ctx], cfg.cfg_train)[0] - logp_old[i][p]
                                       for p in run.pieces(chunks) for i in trained])
        logs, differences, grad_norm = torch.zeros(5, device=run.device, dtype=x.dtype), [], None      # logs: means
        norms = []                                                     # gradient norms of the updates that are made
        for update in range(cfg.updates):
            total = sum(kept[update::cfg.updates]) * cfg.group_size * len(trained)         # of all processes
            if not total:
                continue                                               # no gradient: AdamW would move on by itself
            for some, own in run.portions(update, kept):               # indices of its images; own []: for shards only
                share = len(own) / total
                part, text = x[:, some], [c[some] for c in ctx]
                for i in trained:
                    if cfg.kl_beta:                                    # first: see models.using on shards
                        with torch.no_grad(), models.using(params, start):
                            _, mean_ref, _, v_ref = rescore(part, i, text, cfg.cfg_ref)
                    logp, mean, std, v = rescore(part, i, text, cfg.cfg_train)
                    loss, stats = policy_loss(logp, logp_old[i][some], adv[some], cfg.clip_range)  # Eq. (3)
                    kl = torch.zeros_like(loss)
                    if cfg.kl_beta:
                        kl = kl_loss(mean, mean_ref, v, v_ref, std, dts[i], cfg.kl_form)           # Eq. (4)
                    ((loss + cfg.kl_beta * kl) * share).backward()
                    differences.append(logp.detach() - logp_old[i][some])
                    logs += torch.stack([loss.detach(), kl.detach(), *stats.values()]) * share
            if not checked:                                            # the update's own passes must agree, too,
                data.check_ratio(run, differences, stop=False)         # in bf16 up to its rounding
                checked = True
            grad_norm = run.update(opt, params, cfg.max_grad_norm)
            norms += [] if run.skipped else [grad_norm]
            if ema and run.count["updates"] % cfg.ema_every == 0:
                models.move(ema, params, 1 - cfg.ema)
        if cfg.fisher_every and any(norms):                            # what these updates moved, and their bound
            with torch.no_grad(), run.uncounted():
                new = [policy(i) for i in trained]
                with models.using(params, before):
                    old = [policy(i) for i in trained]
            kl = sum(kl_loss(m, m_, v, v_, s, 0, "gaussian") for (_, m, s, v), (_, m_, _, v_) in zip(new, old))
            moved = sum((p.detach() - q).square().sum() for p, q in zip(params, before)).sqrt().item()
            trust["eta"] = moved * len(norms) / sum(norms)
            trust["kl"] = run.sum(kl).item() / len(trained) / run.world
            trust["bound"] = trust["eta"] ** 2 / 2 * trust["lambda_max"] * trust["g2"] * row["advantage"]["square"]
        # 5. Report
        made = sum(any(kept[update::cfg.updates]) for update in range(cfg.updates))    # updates with a group to train
        means = zip(("loss", "kl", "ratio", "approx_kl", "clip_frac"), (run.sum(logs) / made).tolist())
        run.report(len(reward), row | dict(means, grad_norm=grad_norm))
    data.finish(run, start)


def main(argv=None):
    with data.exit_codes():
        train(data.cli(Config, PRESETS, argv, METHODS))


if __name__ == "__main__":
    main()
