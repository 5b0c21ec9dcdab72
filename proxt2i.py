"""ProxT2I: text to image by learned proximal operators, and GRPO on the sampler's own chain, in one file.

A score sampler steps forwards, by the slope where it stands: x' = x + gamma (x/2 + score(x)) + noise. A proximal
sampler adds the noise first (y) and goes by the slope where it lands: x' = y + lam score(x'). That x' is the proximal
operator prox(y; t, lam) = argmin_u |u - y|^2 / 2 - lam ln p_t(u), and a network can learn it. Few steps suffice, and
the chain is random by itself, so that policy gradients need no noise of their own.
Paper: ProxT2I, arXiv:2511.18742; its precursor ProxDM, arXiv:2507.08956. (n) is this file's number, [n] the paper's;
xi, the noise of a step, is `eps` in the code.

    (1) [1]    dX = -beta/2 X dt + sqrt(beta) dW, beta(t) = .1 + 19.9 t; gamma its integral    beta_integral, step_gamma
    (2) [8]    l = 1 - exp(-|pred - target|^2 / (d zeta^2)); zeta -> 0 finds the proximal operator   prox_matching_loss
    (3) [8]    y = X_t + sqrt(lam) eps; the network predicts (y - prox) / sqrt(lam), so its target is eps         train
    (4) [4, 6] y = (1 + gamma/2) x + sqrt(gamma) xi,  x' = prox(y; t', gamma)                          pda_hybrid_step
    (5) [3.1]  y = (x + sqrt(gamma) xi) / (1 - gamma/2),  x' = prox(y; t', gamma / (1 - gamma/2))             pda_step
    (6) [7]    f = prox_null + w (prox_text - prox_null), w = 1 + omega, the paper's omega                      guided
    (7) [9]    y' ~ N((1 + gamma'/2) f(y; t', gamma), gamma' I), gamma' the next step's                kernel, prox_logp
    (8) [A]    L = -mean_i min(q_i A_i, clip(q_i, 1-c, 1+c) A_i) + beta_KL KL, q_i: ratio   policy_loss, gaussian_kl
    (9)        v = (a y/sqrt(1+lam) - x_0) / s, a and s the input's signal and noise; instead of (3)   levels, answer_of
    (10)       L_hold = |f(y; 0, lam) - f_ref|^2, y = x_0 + sqrt(lam) eps: the last landing              hold_error

Eqs. (9) and (10) are ours. With eps as the target most of the loss is chance: y does not show which part of its noise
is eps and which was in X_t before. v asks only for x_0 given y; E[eps | y, x_0] then follows in closed form. With a
small zeta the network finds the mode x_0* of x_0 given y, and the step lands at E[X_t | y, x_0*]: the proximal operator
at t = 0 and for Gaussian data, elsewhere another point. The last landing has no log-prob; without (10) it drifts in RL.
Slips in the paper's text, put right here: gamma below [2] and PDA's proximal operator lack a minus sign, the display
before [6] halves gamma times the score, [A] sums down to k = 1, which has no density. Departs from it: gamma is beta's
integral over a step, as in ProxDM's proximal samplers, and here in Euler's, too (--score-gamma start: [2]'s, beta at
its start times its length); the network sees y scaled to variance 1, ProxDM's code feeds it as it is; (2) is taken on
the residual, as ProxDM's, which is [8] with zeta sqrt(lam) for zeta (--zeta-space x: as printed); log-probs and KL are
means over the latent's dimensions, (8) over images and steps; DPM-Solver is the ++(2M) variant; in RL the score chain's
last step is its mean, as the proximal chain's last adds no noise either.

    python proxt2i.py                                   # compare the samplers, then a short RL run, on the tiny models
    python proxt2i.py train --method prox --out OUT     # proximal matching (or a score model: --method score)
    python proxt2i.py rl | sample | compare | finetune  # the other stages; all flags: --help
"""
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import data                             # first: sets GOMP_SPINCOUNT, which torch reads once
import torch

import models
import rewards
from csrc import ops

# ============================================================================================================= Config

STAGES = ("compare", "rl", "train", "finetune", "sample")


