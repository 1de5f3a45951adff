"""Simulations of tiny models of any kind, and the moments of their layers computed directly."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.data.geometry import Geometry
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, Blockwise, PerChannel, PerTensor, QSpec

W4 = QSpec(bitwidth=4)
LINEAR_GRIDS = {
    "tensor": (PerTensor(), True),
    "tensor-asymmetric": (PerTensor(), False),
    "channel": (PerChannel(), True),
    "channel-asymmetric": (PerChannel(), False),
    "blocks": (Blockwise(8), True),
    "blocks-asymmetric": (Blockwise(8), False),
    "LPBQ": (LPBQ(8), True),
}


def simulate(model: nn.Module, sample: Tensor, spec: QSpec | dict[str, QSpec] = W4) -> Any:
    """A sim of any model, weights only."""
    from aimet_ext.sim.torch.setup import build_sim

    kinds = (nn.Linear, nn.Conv2d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    specs = {name: spec if isinstance(spec, QSpec) else spec.get(name) for name in names}
    return build_sim(model, sample, specs, None, "htp_v79")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def weights(sim: Any) -> dict[str, Tensor]:
    return {n: q.weight.detach().clone() for n, q in adapt(sim).weight_quantizers().items()}


def grids(sim: Any) -> dict[str, Any]:
    return {name: q.grid() for name, q in adapt(sim).weight_quantizers().items()}


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.offset, other.offset)


def as_simulated(sim: Any, name: str) -> Tensor:
    """The weight that AIMET's own quantizer makes of a layer's weight."""
    layer = sim.model.get_submodule(name)
    with torch.no_grad():
        return layer.param_quantizers["weight"](layer.weight).dequantize()


def mlp(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers: list[nn.Module] = []
    for width, after in itertools.pairwise(widths):
        layers += [nn.Linear(width, after), nn.ReLU()]
    return seeded(lambda: nn.Sequential(*layers[:-1])).to(dtype)


class Net(nn.Module):
    """Residual connections, branches, grouped and depthwise convolutions; ReLUs of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1, 2)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.depthwise = nn.Conv2d(
            12, 12, 3, padding="same", padding_mode="reflect", groups=12, bias=False
        )
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.conv(x)
        y += self.shortcut(x)
        y = torch.relu(y)
        deep = nn.functional.relu6(self.depthwise(self.grouped(y)))
        return self.head(torch.cat([y, deep], 1).mean((2, 3)))


LAYERS = ("stem", "conv", "shortcut", "grouped", "depthwise", "head")
IMAGES = [random(3, 3, 8, 8, seed=1), random(2, 3, 8, 8, seed=2)]


@functools.cache
def _net_sim(grid: str = "channel") -> Any:
    granularity, symmetric = LINEAR_GRIDS[grid]
    spec = QSpec(granularity=granularity, symmetric=symmetric)
    return simulate(seeded(Net), IMAGES[0], spec)


def net_sim(grid: str = "channel") -> Any:
    """A net with residual blocks, branches, grouped and depthwise convolutions; weights only."""
    return copy.deepcopy(_net_sim(grid))


def layer_inputs(model: nn.Module, names: list[str], data: Any) -> dict[str, Tensor]:
    """What reaches each layer, as rows ``[groups, tokens, in]`` over all batches, in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name in names:
        module = model.get_submodule(name)
        geometry = Geometry.of(module)

        def keep(_: Any, args: Any, name: str = name, geometry: Any = geometry) -> None:
            seen[name].append(geometry.rows(args[0]).double())

        hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in data:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts, 1) for name, parts in seen.items()}


def faint(share: Tensor) -> Tensor:
    """The share of noise that is taken out of one that was estimated: faint ones count less."""
    share = share.clamp(max=1)
    return share**2 * 1.05 / (share + 0.05)


def shrunk_by_definition(rows: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Second moments less the share of noise that products have by their variance over rows.

    :param rows: ``[groups, tokens, in]``; three of one text are worth one.
    :param most: Largest share.
    :returns: Moments ``[groups, in, in]``, and the share of products that was kept ``[groups]``.
    """
    tokens, width = rows.shape[1:]
    worth, beside = max(1, int(tokens / 3)), ~torch.eye(width, dtype=torch.bool)
    found, shares = [], []
    for group in rows:
        mean = group.T @ group / tokens
        variance = torch.zeros_like(mean)
        for row in group:
            variance += (torch.outer(row, row) - mean).square() / tokens
        own, alive = mean.diagonal(), mean.diagonal() > 0
        middle = own[alive].mean()
        products = squares = torch.tensor(most, dtype=rows.dtype)
        if worth > 1:
            variance /= worth - 1
            products = faint(variance[beside].sum() / mean[beside].square().sum()).clamp(max=most)
            apart = (own - middle)[alive].square().sum()
            squares = faint(variance.diagonal().sum() / apart).clamp(max=most)
        shrunk = mean * (1 - products)
        shrunk.diagonal().copy_(torch.where(alive, own + squares * (middle - own), own))
        found.append(shrunk)
        shares.append(1 - products)
    return torch.stack(found), torch.stack(shares)


def check_moments(
    float_model: nn.Module, sim: Any, problems: Any, data: Any, symmetry: str, strength: float
) -> None:
    """Every layer's moments against the two models themselves, run as wholes.

    The simulation as it is in the end quantizes the weights before a layer as they were then.
    """
    names = list(problems)
    original = layer_inputs(float_model, names, data)
    quantized = layer_inputs(sim.model, names, data)
    differ = 0
    for name in names:
        x = original[name] if symmetry == "symfp" else quantized[name]
        moment = problems[name].moment
        second = (x.mT @ x / x.shape[1]).view_as(moment.second)
        kept = 1.0
        if moment.noise is not None:
            most = 1 - torch.finfo(moment.second.dtype).eps ** 0.5
            second, kept = shrunk_by_definition(x, most)
            second, kept = second.view_as(moment.second), kept.view(-1, *[1] * (second.dim() - 1))
        scale = second.abs().max()
        assert (moment.second - second).abs().max() <= 1e-5 * scale, name
        assert moment.tokens == x.shape[1]
        if symmetry != "asym":
            assert moment.cross is None and problems[name].pull is None
            continue
        error = x - original[name]
        cross = -strength * (x.mT @ error / x.shape[1]).view_as(second)
        crossed, weight = kept * cross, problems[name].weight.to(cross)
        if moment.through:  # a convolution of one group, or a linear layer
            crossed = crossed @ weight.mT
            scale = scale * weight.abs().sum(1).max()
        assert (moment.cross - crossed).abs().max() <= 1e-5 * scale, name
        differ += bool(cross.abs().max() > 1e-4 * scale)
    assert symmetry != "asym" or differ > len(names) // 2
