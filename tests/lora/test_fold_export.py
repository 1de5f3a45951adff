"""Adapters fitted to a model that OmniQuant and a second technique changed, as it was exported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import aimet_ext
from aimet_ext import Blockwise, QSpec
from aimet_ext.core.equivalence import expand, transform
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.manifest import read_manifest
from aimet_ext.files.scales import SCALES_FILE, write_scales
from aimet_ext.lora import fold_adapter, read_adapter
from aimet_ext.lora.fold import scales_digest
from aimet_ext.models.topology import find_blocks
from aimet_ext.sim.protocol import adapt

peft = pytest.importorskip("peft")
pytest.importorskip("aimet_torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # What peft 0.21 does with transformers 5.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LAYERS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BOLD = {
    "num_iterations": 10,
    "init": "ones",
    "search_sweeps": 0,
    "let_lr": 0.03,
    "lr_schedule": "constant",
    "evaluations": 10,
    "pairs": ("norm_qkv", "v_o", "norm_mlp", "up_down", "q_k"),
    "progress": False,
}


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(7), use_cache=False).logits


def second_technique(sim: Any) -> None:
    """Another round of scales in the sim's own weights, noted in its ledger."""
    ledger = adapt(sim).ledger
    generator = torch.Generator().manual_seed(5)
    modules = []
    for block in find_blocks(sim.model):
        params = dict(sim.model.get_submodule(block.name).named_parameters())
        for pair in block.pairs:
            scale = 2 ** (2 * torch.rand(pair.size, generator=generator) - 1)
            with torch.no_grad():
                for name, value in transform(params, [(pair, scale)]).items():
                    params[name].copy_(value)
            sides = []
            for side in pair.sides:
                weight = params[f"{side.module}.weight"]
                multiplier = expand(side, scale, weight.shape[0 if side.axis == "out" else 1])
                sides.append((f"{block.name}.{side.module}", side.axis, multiplier))
            ledger.record("smooth", block.name, pair.name, pair.kind, sides, size=pair.size)
        modules += [f"{block.name}.{name}" for name in block.linears]
    ledger.log_run("smooth", modules)


@pytest.fixture(scope="module")
def exported(tiny_model: Any, tmp_path_factory: Any) -> Any:
    """Folder of the original, padded where blocks do not fit, and of its export after two."""
    root = tmp_path_factory.mktemp("exported")
    model = tiny_model("qwen2", intermediate_size=120, max_position_embeddings=64)
    model.save_pretrained(root / "original")
    spec = QSpec(bitwidth=4, granularity=Blockwise(32), on_indivisible="pad")
    sim = aimet_ext.create_sim(model, ids(), weights=spec, activations=None)
    aimet_ext.apply_omniquant(sim, [ids(1)], **BOLD)
    second_technique(sim)
    sim.compute_encodings(lambda quantized: quantized(ids()))
    aimet_ext.export(sim, root / "export", "model", ids()[:1])
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=LAYERS, bias="lora_only")
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.eval().save_pretrained(root / "adapter")
    return root, model, wrapped


def test_the_exported_model_with_its_adapter(exported: Any, tmp_path: Any) -> None:
    """max|change| / max|logits| <= 1e-5 in float32, all from files, with a padded MLP."""
    root, _, wrapped = exported
    before = read_adapter(root / "adapter")
    folded = fold_adapter(
        root / "adapter", root / "export", tmp_path / "folded", base=root / "original"
    )
    assert folded.folded["techniques"] == ["omniquant", "smooth"]
    assert folded.layers["model.layers.0.mlp.up_proj"].b.shape[0] == 128
    assert before.layers["model.layers.0.mlp.up_proj"].b.shape[0] == 120
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "export")
    assert base.config.intermediate_size == 128
    both = peft.PeftModel.from_pretrained(base, tmp_path / "folded").eval()
    reference = logits(wrapped)
    change = (logits(both) - reference).abs().max() / reference.abs().max()
    assert float(change) <= 1e-5
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "original")
    change = (logits(base) - reference).abs().max() / reference.abs().max()
    assert float(change) > 1e-3  # the adapter matters