# [source] behind a default: where it comes from; [source: 16]: there it is 16.
@dataclass
class Config:
    model: str = "tiny-prox"            # tiny-prox, tiny-score, uvit, or a directory
    weights: str = ""                   # the model's directory, if not weights/<model>
    init: str = ""                      # random: random weights at full size, to measure without a download
    stage: str = "rl"                   # the first word, not a flag: compare, rl, train, finetune, sample
    method: str = "prox"                # prox, or score: no lambda; rollouts by Euler-Maruyama in rl
    preset: str = ""                    # tiny or paper; official is paper, as no code is released
    reward: str = "shapes"              # a name, a weighted sum a:0.7,b:1.4, or file.py:function
    reward_mix: str = "reward"          # a sum of rewards, or of each one's advantages        [DanceGRPO, Alg. 1]
    eval_reward: str = ""               # what is reported; empty: shapes-strict, or --reward; public presets: their own
    gold_reward: str = ""               # logged beside it, to see a proxy being hacked; empty: shapes-strict or none
    reward_device: str = ""             # where rewards are computed, such as cpu or cuda:1; empty: where the run is
    reward_dtype: str = "float32"       # of the matrix products in --reward's CLIPs and imagereward: float32, bfloat16
    overlap: bool = False               # images are scored while the next are sampled: for GPUs and judges, not a CPU
    prompts: str = "shapes"             # shapes, geneval, geneval-unseen, ocr; a .txt, .jsonl, .json, .csv, a folder
    steps: int = 100000                 # rollouts; in training, optimizer steps
    minutes: float = 2.0                # stop after so many, evaluation at the end not counted
    sample_steps: int = 10              # N, steps of a rollout                                    [paper, App. C]
    eval_steps: int = 10                # network evaluations of an image in evaluation
    sampler: str = ""                   # prox: hybrid, pda; score: sde, sde-mean, ode, dpm; empty: --scheme's, or dpm
    score_gamma: str = "integral"       # of sde, sde-mean, ode: beta's integral; start: beta(t) dt    [paper: start]
    compare_steps: str = "4,5,6,8,10,25"  # steps that `compare` tries
    compare_with: str = "tiny-score"    # more models, a comma between: names or directories, prox or score
    compare_rewards: str = ""           # more rewards that `compare` reports, a comma between
    compare_cfg: str = ""               # guidance scales that `compare` also tries, with the default sampler  [Fig. 11]
    groups: int = 8                     # prompts a rollout, over all processes                    [paper: 12 x 6]
    group_size: int = 24                # G, images a prompt                                       [paper, App. C]
    resolution: int = 0                 # pixels; 0: the checkpoint's own
    predict: str = "v"                  # what a new network learns: noise, (3), or v, (9)        [ProxDM: noise]
    scheme: str = "hybrid"              # whose law of lambda is trained: hybrid, pda
    candidates: str = "4,5,6,7,8,9,10,25"  # numbers of steps that (t, lambda) is drawn from       [paper, App. C]
    zeta: float = 1.0                   # width of the matching loss; tiny: from 1 to .5           [paper: 1]
    zeta_start: float = 0.0             # zeta falls from here after the warm-up; 0: constant        [ProxDM: 2, then 1]
    warmup: float = 0.0                 # share of the steps trained by L1 first                   [ProxDM: .2]
    zeta_space: str = "residual"        # where |.| of Eq. (2) is taken: residual, the network's answer; or x
    drop: float = 0.1                   # share of captions emptied, beside those that have none   [paper, App. C]
    batch: int = 64                     # training images a step, over all processes               [paper: 2048]
    images: str = "shapes"              # training images: shapes, a folder, tar shards, or a folder of cached latents
    cooldown: float = 0.2               # share of the steps, the last ones, in which the rate falls to 0    [paper: 0]
    optimizer: str = "muon"             # of training: muon (matrices; the rest AdamW), adamw
    updates: int = 4                    # optimizer steps a rollout, on disjoint groups
    train_steps: int = 3                # steps trained of each rollout, drawn anew; 0: all        [paper: all]
    train_last: int = 5                 # from the last so many before the image, 0: from all      [paper: all N - 1]
    clip_range: float = 2e-3            # c in Eq. (8)
    kl_beta: float = 1e-3               # weight of the KL                                         [paper, App. C]
    hold: float = 1.0                   # weight of Eq. (10): the last landing stays where it was    [paper: 0]
    adv_clip: float = 5.0               # cuts advantages; by a group's std |A| <= sqrt(G - 1) anyway   [Flow-GRPO's]
    adv_std: str = "group"              # std of the advantage: group, batch or none
    ema: float = 0.9                    # decay of the moving average; evaluated and saved (0: off)
    cfg_rollout: float = 1.0            # guidance scale of the rollouts, 1 = off                  [paper: 5]
    cfg_train: float = 1.0              # guidance scale of the policy in the loss; the ratio wants the rollout's
    cfg_ref: float = 1.0                # guidance scale of the reference in the KL
    cfg_eval: float = 1.0               # guidance scale of evaluation
    cfg_also: float = 3.0               # guidance scale of a second test evaluation, before and after training; 0: none
    lora_rank: int = 0                  # 0: train all weights
    lora_alpha: float = 64.0            # the LoRA is scaled by alpha / rank
    lr: float = 2e-4                    # learning rate of AdamW; in train and finetune of --optimizer
    weight_decay: float = 1e-4          # AdamW's; with Muon, that of the matrices alone
    max_grad_norm: float = 1.0          # gradients are clipped to it
    micro_batch: int = 96               # images at once in the network; rewards see whole groups
    gpu_memory: int = 0                 # GB, 24, 48, 80 or 141: chooses micro_batch, checkpointing and offload; 0: off
    checkpointing: bool = False         # gradient checkpointing: blocks are computed again in the backward pass
    offload: bool = False               # the VAE waits on the CPU while the network works
    compile: bool = False               # torch.compile of the network's blocks
    merge_lora: bool = False            # the LoRA is added into the weights in evaluation; rounds in bf16
    fsdp: bool = False                  # FSDP2: weights and optimizer in shards (full fine-tuning, torchrun)
    text_length: int = 0                # T5's tokens; 0: the model's own
    text_cache: str = ""                # folder of the encoded prompts; empty: weights/text, nothing for small encoders
    dtype: str = "float32"              # the network computes in float32, bfloat16; float64 for tests
    eval_every: int = 10                # steps between evaluations on validation prompts (0: none)
    eval_images: int = 600              # test images, before and after
    val_images: int = 240               # validation images, on the way
    save_every: int = 10                # steps between checkpoints
    seed: int = 0                       # everything random is a function of (seed, step, group; in training: image)
    out: str = ""                       # the run's folder; empty: a free runs/proxt2i-NNN
    resume: bool = False                # go on from OUT/last with OUT's settings; on a CPU bit for bit
    fused: bool = True                  # compiled ops where built; --fused: build them first; --no-fused: plain PyTorch

    def __post_init__(self):
        data.check(self, words=dict(stage=STAGES, method=("prox", "score"), scheme=("hybrid", "pda"),
                                    predict=("noise", "v"), sampler=("", *SAMPLERS), zeta_space=("residual", "x"),
                                    score_gamma=("integral", "start"),
                                    optimizer=("muon", "adamw"), adv_std=("group", "batch", "none")),
                   least=dict(zeta_start=0, drop=0, warmup=0, cooldown=0, kl_beta=0, hold=0, train_steps=0,
                              train_last=0, batch=1), positive=("zeta", "clip_range"))
        for name in ("candidates", "compare_steps"):
            data.counts(name, getattr(self, name))
        if self.drop >= 1 or max(self.warmup, self.cooldown) > 1:
            raise ValueError(f"--drop {self.drop}: less than 1; --warmup {self.warmup}, --cooldown {self.cooldown}: at "
                             f"most 1")
        world = int(os.environ.get("WORLD_SIZE", 1))
        if self.stage in ("train", "finetune") and self.batch % world:
            raise ValueError(f"--batch {self.batch} cannot be shared out over {world} processes: try --batch "
                             f"{-(-self.batch // world) * world}")
        if self.stage == "rl" and not 2 <= self.sample_steps:
            raise ValueError(f"--sample-steps {self.sample_steps}: N steps have N - 1 that are Gaussian, so 2 or more")
        if self.stage == "rl" and self.scheme == "pda":
            raise ValueError("--scheme pda: the chain of Eq. (7) is the hybrid scheme's; rl wants --scheme hybrid")
        if self.stage == "train" and self.lora_rank:
            raise ValueError(f"--lora-rank {self.lora_rank}: train makes all weights anew: --lora-rank 0, or finetune")
        for name in FOR_TRAINING:
            if self.stage in ("sample", "compare") and getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is for training: {self.stage} has no use for it")
        if not all(math.isfinite(data.number(word)) for word in filter(None, self.compare_cfg.split(","))):
            raise ValueError(f"--compare-cfg {self.compare_cfg!r}: guidance scales, a comma between, as 1,3")
        if (self.fsdp or self.lora_rank) and self.optimizer == "muon" and self.stage in ("train", "finetune"):
            raise ValueError("--optimizer muon is for whole matrices, not for shards or a LoRA: --optimizer adamw")
        if self.scheme == "pda" and self.method == "prox" and self.stage in ("train", "finetune"):
            for n in data.counts("candidates", self.candidates):
                pda_lambdas(n)


