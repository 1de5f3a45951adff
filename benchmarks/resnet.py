"""A trained ResNet-20 for CIFAR-10 with its images, and how often it is right.

Shortcuts are option A: every second pixel, channels padded with zeros. Each ReLU is a module of
its own, for that is how AIMET finds the activation that follows a convolution.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS, BLOCKS, CLASSES = (16, 32, 64), 3, 10


class Block(nn.Module):
    """Two convolutions around a shortcut without parameters."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.stride, self.padding = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.padding:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *2 * (self.padding,)))
        return self.relu2(out + x)


class ResNet20(nn.Module):
    """``[batch, 3, 32, 32]`` to logits ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU()
        widths = (WIDTHS[0], *WIDTHS)
        for i in range(3):
            first = Block(widths[i], widths[i + 1], stride=2 if i else 1)
            rest = [Block(widths[i + 1], widths[i + 1], 1) for _ in range(BLOCKS - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(x)))


def load_resnet(folder: Path, *, folded: bool = True) -> nn.Module:
    """The trained network in evaluation mode, batch norms folded into the convolutions."""
    from safetensors.torch import load_file

    model = ResNet20()
    state = load_file(folder / "resnet20.safetensors")
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict({**counters, **state})
    model.eval()
    if folded:
        from aimet_torch.batch_norm_fold import fold_all_batch_norms

        fold_all_batch_norms(model, (1, 3, 32, 32))
    return model


def load_images(file: Path) -> tuple[Tensor, Tensor]:
    """Normalized images ``[images, 3, 32, 32]`` and classes ``[images]``."""
    with np.load(file) as arrays:
        pixels, classes = arrays["x"], arrays["y"]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std, torch.from_numpy(classes)


def draw(images: Tensor, count: int, seed: int) -> Tensor:
    """``count`` images at random, none twice."""
    generator = torch.Generator().manual_seed(seed)
    return images[torch.randperm(len(images), generator=generator)[:count]]


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Share of images whose class has the largest logit."""
    right = sum(
        int((model(batch).argmax(-1) == wanted).sum())
        for batch, wanted in zip(images.split(250), classes.split(250), strict=True)
    )
    return right / len(classes)
