"""Adapters as files and models hold them: read, written, and refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aimet_ext.errors import CorruptFileError
from aimet_ext.files.scales import ModuleScales, Scales
from aimet_ext.lora import attach_adapter, fold_adapter, read_adapter, read_adapters
from aimet_ext.lora.checkpoint import open_checkpoint
from aimet_ext.models.proof import Float64Casts

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # What peft 0.21 does with transformers 5.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What peft says of Conv1D layers, and of saved embeddings.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def wrapped(tiny_llama: Any) -> Any:
    return randomised(peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["q_proj"])))


def randomised(wrapped: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return wrapped.eval()


def scales(**modules: ModuleScales) -> Scales:
    named = {name.replace("__", "."): value for name, value in modules.items()}
    return Scales(named or {Q_PROJ: ModuleScales(input=spread(64))}, ("t",), (), None, "0")


def spread(width: int) -> Tensor:
    return torch.linspace(0.5, 2, width)


# ---- read and written ----------------------------------------------------------------------------


def test_what_is_saved_is_what_peft_reads(wrapped: Any, tmp_path: Any) -> None:
    adapter = read_adapter(wrapped)
    adapter.save(tmp_path)
    again = read_adapter(tmp_path)
    assert again.config == adapter.config
    assert again.folded is None
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[key], adapter.tensors[key]) for key in adapter.tensors)
    wrapped.save_pretrained(tmp_path / "by_peft")
    theirs = load_file(tmp_path / "by_peft" / "adapter_model.safetensors")
    assert theirs.keys() == adapter.tensors.keys()
    config = json.loads((tmp_path / "by_peft" / "adapter_config.json").read_text())
    assert again.config == {**config, "auto_mapping": None}


def test_an_adapter_of_a_prepared_model_has_the_checkpoints_names(tiny_llama: Any) -> None:
    import aimet_ext

    prepared = aimet_ext.prepare_model(tiny_llama)
    wrapped = peft.get_peft_model(prepared, peft.LoraConfig(target_modules=["q_proj"]))
    assert next(iter(read_adapter(wrapped).layers)) == Q_PROJ


def test_adapters_of_a_folder_with_several(wrapped: Any, tmp_path: Any) -> None:
    wrapped.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up_proj"]))
    wrapped.save_pretrained(tmp_path)
    found = read_adapters(tmp_path)
    assert sorted(found) == ["default", "other"]
    assert found["other"].layers["model.layers.1.mlp.up_proj"].rank == 3
    assert read_adapter(tmp_path, "other").name == "other"


def test_attaching_needs_a_place_for_every_tensor(wrapped: Any, tiny_model: Any) -> None:
    adapter = read_adapter(wrapped)
    with pytest.raises(ValueError, match="every tensor must have its place in the model"):
        attach_adapter(tiny_model("llama", num_hidden_layers=1), adapter)


def test_names_that_are_not_there(wrapped: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"one of \['default'\]; got 'x'"):
        read_adapter(wrapped, "x")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json and adapter_model"):
        read_adapter(tmp_path)
    with pytest.raises(TypeError, match="a folder written by PEFT, a PeftModel or an Adapter"):
        read_adapter(3)


# ---- refused -------------------------------------------------------------------------------------


def test_a_pickle_is_refused_by_name(wrapped: Any, tmp_path: Any) -> None:
    wrapped.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(tmp_path)


def test_damaged_files(wrapped: Any, tmp_path: Any) -> None:
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptFileError, match="no sound safetensors file"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptFileError, match="is not JSON"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", -1),
        ("r", 0),
        ("r", "8"),
        ("lora_alpha", "x"),
        ("lora_alpha", float("nan")),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"(": 2}),
        ("use_rslora", "yes"),
        ("base_model_name_or_path", 5),
        ("target_modules", {"q_proj": 1}),
    ],
)
def test_fields_of_another_form_are_named(
    wrapped: Any, tmp_path: Any, field: str, value: Any
) -> None:
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=rf"adapter 'default': adapter_config\.json: {field}"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_numbers_that_are_not_finite_are_refused(
    wrapped: Any, tmp_path: Any, part: str, number: float
) -> None:
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if part in name)
    tensors[name][0, 0] = number
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"finite numbers are required, but \S*q_proj\.{part}"):
        read_adapter(tmp_path)


def test_matrices_of_one_dimension_are_refused(wrapped: Any, tmp_path: Any) -> None:
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name].flatten()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter 'default': matrices are required.*lora_A"):
        read_adapter(tmp_path)


def test_a_model_that_peft_refuses_names_the_adapter(wrapped: Any, tiny_model: Any) -> None:
    """Its errors are of its own and of torch's kinds."""
    adapter = read_adapter(wrapped)
    with pytest.raises(ValueError, match=r"adapter 'default': peft cannot put it on the model"):
        attach_adapter(tiny_model("llama", hidden_size=32, head_dim=8), adapter)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_is_known_by_either_name(tiny_model: Any, tmp_path: Any, kept: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tied = [tensors.pop(n) for n in ("lm_head.weight", "model.embed_tokens.weight") if n in tensors]
    save_file({**tensors, kept: tied[0]}, tmp_path / "model.safetensors", {"format": "pt"})
    found = open_checkpoint(tmp_path)
    assert found.shapes.keys() == model.state_dict().keys()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(found.read(name), tied[0])


def test_other_kinds_of_adapters_are_refused(tiny_llama: Any, tmp_path: Any) -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    wrapped = peft.get_peft_model(tiny_llama, config)
    with pytest.raises(ValueError, match=r"peft_type LORA\) is required, got IA3"):
        read_adapter(wrapped)


def test_merged_adapters_are_refused(wrapped: Any) -> None:
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj.* are merged .*unmerge_adapter\(\) first"):
        read_adapter(wrapped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qalora": True}, "got use_qalora .QA-LoRA averages groups of inputs"),
        ({"layer_replication": [[0, 2]]}, "got layer_replication"),
        ({"target_parameters": ["experts.up"]}, "got target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ],
    ids=["qalora", "replication", "parameters", "pissa"],
)
def test_variants_that_do_not_carry_over(wrapped: Any, changes: Any, message: str) -> None:
    adapter = read_adapter(wrapped)
    adapter = type(adapter)("a", {**adapter.config, **changes}, adapter.tensors)
    with pytest.raises(ValueError, match=message):
        fold_adapter(adapter, scales())


def test_an_adapter_of_another_model_is_refused(wrapped: Any) -> None:
    other = scales(transformer__h__0__q_proj=ModuleScales(input=spread(64)))
    with pytest.raises(ValueError, match=r"such as transformer\.h\.0\.q_proj, got model\.layers"):
        fold_adapter(read_adapter(wrapped), other)
    with pytest.raises(ValueError, match=r"the given LlamaForCausalLM are required, got some of"):
        fold_adapter(wrapped, other)


def test_layers_that_were_not_scaled_need_the_base_to_be_known(tiny_llama: Any) -> None:
    config = peft.LoraConfig(target_modules=["up_proj"])
    adapter = read_adapter(peft.get_peft_model(copy.deepcopy(tiny_llama), config))
    with pytest.raises(ValueError, match="pass base= that model"):
        fold_adapter(adapter, scales())
    folded = fold_adapter(adapter, scales(), base=tiny_llama)
    assert all(torch.equal(folded.tensors[key], adapter.tensors[key]) for key in adapter.tensors)


def test_scales_of_a_wrapped_model(wrapped: Any) -> None:
    """A wrapper's name before the checkpoint's, as in graphs that were traced through one."""
    inside = scales(**{f"model.{Q_PROJ}".replace(".", "__"): ModuleScales(input=spread(64))})
    one, two = fold_adapter(wrapped, inside), fold_adapter(read_adapter(wrapped), scales())
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in two.tensors)


def test_dora_needs_the_original_weights(tiny_llama: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    adapter = read_adapter(peft.get_peft_model(copy.deepcopy(tiny_llama), config))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}: DoRA .* pass base= the original model"):
        fold_adapter(adapter, scales())
    assert fold_adapter(adapter, scales(), base=tiny_llama).folded is not None
    rows_alone = scales(**{Q_PROJ.replace(".", "__"): ModuleScales(output=-spread(64))})
    folded = fold_adapter(adapter, rows_alone).layers[Q_PROJ]
    torch.testing.assert_close(folded.magnitude, adapter.layers[Q_PROJ].magnitude * spread(64))


def test_a_norm_of_an_unknown_family(tiny_llama: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    adapter = read_adapter(peft.get_peft_model(copy.deepcopy(tiny_llama), config))
    name = "model.layers.0.input_layernorm"
    table = scales(**{name.replace(".", "__"): ModuleScales(output=spread(64))})
    with pytest.raises(ValueError, match=f"{name}: whether this norm multiplies"):
        fold_adapter(adapter, table)
    assert fold_adapter(adapter, table, base=tiny_llama).folded is not None


def test_tied_adapters_of_scaled_tables(tiny_model: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    config = peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    adapter = read_adapter(peft.get_peft_model(model, config))
    with pytest.raises(ValueError, match=r"lm_head: is tied to another module"):
        fold_adapter(adapter, scales(lm_head=ModuleScales(input=spread(64))))


# ---- other layers than linear ones ---------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_conv1d_layers_of_gpt2(dora: bool) -> None:
    """Weights ``[in, out]``: what the norm loses, the fused projection gains, adapter included."""
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    special = {"bos_token_id": 0, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, **special))
    model = model.double().eval()
    changed = copy.deepcopy(model)
    scale = spread(32).double()
    name = "transformer.h.0.attn.c_attn"
    with torch.no_grad():
        changed.get_submodule(name).weight *= scale[:, None]
        changed.transformer.h[0].ln_1.weight /= scale
        changed.transformer.h[0].ln_1.bias /= scale
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": dora}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    randomised(wrapped)
    table = scales(**{name.replace(".", "__"): ModuleScales(input=scale)})
    both = attach_adapter(changed, fold_adapter(wrapped, table, base=model))
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad(), Float64Casts():
        reference, plain = (m(input_ids=ids).logits for m in (wrapped, model))
        found = both(input_ids=ids).logits
    assert float((plain - reference).abs().max()) > 1e-3
    assert float((found - reference).abs().max() / reference.abs().max()) <= 1e-10


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_scaled_tables_and_heads(tiny_model: Any, dora: bool) -> None:
    """A table whose columns are scaled, and rows too: ``diag(rows) (E + ΔE) diag(columns)``."""
    original = tiny_model("llama").double()
    columns, tokens = spread(64).double(), spread(128).double().flip(0)
    name = "model.embed_tokens"
    config = peft.LoraConfig(target_modules=["embed_tokens"], use_dora=dora)
    wrapped = randomised(peft.get_peft_model(copy.deepcopy(original), config))
    adapter = read_adapter(wrapped)
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed.model.embed_tokens.weight.mul_(columns).mul_(tokens[:, None])
    table = scales(model__embed_tokens=ModuleScales(input=columns, output=tokens))
    if dora:  # norms of columns follow the scales of rows, so that weights are needed
        with pytest.raises(ValueError, match="pass base="):
            fold_adapter(adapter, table)
    both = attach_adapter(changed, fold_adapter(adapter, table, base=original))
    ids = torch.arange(128)
    with torch.no_grad():
        before = wrapped.get_base_model().get_submodule(name)(ids)
        after = both.get_base_model().get_submodule(name)(ids)
    expected = before * columns * tokens[:, None]
    assert float((after - expected).abs().max() / expected.abs().max()) <= 1e-10


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_convolutions(dora: bool) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    torch.manual_seed(0)
    model = Model().double()
    config = peft.LoraConfig(r=2, target_modules=["conv"], use_dora=dora)
    wrapped = randomised(peft.get_peft_model(copy.deepcopy(model), config))
    inputs, outputs = spread(6).double(), -spread(4).double()
    folded = fold_adapter(wrapped, scales(conv=ModuleScales(inputs, outputs)), base=model)
    with torch.no_grad():
        model.conv.weight.mul_(inputs[:, None, None]).mul_(outputs[:, None, None, None])
        model.conv.bias.mul_(outputs)
    both = attach_adapter(model, folded)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = wrapped(x) * outputs[:, None, None]
        found = both(x / inputs[:, None, None])
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-10