FOR_TRAINING = dict(lora_rank=0, compile=False, fsdp=False, merge_lora=False)      # what sample and compare go without
HOLD_EVERY = 4                              # images 0, 4, ... of each group hold the last landing, Eq. (10)
SAMPLERS = {"hybrid": "prox", "pda": "prox",                          # and the method of the networks that they take;
            "sde": "score", "sde-mean": "score", "ode": "score", "dpm": "score"}   # sde-mean: the last noise left out
SHORT = dict(minutes=1e6, eval_every=500, save_every=250, micro_batch=256, weight_decay=0.01, ema=0.9985)
TINY = {"train": SHORT | dict(lr=2e-3, steps=11000, zeta_start=1.0, zeta=0.5, dtype="bfloat16"),     # by stage
        "finetune": SHORT | dict(lr=2e-4, steps=2000, zeta=0.5, dtype="bfloat16")}
LONG = dict(prompts="data/prompts.txt", reward="pickscore", eval_reward="pickscore", predict="noise",
            resolution=256, dtype="bfloat16", score_gamma="start", groups=72, group_size=24,   # 12 prompts x 6 batches
            cfg_rollout=5.0, cfg_train=5.0, cfg_ref=5.0, cfg_eval=5.0, cfg_also=0.0, steps=1000, minutes=1e6, lr=1e-4,
            kl_beta=1e-3, hold=0.0, train_steps=0, train_last=0, updates=1, ema=0.0, optimizer="adamw",
            eval_images=1024, eval_every=50, micro_batch=24, overlap=True, compare_with="")  # ours: lr, clip, dtype too
MORE = LONG | dict(images="data/images", cooldown=0.0, ema=0.9999, eval_every=5000, save_every=1000)
PAPER = {"train": MORE | dict(lr=8e-5, batch=2048, steps=100000),      # the paper's score model: --lr 4e-4
         "finetune": MORE | dict(lr=1e-5, batch=256, steps=60000, resolution=512)}     # no schedule is named


def presets(stage):
    """{preset: its numbers} for a stage, as data.cli takes them."""
    paper = {"uvit": PAPER.get(stage, LONG)}
    return {"tiny": TINY.get(stage, {}), "official": paper, "paper": paper}


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


def beta_integral(t0, t1):
    """The integral of beta(t) = 0.1 + 19.9 t from t0 to t1, Eq. (1): a step's gamma. Floats or tensors.

    The paper has beta_min and beta_max; .1 and 20 are ProxDM's code's."""
    return 0.1 * (t1 - t0) + 9.95 * (t1 ** 2 - t0 ** 2)


def step_gamma(t, t_next, how="integral"):
    """gamma of a step from t down to t_next: beta's integral or, with how = "start", Eq. [2]'s beta(t) (t - t_next)."""
    return beta_integral(t_next, t) if how == "integral" else (0.1 + 19.9 * t) * (t - t_next)


def alpha_bar(t):
    """exp(-int_0^t beta): X_t = sqrt(alpha_bar) X_0 + sqrt(1 - alpha_bar) eps. t: a float, or a tensor."""
    gamma = beta_integral(0.0, t)
    return gamma.neg().exp() if torch.is_tensor(gamma) else math.exp(-gamma)


def pda_lambdas(n):
    """PDA's lambda = gamma / (1 - gamma/2) of n uniform steps, from t = 1 down. Raises ValueError where gamma >= 2."""
    gammas = [beta_integral(k / n, (k + 1) / n) for k in reversed(range(n))]
    if gammas[0] >= 2:
        least = next(m for m in range(n, 1000) if beta_integral(1 - 1 / m, 1.0) < 2)
        raise ValueError(f"{n} steps of PDA: gamma of the first is {gammas[0]:.2f}, and Eq. (5) divides by 1 - "
                         f"gamma/2: gamma < 2 takes {least} steps or more; the hybrid scheme takes any number")
    return [gamma / (1 - gamma / 2) for gamma in gammas]


def prox_matching_loss(pred, target, zeta):
    """Proximal matching, Eq. (2): 1 - exp(-|pred - target|^2 / (d zeta^2)), to be minimised.

    pred, target: (B, ...) of d numbers each; zeta: a float > 0. Small zeta: only hits count, and the minimiser
    tends to the mode, the proximal operator; large zeta: the squared error, and the mean. Returns (B,). Raises
    ValueError for unequal shapes or dtypes. Source: ProxT2I, Eq. 8.
    """
    ops.check_same("prox_matching_loss", pred=pred, target=target)
    if ops.compiled(pred):
        return ops.prox_matching_loss(pred, target, zeta)              # the same in one kernel
    return -torch.expm1(-(pred - target).square().flatten(1).mean(1) / zeta ** 2)          # 1 - exp(...)


def draw_pairs(u, candidates, scheme="hybrid"):
    """(t, lam) as the sampler will meet them: N of the candidates, a step of its uniform grid. Equations (4), (5).

    u: (B, 2) uniform on [0, 1); candidates: numbers of steps. t, in {0, 1/N, ..., 1 - 1/N}, is where the step ends.
    scheme: hybrid, lam = gamma; pda, lam = gamma / (1 - gamma/2). Returns t, lam: (B,) each.
    """
    n = torch.tensor(candidates, dtype=u.dtype, device=u.device)[(u[:, 0] * len(candidates)).long()]
    t = (u[:, 1] * n).floor() / n
    gamma = beta_integral(t, t + 1 / n)
    return t, gamma if scheme == "hybrid" else gamma / (1 - gamma / 2)


