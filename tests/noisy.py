"""A learned reward with noise: python slas.py --method dance --reward tests/noisy.py:score --eval-reward tiny-clip."""
import torch

import rewards

clean = rewards.load("tiny-clip")


def score(images, prompts, metas):
    """tiny-clip plus noise of std .1, about its own spread within a prompt; the noise is a function of the images."""
    g = torch.Generator().manual_seed(int(images.double().sum() * 1e6) % 2 ** 31)
    return clean(images, prompts, metas) + .1 * torch.randn(len(images), generator=g).to(images.device)
