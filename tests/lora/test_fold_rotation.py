"""Adapters of a model that was smoothed, rotated and scaled again: the same function."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from aimet_ext.core.equivalence import expand, transform
from aimet_ext.files.factors import NORM_GAIN
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.scales import load_scales, write_scales
from aimet_ext.lora import attach_adapter, fold_adapter, read_adapter
from aimet_ext.models.proof import Float64Casts
from aimet_ext.models.topology import find_blocks

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
READERS = {
    "input_layernorm": [f"self_attn.{name}_proj" for name in "qkv"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}
IDS = torch.arange(24).reshape(2, 12) * 5 % 128


def orthogonal(width: int, generator: torch.Generator) -> Tensor:
    values = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(values)[0]


class Transforms:
    """A model that is changed in place, with the ledger of it."""

    def __init__(self, model: Any) -> None:
        self.model, self.ledger = model, Ledger()
        self.generator = torch.Generator().manual_seed(3)

    def fold(self, kind: str, *sides: tuple[str, Any, Tensor], source: str = "") -> None:
        """Multiply factors into weights, written out as matrices, and note them."""
        for name, axis, factor in sides:
            module = self.model.get_submodule(name)
            matrix = torch.block_diag(*factor) if factor.dim() == 3 else torch.diag(factor)
            if axis == "in":
                module.weight.copy_(module.weight @ matrix)
                continue
            module.weight.copy_(matrix @ module.weight)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(matrix @ module.bias)
        size = sides[0][2].shape[-1]
        self.ledger.record("test", "", kind, kind, sides, size=size, source=source)

    def smooth(self) -> None:
        """Fold random scales into every pair."""
        for block in find_blocks(self.model):
            params = dict(self.model.get_submodule(block.name).named_parameters())
            for pair in block.pairs:
                noise = torch.randn(pair.size, generator=self.generator, dtype=torch.float64)
                for name, value in transform(params, [(pair, noise.exp())]).items():
                    params[name].copy_(value)
                sides = []
                for side in pair.sides:
                    width = params[f"{side.module}.weight"].shape[side.axis == "in"]
                    scale = expand(side, noise.exp(), width)
                    sides.append((f"{block.name}.{side.module}", side.axis, scale))
                self.ledger.record("s", block.name, pair.name, pair.kind, sides, size=pair.size)

    def rotate(self) -> None:
        """Fold the gains of norms, a rotation of the hidden width, and one of each head."""
        config = self.model.config
        r1 = orthogonal(config.hidden_size, self.generator)[None]
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        blocks = [f"model.layers.{number}" for number in range(config.num_hidden_layers)]
        norms = {"model.norm": ["lm_head"]}
        for block in blocks:
            for norm, readers in READERS.items():
                norms[f"{block}.{norm}"] = [f"{block}.{reader}" for reader in readers]
        for norm, readers in norms.items():
            gain = self.model.get_submodule(norm).weight.clone()
            self.fold(
                NORM_GAIN, (norm, "out", 1 / gain), *((r, "in", gain) for r in readers), source=norm
            )
            self.fold("R1", *((reader, "in", r1) for reader in readers))
        writers = [
            f"{block}.{name}" for block in blocks for name in ("self_attn.o_proj", "mlp.down_proj")
        ]
        self.fold("R1", ("model.embed_tokens", "in", r1), *((w, "out", r1.mT) for w in writers))
        for block in blocks:
            r2 = orthogonal(config.hidden_size // heads, self.generator)
            self.fold(
                "R2",
                (f"{block}.self_attn.v_proj", "out", r2.T.expand(groups, -1, -1)),
                (f"{block}.self_attn.o_proj", "in", r2.expand(heads, -1, -1)),
            )


@pytest.fixture(scope="module")
def rotated(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The original model, the changed one, and the scales as they are in a file; float64."""
    original = tiny_model("llama", attention_bias=True, mlp_bias=True).double()
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
        changed = Transforms(copy.deepcopy(original))
        changed.smooth()
        changed.rotate()
        changed.smooth()
    folder: pathlib.Path = tmp_path_factory.mktemp("scales")
    write_scales(folder, changed.ledger)
    return original, changed.model, load_scales(folder)


def adapter_on(model: Any, **config: Any) -> Any:
    settings = {"r": 4, "target_modules": LAYERS, **config}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.1 * noise
    return wrapped.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad(), Float64Casts():
        return model(input_ids=IDS, use_cache=False).logits


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bias": "lora_only", "use_rslora": True},
        {"lora_bias": True},
        {"target_modules": [*LAYERS, "lm_head", "embed_tokens"]},
        {
            "target_modules": ["q_proj", "k_proj", "gate_proj", "up_proj", "lm_head"],
            "use_dora": True,
        },
        {"target_modules": ["q_proj"], "modules_to_save": ["v_proj", "o_proj", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [5, 9, 10]}},
    ],
    ids=["lora", "biases", "own biases", "tables and heads", "dora", "whole layers", "tokens"],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
def test_same_function_after_smoothing_rotations_and_scales(
    rotated: Any, config: dict[str, Any]
) -> None:
    """What R1, R2 and scales leave unchanged on the base, they leave unchanged with an adapter."""
    original, changed, scales = rotated
    wrapped = adapter_on(original, **config)
    plain, reference = logits(original), logits(wrapped)
    assert deviation(plain, reference) > 1e-3
    assert deviation(logits(changed), plain) <= 1e-10
    folded = fold_adapter(wrapped, scales, base=original)
    fitted = attach_adapter(copy.deepcopy(changed), folded)
    assert deviation(logits(fitted), reference) <= 1e-10
    unfolded = attach_adapter(copy.deepcopy(changed), read_adapter(wrapped))
    assert deviation(logits(unfolded), reference) > 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"layers\.1\.mlp\.down_proj: the rows of its weight were rotated"),
        (
            {"modules_to_save": ["post_attention_layernorm"]},
            r"layers\.1\.post_attention_layernorm: the gains of this norm were folded",
        ),
    ],
    ids=["dora", "norms"],
)
def test_what_a_rotation_does_not_carry_over_is_refused(
    rotated: Any, config: dict[str, Any], message: str
) -> None:
    original, _, scales = rotated
    with pytest.raises(ValueError, match=message):
        fold_adapter(adapter_on(original, **config), scales, base=original)