def prox_logp(y_next, prox_y, gamma_next):
    """log N(y_next; (1 + gamma_next/2) prox_y, gamma_next I), Eq. (7), a mean over dimensions, in nats.

    y_next, prox_y: (B, C, H, W) float32; gamma_next: the next step's, a float > 0. Returns (B,). RL has
    the same from `kernel` and ops.linear_step, which serve score models, too. Source: ProxT2I, Eq. 9.
    """
    return gaussian_logp(y_next, (1 + gamma_next / 2) * prox_y, math.sqrt(gamma_next))


# == same: log-prob (dgpo grpo proxt2i slas) ==
def gaussian_logp(x, mean, std):
    """log N(x; mean, std^2 I), a mean over dimensions: (B,) in nats. x (not differentiated), mean: (B, ...);
    std: a float > 0."""
    logp = -((x.detach() - mean) / std).square() / 2 - math.log(std) - math.log(2 * math.pi) / 2
    return logp.flatten(1).mean(1)
# == end ==


def gaussian_kl(mean, mean_ref, std):
    """KL(N(mean, std^2 I) || N(mean_ref, std^2 I)) = |mean - mean_ref|^2 / (2 std^2), Eq. (8), exact: a mean over all
    of (B, ...), in nats per dimension. std: a float. Returns ()."""
    return (mean - mean_ref).square().mean() / (2 * std ** 2)


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


# ============================================================================================================ sampler

# prox(y, t, lam) and score(x, t) are plain callables: y, x (B, C, H, W) float32, t and lam floats -> (B, C, H, W). So
# every step here also runs with a closed form in place of a network.

def pda_hybrid_step(prox, x, t_next, gamma, eps):
    """One step of PDA-hybrid, Eq. (4): y = (1 + gamma/2) x + sqrt(gamma) eps, x_next = prox(y; t_next, gamma).

    x, eps: (B, C, H, W) float32; gamma: beta's integral over the step, any size. Returns x_next, y.
    Source: ProxT2I, Eqs. 4 and 6.
    """
    y = (1 + gamma / 2) * x + math.sqrt(gamma) * eps
    return prox(y, t_next, gamma), y


def pda_step(prox, x, t_next, gamma, eps):
    """One step of PDA, Eq. (5): y = (x + sqrt(gamma) eps) / (1 - gamma/2), x_next = prox(y; t_next, lam).

    lam = gamma / (1 - gamma/2); ValueError for gamma >= 2, which has no solution. The rest: see pda_hybrid_step.
    """
    if gamma >= 2:
        raise ValueError(f"gamma={gamma:.2f}: PDA divides by 1 - gamma/2; take more steps, or the hybrid scheme")
    y = (x + math.sqrt(gamma) * eps) / (1 - gamma / 2)
    return prox(y, t_next, gamma / (1 - gamma / 2)), y


def sde_euler_step(score, x, t, gamma, eps):
    """Euler-Maruyama on the reverse SDE: x + gamma (x/2 + score(x, t)) + sqrt(gamma) eps; eps None: the mean.

    x, eps: (B, C, H, W) float32; t, where the step begins, and gamma: floats. Returns x_next.
    Source: ProxT2I, Eq. 2.
    """
    mean = x + gamma * (x / 2 + score(x, t))
    return mean if eps is None else mean + math.sqrt(gamma) * eps


def ode_euler_step(score, x, t, gamma):
    """One Euler step of the probability-flow ODE: x + gamma/2 (x + score(x, t)). As above; arXiv:2011.13456."""
    return x + gamma / 2 * (x + score(x, t))


def dpm_step(x_0hat, x_0hat_last, x, t_last, t, t_next):
    """One step of DPM-Solver++(2M) for the VP diffusion: alpha^2 = alpha_bar(t), sigma^2 = 1 - alpha^2.

    x_0hat: this step's clean estimate; x_0hat_last, t_last: the step's before, None at the first. First order there,
    and for t_next = 0, where it is x_0hat itself. Source: Lu et al., arXiv:2211.01095, Alg. 2.
    """
    if t_next == 0:
        return x_0hat

    def log_snr(t):                                                    # ln(alpha / sigma)
        return -0.5 * math.log(math.expm1(beta_integral(0.0, t)))
    h, d = log_snr(t_next) - log_snr(t), x_0hat
    if x_0hat_last is not None:
        r = (log_snr(t) - log_snr(t_last)) / h
        d = x_0hat + (x_0hat - x_0hat_last) / (2 * r)
    alpha, sigma, sigma_next = math.sqrt(alpha_bar(t_next)), *(math.sqrt(1 - alpha_bar(s)) for s in (t, t_next))
    return sigma_next / sigma * x - alpha * math.expm1(-h) * d


def run_chain(name, answer, x, n, draw, score_gamma="integral"):
    """Sample x_0 from noise x (B, C, H, W) in n uniform steps of the sampler `name`.

    answer: prox(y, t, lam) for hybrid and pda, score(x, t) for the others; draw(k): the noise of step k, n .. 1.
    Euler-Maruyama as [2] has it (sde) adds the last step's noise to the image, too; sde-mean leaves it out, as ProxDM's
    code does for images. score_gamma: how `step_gamma` is taken for these two and for ode.
    """
    ts, last, t_last = [k / n for k in range(n + 1)], None, None
    for k in range(n, 0, -1):
        t, t_next = ts[k], ts[k - 1]
        gamma = step_gamma(t, t_next, score_gamma if SAMPLERS[name] == "score" else "integral")
        if name in ("hybrid", "pda"):
            x, _ = (pda_hybrid_step if name == "hybrid" else pda_step)(answer, x, t_next, gamma, draw(k))
        elif name in ("sde", "sde-mean"):
            x = sde_euler_step(answer, x, t, gamma, draw(k) if k > 1 or name == "sde" else None)
        elif name == "ode":
            x = ode_euler_step(answer, x, t, gamma)
        else:
            a = alpha_bar(t)
            x_0hat = (x + (1 - a) * answer(x, t)) / math.sqrt(a)
            x, last, t_last = dpm_step(x_0hat, last, x, t_last, t, t_next), x_0hat, t
    return x


