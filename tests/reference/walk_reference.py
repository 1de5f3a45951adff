"""Tiny models to walk through, and what reaches a layer by running a whole copy of the model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional


class PadShortcut(nn.Module):
    """A shortcut without parameters: every second position, new channels zero."""

    def forward(self, x):
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class Residual(nn.Module):
    """Two convolutions and a shortcut, with in-place operations as in published models."""

    def __init__(self, channels, outputs, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, 1)
        self.norm = nn.Identity()  # what a folded batch norm leaves
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.conv2(self.relu(self.norm(self.conv1(x))))
        y += self.shortcut(x)
        return functional.relu(y, inplace=True)


class TinyNet(nn.Module):
    """Residual blocks of all three kinds, branches, grouped and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(
            Residual(4, 4, 1, nn.Sequential()),
            Residual(4, 8, 2, PadShortcut()),
            Residual(8, 8, 2, nn.Conv2d(8, 8, 1, 2)),
        )
        self.left = nn.Conv2d(8, 6, 1, groups=2)
        self.right = nn.Conv2d(8, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect", groups=8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(22, 5)

    def forward(self, x):
        x = self.blocks(torch.relu(self.stem(x)))
        left, right = self.left(x), self.right(x)
        deep = functional.relu6(self.dropout(self.depthwise(right)))
        x = torch.cat([left.tanh(), right, deep], 1)  # [batch, 22, 2, 2]
        return self.head(x.mean((2, 3)).view(x.size(0), -1))


def tiny_net():
    """The net in float64, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyNet().double().eval()


def layer_names(model):
    """All its linear layers and convolutions."""
    kinds = (nn.Conv2d, nn.Linear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def layer_input(model, layer, batch, weights):
    """What reaches a layer in a copy of the model that has these weights."""
    model = copy.deepcopy(model)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.clone()
    seen = []
    model.get_submodule(layer).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    with torch.no_grad():
        model(batch)
    assert len(seen) == 1
    return seen[0]