def test_a_folded_adapter_knows_what_it_was_folded_with(exported: Any, tmp_path: Any) -> None:
    root, *_ = exported
    scales = aimet_ext.load_scales(root / "export")
    fold_adapter(root / "adapter", root / "export", tmp_path / "folded")
    folded = read_adapter(tmp_path / "folded")
    assert folded.folded["origin"] == scales.origin
    assert folded.folded["scales"] == scales_digest(scales)
    assert read_manifest(tmp_path / "folded")["kind"] == "adapter"
    with pytest.raises(ValueError, match=r"was folded already \(omniquant, smooth\)"):
        fold_adapter(tmp_path / "folded", root / "export")


def test_the_base_must_be_the_one_the_scales_were_made_for(exported: Any, tmp_path: Any) -> None:
    root, model, _ = exported
    for base in (model, copy.deepcopy(model).double(), root / "original"):
        fold_adapter(root / "adapter", root / "export", base=base)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-3
    with pytest.raises(ValueError, match="the weights of the given Qwen2ForCausalLM are others"):
        fold_adapter(root / "adapter", root / "export", base=other)
    # The folder that the adapter itself names is looked at as well.
    other.save_pretrained(tmp_path / "other")
    adapter = read_adapter(root / "adapter")
    adapter = type(adapter)(
        "x",
        {**adapter.config, "base_model_name_or_path": str(tmp_path / "other")},
        adapter.tensors,
    )
    with pytest.raises(ValueError, match="fold with scales of that model"):
        fold_adapter(adapter, root / "export")


def test_modules_that_do_not_fit_are_all_named(exported: Any) -> None:
    root, *_ = exported
    adapter = read_adapter(root / "adapter")
    tensors = dict(adapter.tensors)
    prefix = "base_model.model.model.layers."
    for part in ("A", "B"):
        key = f"mlp.up_proj.lora_{part}.weight"
        tensors[f"{prefix}7.{key}"] = tensors[f"{prefix}0.{key}"]
    key = f"{prefix}1.self_attn.o_proj.lora_B.weight"
    tensors[key] = tensors[key][:-8]
    adapter = type(adapter)("odd", adapter.config, tensors)
    with pytest.raises(ValueError, match="adapter 'odd' cannot be folded") as caught:
        fold_adapter(adapter, root / "export")
    assert "model.layers.7.mlp.up_proj: is no module of" in str(caught.value)
    assert "model.layers.1.self_attn.o_proj: B must have 64 at dimension 0" in str(caught.value)


def test_a_file_of_scales_alone_does_not_know_the_padding(exported: Any, tmp_path: Any) -> None:
    root, *_ = exported
    alone = tmp_path / "scales.safetensors"
    alone.write_bytes((root / "export" / "scales.safetensors").read_bytes())
    with pytest.raises(ValueError, match="fold with the folder of its export, which says so"):
        fold_adapter(root / "adapter", alone)


def test_a_tampered_file_of_scales_is_refused(exported: Any, tmp_path: Any) -> None:
    root, *_ = exported
    content = bytearray((root / "export" / "scales.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "scales.safetensors").write_bytes(bytes(content))
    with pytest.raises(CorruptFileError, match="not as it was written"):
        fold_adapter(root / "adapter", tmp_path / "scales.safetensors")


def test_dora_on_padded_rows_is_refused_by_name(exported: Any) -> None:
    root, model, _ = exported
    settings = {"r": 2, "target_modules": ["up_proj", "down_proj"], "use_dora": True}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    with pytest.raises(ValueError, match="DoRA cannot be folded where rows") as caught:
        fold_adapter(wrapped, root / "export")
    assert "layers.0.mlp.up_proj" in str(caught.value)
    assert "down_proj" not in str(caught.value)


def test_scales_of_a_sim_that_was_not_exported(exported: Any, tmp_path: Any) -> None:
    """The file that a technique writes does as well, where nothing is padded."""
    _, model, _ = exported
    sim = aimet_ext.create_sim(model, ids(), activations=None)
    aimet_ext.apply_omniquant(sim, [ids(1)], **BOLD, output_path=tmp_path / "technique")
    write_scales(tmp_path, adapt(sim).ledger, rename=lambda n: n.removeprefix("model."))
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=LAYERS))
    one = fold_adapter(wrapped, tmp_path / "technique")
    two = fold_adapter(wrapped, tmp_path / SCALES_FILE)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors)


def test_nothing_is_written_where_something_else_is(exported: Any, tmp_path: Any) -> None:
    root, *_ = exported
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        fold_adapter(root / "adapter", root / "export", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