def guided(net, x, t, lam, ctx, null, scale):
    """The network with classifier-free guidance, Eq. (6): uncond + scale (cond - uncond). Two passes in one, or one.

    x (B, C, H, W); t, lam (None for a score model): numbers, or (B,). As prox is affine in the network's answer,
    guiding this is guiding the proximal operator. Returns float32, or float64 for a float64 network.
    """
    dtype = models.compute_dtype(net)
    wide = torch.promote_types(dtype, torch.float32)
    t, lam = (n if n is None or torch.is_tensor(n) else x.new_full((len(x),), n, dtype=wide) for n in (t, lam))
    if scale == 1:
        return net(x.to(dtype), t, lam, *ctx).to(wide)                                     # (B, C, H, W)
    both = [torch.cat([n.expand_as(c), c]) for n, c in zip(null, ctx)]                     # unconditional first
    lam = None if lam is None else torch.cat([lam, lam])
    uncond, cond = net(torch.cat([x, x]).to(dtype), torch.cat([t, t]), lam, *both).to(wide).chunk(2)
    return ops.cfg_combine(uncond, cond, scale)


def levels(t, lam=0.0):
    """Signal a and noise s in y / sqrt(1 + lam) = a x_0 + s n, seen in training: a^2 + s^2 = 1. Eq. (9)."""
    a2 = alpha_bar(t) / (1 + lam)
    return a2 ** 0.5, (1 - a2) ** 0.5


def answer_of(method, net, ctx, null, scale):
    """The callable that a sampler asks: prox(y, t, lam) = y - sqrt(lam) eps(y / sqrt(1 + lam), ...), Eq. (3), or
    score(x, t) = -n(x, t) / sqrt(1 - alpha_bar). eps and n are the network's answer, or follow from its v, Eq. (9):
    n = s x + a v is all of the input's noise, and sqrt(lam / (1 + lam)) / s of it is expected to be eps.

    In training y has variance 1 + lam, and enters the network scaled to 1; ProxDM's code feeds y as it is. A chain's
    own y is wider, 1 + 2 gamma + gamma^2/4 on the first step, and enters by the same factor.
    """
    def noise(x, t, lam):
        out = guided(net, x, t, lam, ctx, null, scale)
        if net.config["predict"] == "v":
            a, s = levels(t, lam or 0.0)
            out = (s * x + a * out) * (math.sqrt(lam / (1 + lam)) / s if lam else 1.0)
        return out

    def prox(y, t, lam):
        return y - math.sqrt(lam) * noise(y / math.sqrt(1 + lam), t, lam)

    def score(x, t):
        return -noise(x, t, None) / math.sqrt(1 - alpha_bar(t))
    return prox if method == "prox" else score


def check_model(cfg, pipe, run, **steps):
    """Raise ValueError unless the pipeline's network is a U-ViT of the kind that cfg.method and the sampler ask for.

    steps: {flag: numbers of steps}; those a proximal model was not trained for are said: its lambdas are new to it.
    """
    lam = pipe.net.config.get("lam") if pipe.family == "uvit" else None
    if lam is None or lam != (cfg.method == "prox"):
        kind = "no U-ViT" if lam is None else f"a {('score', 'prox')[lam]} model, {'with' if lam else 'without'} lambda"
        raise ValueError(f"--model {cfg.model} is {kind}: --method {cfg.method} cannot use it")
    scheme = pipe.net.config.get("scheme", cfg.scheme)                 # of those that train wrote
    if scheme != cfg.scheme and cfg.stage != "finetune":
        raise ValueError(f"--scheme {cfg.scheme}: the network was trained for the lambdas of --scheme {scheme}: try it")
    if default_sampler(cfg) == "pda":
        pda_lambdas(cfg.eval_steps)
    known = pipe.net.config.get("candidates", cfg.candidates)
    for flag, numbers in steps.items():
        outside = ",".join(map(str, sorted(set(numbers) - set(data.counts("candidates", known)))))
        if outside and cfg.method == "prox":
            run.say(f"--{flag.replace('_', '-')} {outside}: the proximal model was trained for {known} steps")


def default_sampler(cfg):
    """The sampler's name: the flag's, or hybrid for a proximal model, dpm for a score model. ValueError for others."""
    name = cfg.sampler or (cfg.scheme if cfg.method == "prox" else "dpm")
    if SAMPLERS[name] != cfg.method:
        suits = ", ".join(key for key, method in SAMPLERS.items() if method == cfg.method)
        raise ValueError(f"--sampler {name} wants a {SAMPLERS[name]} model and this is a {cfg.method} model: {suits}")
    if name in ("hybrid", "pda") and name != cfg.scheme:
        raise ValueError(f"--sampler {name}: the network was trained for the lambdas of --scheme {cfg.scheme}")
    return name


def sample(pipe, prompts, keys, cfg, scale):
    """Images (B, 3, H, W) in [0, 1] in eval_steps steps, from noise that is a function of the keys, one an image."""
    latents, null, wide = [], pipe.encode_text([""]), data.wide(cfg.dtype)
    shape, device = pipe.latent_shape(cfg.resolution), next(pipe.net.parameters()).device
    with torch.no_grad(), models.merged(pipe.net, cfg.merge_lora):
        for i in range(0, len(prompts), cfg.micro_batch):
            ctx, some = pipe.encode_text(prompts[i:i + cfg.micro_batch]), keys[i:i + cfg.micro_batch]

            def draw(k):
                return data.noises(shape, [(*key, k) for key in some], device, wide)
            answer = answer_of(cfg.method, pipe.net, ctx, null, scale)
            x = run_chain(default_sampler(cfg), answer, draw("start"), cfg.eval_steps, draw, cfg.score_gamma)
            latents.append(x)
    return torch.cat([pipe.decode(x_0) for x_0 in latents])


def kernel(method, answer, state, k, n, score_gamma="integral"):
    """The Gaussian that the chain's next state is drawn from, Eq. (7): its mean (B, C, H, W) and std, a float.

    prox: state = y_k, the next is y_{k-1}; score: state = x_k, the next is x_{k-1} (sde-mean). At k = 1 the mean is the
    image itself and std is 0: of n steps n - 1 are Gaussian.
    """
    gamma = step_gamma(k / n, (k - 1) / n, score_gamma if method == "score" else "integral")
    if method == "score":
        return sde_euler_step(answer, state, k / n, gamma, None), math.sqrt(gamma) if k > 1 else 0.0
    landed = answer(state, (k - 1) / n, gamma)                         # f(y_k; t_{k-1}, gamma_k)
    gamma_next = beta_integral((k - 2) / n, (k - 1) / n) if k > 1 else 0.0
    return (1 + gamma_next / 2) * landed, math.sqrt(gamma_next)


def hold_error(method, policy, reference, x_0, n, eps, score_gamma="integral"):
    """Eq. (10): how far the weights have moved the last landing of a chain of n steps, mean |f - f_ref|^2, ().

    policy: a callable of `answer_of`; reference: the context in which its network has the reference's weights;
    x_0, eps: (B, C, H, W). y as in training, Eq. (3), or for a score model X_{1/n}. n is any number of steps, not the
    rollout's alone: held at 10 only, the last landing of 4 steps drifts, and RL at 10 steps ruins 4.
    """
    a, gamma = alpha_bar(1 / n), beta_integral(0.0, 1 / n)
    y = x_0 + math.sqrt(gamma) * eps if method == "prox" else math.sqrt(a) * x_0 + math.sqrt(1 - a) * eps
    with torch.no_grad(), reference:                                   # first: see models.using on shards
        landed_ref, _ = kernel(method, policy, y, 1, n, score_gamma)
    landed, _ = kernel(method, policy, y, 1, n, score_gamma)
    return (landed - landed_ref).square().mean()


@torch.no_grad()
def rollout(pipe, ctx, null, cfg, step, groups):
    """One chain for each image: states (n + 1, B, C, H, W), the image last, and logp {k: (B,)} of k = n .. 2.

    states[n - k] is y_k (or x_k). Each group's noise is a function of (seed, step, group); groups: their numbers,
    counted over all processes.
    """
    n, shape = cfg.sample_steps, (cfg.group_size, *pipe.latent_shape(cfg.resolution))
    device, wide = ctx[0].device, data.wide(cfg.dtype)

    def draw(name):                                                    # (B, C, H, W)
        return data.noises(shape, [(cfg.seed, step, g, name) for g in groups], device, wide).flatten(0, 1)
    pieces = [slice(i, i + cfg.micro_batch) for i in range(0, len(ctx[0]), cfg.micro_batch)]       # as the update's
    answers = [answer_of(cfg.method, pipe.net, [c[p] for c in ctx], null, cfg.cfg_rollout) for p in pieces]
    state, logp = draw("start"), {}
    if cfg.method == "prox":                                           # y_N of x_N, Eq. [9]
        gamma = beta_integral(1 - 1 / n, 1.0)
        state = (1 + gamma / 2) * state + math.sqrt(gamma) * draw("first")
    states = [state]
    for k in range(n, 0, -1):
        means, (std, *_) = zip(*(kernel(cfg.method, answer, states[-1][p], k, n, cfg.score_gamma)
                                 for p, answer in zip(pieces, answers)))
        x, logp_k = ops.linear_step(torch.cat(means), std=std, eps=draw(f"step {k}") if std else None)  # mean + std xi
        states.append(x)
        if std:
            logp[k] = logp_k                                           # gaussian_logp(x, mean, std)
    return torch.stack(states), logp


# ============================================================================================================== train

def matching_loss(cfg, progress, pred, target, width):
    """The loss of training, (): L1 in the warm-up, then Eq. (2); squared error for a score. progress: in [0, 1).

    pred, target: (B, C, H, W), what the network answers; width: (B,), how far one unit of it moves the proximal
    operator, sqrt(lam) in Eq. (3).
    """
    if cfg.method == "score":
        return (pred - target).square().mean()
    if progress < cfg.warmup:
        return (pred - target).abs().mean()
    start, progress = cfg.zeta_start or cfg.zeta, (progress - cfg.warmup) / (1 - cfg.warmup + 1e-9)
    zeta = start + (cfg.zeta - start) * progress
    if cfg.zeta_space == "x":                                          # |prox - X_t|, with v |prox - E[X_t | y, x_0]|
        pred, target = (width[:, None, None, None] * part for part in (pred, target))
    return prox_matching_loss(pred, target, zeta).mean()


def train(cfg):
    """Stage train, and finetune at another size: learn the proximal operators (3), or the noise, from images."""
    run = data.Run(cfg, "proxt2i")
    data.load_judges(cfg, run)
    pipe, params = data.load_policy(cfg, run, fresh=cfg.stage == "train")
    net = pipe.net
    net.config |= {"scheme": cfg.scheme, "candidates": cfg.candidates} if cfg.method == "prox" else {}
    start = [p.detach().clone() for p in params]
    ema = [p.clone() for p in start] if cfg.ema else None
    opt = data.optimizer(cfg, net, params)
    check_model(cfg, pipe, run)
    if cfg.predict != net.config["predict"]:
        raise ValueError(f"--predict {cfg.predict}: this network has learned {net.config['predict']}")
    shape, candidates = pipe.latent_shape(cfg.resolution), data.counts("candidates", cfg.candidates)
    mine = run.mine(range(cfg.batch))                                  # this process's, counted over all
    size = shape[1] * (pipe.vae.factor if pipe.vae else 1)
    stream = data.training_stream(cfg.images, size, run.rank, run.world, len(mine), cfg.seed)
    run.begin(pipe, sample, params, ema, opt, stream=stream)           # from here on these are evaluated and saved
    null = pipe.encode_text([""])
    for step in run.steps(cfg.stage, mininterval=1):
        # 1. Images, some of their captions emptied
        keys = [(cfg.seed, step, i) for i in mine]
        u = torch.tensor([data.uniform(3, *key, "train") for key in keys], dtype=torch.float64)    # (B, 3)
        x_0, ctx = data.encoded(run, stream(step), null, u[:, 0] < cfg.drop)       # (B, C, H, W), [(B, L, D)]
        # 2. Times and noise
        noise, eps = (data.noises(shape, [(*key, name) for key in keys], x_0.device, x_0.dtype)
                      for name in ("noise", "eps"))
        t, lam = 1 - 0.999 * u[:, 1], torch.zeros(len(u))              # of a score model: t in (.001, 1], y = X_t
        if cfg.method == "prox":
            t, lam = draw_pairs(u[:, 1:], candidates, cfg.scheme)
        t, lam = t.to(x_0), lam.to(x_0)                                # (B,) each
        abar, column = alpha_bar(t)[:, None, None, None], lam[:, None, None, None]
        x = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise              # X_t  (B, C, H, W)
        scaled = (x + column.sqrt() * eps) / (1 + column).sqrt()       # y, Eq. (3), at variance 1
        target, width = eps if cfg.method == "prox" else noise, lam.sqrt()
        if net.config["predict"] == "v":                               # Eq. (9)
            a, sigma = (level[:, None, None, None] for level in levels(t, lam))
            target = (a * scaled - x_0) / sigma
            width = lam / (1 + lam).sqrt() * (a / sigma).flatten()
        # 3. Loss and update
        progress, total = step / cfg.steps, 0.0
        for k in range(0, len(mine), cfg.micro_batch):
            s = slice(k, k + cfg.micro_batch)
            strength, text = lam[s] if cfg.method == "prox" else None, [c[s] for c in ctx]
            pred = guided(net, scaled[s], t[s], strength, text, null, 1.0)
            loss = matching_loss(cfg, progress, pred, target[s], width[s]) * len(pred) / cfg.batch
            loss.backward()
            total = total + loss.detach()
        fall = (1 - progress + 1 / cfg.steps) / cfg.cooldown if cfg.cooldown else 1.0
        rate = cfg.lr * min(1.0, (step + 1) / 200, fall)               # warms up, cools down
        grad_norm = run.update(opt, params, cfg.max_grad_norm, rate)
        if ema:
            models.move(ema, params, max(1 - cfg.ema, 1 / (step + 1)))
        # 4. Report
        run.report(cfg.batch, {"loss": run.sum(total).item(), "grad_norm": grad_norm})
    data.finish(run, start)


def train_rl(cfg):
    """Stage rl: GRPO on the chain of Eq. (7), or on the score model's Euler-Maruyama chain."""
    run = data.Run(cfg, "proxt2i")
    scoring, rows = data.load_inputs(cfg, run)                         # the reward, the prompts to train on
    pipe, params = data.load_policy(cfg, run)
    net, n = pipe.net, cfg.sample_steps
    start = [p.detach().clone() for p in params]                       # the model before RL, and the reference
    ema = [p.clone() for p in start] if cfg.ema else None
    opt = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    candidates, shape = data.counts("candidates", cfg.candidates), pipe.latent_shape(cfg.resolution)
    check_model(cfg, pipe, run, sample_steps=[n], candidates=candidates if cfg.hold else ())
    run.begin(pipe, sample, params, ema, opt, rows)                    # from here on these are evaluated and saved
    null = pipe.encode_text([""])
    checked = False

    def rescore(states, k, text, scale):
        """Step k of stored states (n + 1, b, C, H, W) by the current weights; text: its ctx. logp (b,), mean, std."""
        answer = answer_of(cfg.method, net, text, null, scale)
        mean, std = kernel(cfg.method, answer, states[n - k], k, n, cfg.score_gamma)
        _, logp = ops.linear_step(mean, std=std, x_next=states[n - k + 1])     # gaussian_logp, None at k = 1
        return logp, mean, std

    for step in run.steps():
        # 1. Roll out. A group never spans two processes.
        prompts, metas = run.groups(rows, step)                        # B strings, B dicts: whole groups
        ctx = pipe.encode_text(prompts)                                # (B, L, D)
        chunks, parts = run.chunks(cfg.group_size), []
        for s, groups in chunks:                                       # one is scored while the next is sampled
            parts.append(rollout(pipe, [c[s] for c in ctx], null, cfg, step, groups))
            scoring.add(pipe.decode(parts[-1][0][-1]), prompts[s], metas[s])
        states = torch.cat([part[0] for part in parts], 1)             # (n + 1, B, C, H, W)
        logp_old = {k: torch.cat([part[1][k] for part in parts]) for k in parts[0][1]}     # {k: (B,)}
        choice = data.uniform(n + 1, cfg.seed, step, "steps")
        last = [k for k in logp_old if k <= 1 + (cfg.train_last or n)]  # k = 1, the image's own, has no log-prob
        trained = sorted(sorted(last, key=choice.__getitem__)[:cfg.train_steps or None])
        # 2. Reward
        reward = scoring.result()                                      # (all B,)
        # 3. Advantage, over the whole batch of all processes; each keeps its slice
        adv = group_advantage(reward, cfg.group_size, cfg.adv_std).clamp(-cfg.adv_clip, cfg.adv_clip)
        row = scoring.row(adv)                                         # what is logged of images, rewards, advantages
        adv = run.mine(adv).to(run.device, states.dtype)               # (B,)
        # 4. Update. Score the stored steps again under the current weights, one at a time to save memory.
        if not checked:                                                # the same weights must give the same log-probs
            with torch.no_grad(), run.uncounted():
                data.check_ratio(run, [rescore(states[:, p], k, [c[p] for c in ctx], cfg.cfg_train)[0] - logp_old[k][p]
                                       for p in run.pieces(chunks) for k in trained])
        logs, differences = torch.zeros(6, device=run.device, dtype=states.dtype), []      # loss, kl, stats, hold
        for update in range(cfg.updates):
            u = data.uniform(1, cfg.seed, step, update, "hold")[0]
            m = candidates[int(len(candidates) * u)]                   # of m steps the last landing is held, Eq. (10)
            for some, own in run.portions(update):                     # indices of its images; own []: for shards only
                share = len(own) * cfg.updates / (cfg.groups * cfg.group_size * len(trained))
                part, text = states[:, some], [c[some] for c in ctx]
                for k in trained:
                    if cfg.kl_beta:                                    # first: see models.using on shards
                        with torch.no_grad(), models.using(params, start):
                            _, mean_ref, _ = rescore(part, k, text, cfg.cfg_ref)
                    logp, mean, std = rescore(part, k, text, cfg.cfg_train)
                    loss, stats = policy_loss(logp, logp_old[k][some], adv[some], cfg.clip_range)     # Eq. (8)
                    kl = gaussian_kl(mean, mean_ref, std) if cfg.kl_beta else torch.zeros_like(loss)
                    ((loss + cfg.kl_beta * kl) * share).backward()
                    differences.append(logp.detach() - logp_old[k][some])
                    logs[:-1] += torch.stack([loss.detach(), kl.detach(), *stats.values()]) * share
                few = [j for j in own if j % cfg.group_size % HOLD_EVERY == 0]
                if cfg.hold and (few or cfg.fsdp):                     # Eq. (10), on a quarter of a group's images
                    weight = len(few) * cfg.updates / (cfg.groups * -(-cfg.group_size // HOLD_EVERY))
                    few = few or [0]
                    keys = [(cfg.seed, step, run.rank * len(prompts) + j, "hold") for j in few]
                    eps = data.noises(shape, keys, run.device, states.dtype)
                    few = data.sent(torch.tensor(few), run.device)
                    policy = answer_of(cfg.method, net, [c[few] for c in ctx], null, cfg.cfg_train)
                    hold_loss = hold_error(cfg.method, policy, models.using(params, start), states[-1, few], m, eps,
                                           cfg.score_gamma)
                    (cfg.hold * hold_loss * weight).backward()
                    logs[-1] += hold_loss.detach() * weight
            if not checked:                                            # the update's own passes must agree, too,
                data.check_ratio(run, differences, stop=False)         # in bf16 up to its rounding
                checked = True
            grad_norm = run.update(opt, params, cfg.max_grad_norm)
            if ema:
                models.move(ema, params, 1 - cfg.ema)
        # 5. Report
        loss, kl, *values, hold = (run.sum(logs) / cfg.updates).tolist()
        run.report(len(reward), row | {"loss": loss, "kl": kl, "hold": hold, **dict(zip(stats, values)),
                                       "grad_norm": grad_norm})
    data.finish(run, start)


# ============================================================================================================ compare

def sample_stage(cfg):
    """Stage sample: a sheet of pictures of validation prompts, and their score."""
    run = data.Run(cfg, "proxt2i")
    rows = data.draw_prompts(data.prompts(cfg.prompts, "val"), cfg.val_images, "val")
    judges = rewards.judges(cfg, run.device, rows)
    pipe = data.loaded(cfg, run)
    check_model(cfg, pipe, run, eval_steps=[cfg.eval_steps])
    run.make_out()
    data.painted(run, sample, pipe, rows, judges, default_sampler(cfg))


def compare(cfg):
    """Stage compare: what every sampler scores at every number of steps, for all models: table, CSV and pictures."""
    run = data.Run(cfg, "proxt2i")
    steps = data.counts("compare_steps", cfg.compare_steps)
    rows = data.draw_prompts(data.prompts(cfg.prompts, "test"), cfg.eval_images, "test")
    judges = rewards.judges(cfg, run.device, rows, cfg.compare_rewards.split(","))
    lines, shown_as = [], set()                                        # (a row's name, its Config, its pipeline)
    asked = [(cfg.model, cfg.weights, cfg.init), *((name, "", "") for name in cfg.compare_with.split(",") if name)]
    for i, (model, weights, init) in enumerate(asked, 1):
        pipe = data.loaded(replace(cfg, model=model, weights=weights, init=init), run)
        method = "prox" if pipe.net.config.get("lam") else "score"
        one = replace(cfg, model=model, method=method, sampler="", eval_steps=min(steps))
        check_model(one, pipe, run, compare_steps=steps)
        path = Path(weights or model)                                  # the second of a kind is called by its run
        run_name = path.parent.name if path.name == "model" else path.name
        names = "", f" {run_name}", f" {path}", f" {path} {i}"
        name = next(name for name in names if (one.method, name) not in shown_as)
        shown_as.add((one.method, name))
        lines += [(sampler + name, replace(one, sampler=sampler), pipe) for sampler, method in SAMPLERS.items()
                  if method == one.method and sampler not in {"hybrid", "pda"} - {cfg.scheme}]
        lines += [(f"{default_sampler(one)}{name} at guidance {scale}", replace(one, cfg_eval=float(scale)), pipe)
                  for scale in filter(None, cfg.compare_cfg.split(","))]
    run.make_out()
    data.comparison(run, sample, lines, steps, rows, judges)


def quick_start(cfg):
    """Compare, then a short RL run. Typed again after a kill, with --out, it does not compare what it has compared."""
    if cfg.out:
        data.refuse_taken(Path(cfg.out))                               # refused now, not later
    rewards.load(cfg.reward, device=cfg.reward_device or data.join()[2])                   # and so is a bad reward
    out = f"{Path(cfg.out)}-compare" if cfg.out else ""
    if not (out and (Path(out) / "compare.csv").exists()):
        steps = "4,10" if cfg.compare_steps == Config.compare_steps else cfg.compare_steps
        compare(replace(cfg, eval_images=min(cfg.eval_images, 240), compare_steps=steps, stage="compare", out=out,
                        resume=bool(out) and (Path(out) / "config.json").exists(), **FOR_TRAINING))
    train_rl(cfg)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    stage = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    with data.exit_codes():
        typed = {word.split("=")[0] for word in argv}
        if "--stage" in typed:
            raise ValueError(f"--stage is the command's first word: python proxt2i.py {'|'.join(STAGES)} --model ...")
        if stage and stage not in STAGES:
            raise ValueError(f"{stage!r} is no stage: python proxt2i.py {'|'.join(STAGES)} --model ...")
        foreign = {"sample": {"--sample-steps"}, "compare": {"--sample-steps", "--eval-steps"}}.get(stage, set())
        if odd := typed & foreign:
            raise ValueError(f"{min(odd)} is not for {stage}: sample takes --eval-steps, compare --compare-steps")
        if stage == "compare" and (odd := typed & {"--sampler", "--method"}):
            raise ValueError(f"{min(odd)} has no use in compare, which takes every sampler of its models")
        cfg = data.cli(Config, presets(stage), argv + ["--stage", stage] * bool(stage))
        if not stage and not cfg.resume and not {"--steps", "--minutes"} & typed:
            return quick_start(cfg)
        {"rl": train_rl, "train": train, "finetune": train, "sample": sample_stage, "compare": compare}[cfg.stage](cfg)
        data.leave()                                                   # sample and compare are still in it


if __name__ == "__main__":
    main()
