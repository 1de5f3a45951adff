"""How every technique is called: AIMET's arguments, all forms of data, errors before any harm."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import QSpec, registry
from aimet_ext.core.affine import fake_quantize
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques.call import ALIASES

FIRST_LAYER = "model.model.layers.0.self_attn.q_proj"


@pytest.mark.techniques(where=lambda t: t.aimet)
def test_every_argument_of_aimet_is_known(technique: Any) -> None:
    module, name = technique.aimet
    theirs = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    ours = inspect.signature(technique.function).parameters
    assert tuple(ALIASES.get(argument, argument) for argument in theirs) == technique.order
    assert set(technique.order) <= set(ours)


def test_shape_of_the_signature(technique: Any) -> None:
    parameters = list(inspect.signature(technique.function).parameters.values())
    first = ["sim", "dataloader", *([technique.number] if technique.number else [])]
    assert [p.name for p in parameters[: len(first)]] == first
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters[len(first) :])
    assert "forward_fn" in inspect.signature(technique.function).parameters


@pytest.mark.techniques(where=lambda t: t.aimet)
@pytest.mark.filterwarnings("ignore:checkpoints_config is not needed:UserWarning")
def test_a_call_in_the_order_of_aimet(
    technique: Any,
    make_sim: Any,
    batches: list[Tensor],
    outcome: Any,
    result_of: Any,
    tmp_path: pathlib.Path,
) -> None:
    sim = make_sim(layers=1)
    values = {
        "sim": sim,
        "dataloader": batches,
        "forward_fn": lambda model, batch: model(batch),
        "modules_to_exclude": None,
        "checkpoints_config": "cuts.json",
        "cache_dir": str(tmp_path / "cache"),
        "output_path": str(tmp_path / "out"),
        **technique.quick,
    }
    positional = [values.pop(name) for name in technique.order]
    rest = {k: v for k, v in values.items() if k in ("output_path", *technique.quick)}
    technique.function(*positional, progress=False, **rest)
    assert result_of(sim) == outcome(technique, batches, 1)[0]
    assert (tmp_path / "out" / "report.json").is_file()


def test_forward_fn_in_third_position(
    technique: Any, make_sim: Any, batches: list[Tensor], outcome: Any, result_of: Any
) -> None:
    sim = make_sim(layers=1)
    technique.function(sim, batches, run_model, progress=False, **technique.quick)
    assert result_of(sim) == outcome(technique, batches, 1)[0]


def test_a_call_with_the_names_of_aimet(
    technique: Any, make_sim: Any, batches: list[Tensor], outcome: Any, result_of: Any
) -> None:
    sim = make_sim(layers=1)
    technique.function(quant_sim=sim, data_loader=batches, progress=False, **technique.quick)
    assert result_of(sim) == outcome(technique, batches, 1)[0]


def run_model(model: nn.Module, batch: Any) -> Any:
    return model(batch)


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        (2, {"quant_sim": None}, "sim"),
        (2, {"data_loader": []}, "dataloader"),
        (2, {"inputs": []}, "dataloader"),
        (1, {"dataloader": [], "data_loader": []}, "dataloader"),
        (3, {"forward_fn": run_model}, "forward_fn"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_one_argument_twice(
    technique: Any,
    sim: Any,
    batches: list[Tensor],
    state_of: Any,
    args: int,
    kwargs: Any,
    name: str,
) -> None:
    before = state_of(sim)
    with pytest.raises(TypeError, match=f"'{name}'.*twice|twice.*'{name}'"):
        technique.function(*(sim, batches, run_model)[:args], **kwargs)
    assert state_of(sim) == before


def test_more_positions_than_aimet_has(technique: Any, sim: Any, batches: list[Tensor]) -> None:
    many = (run_model, *[1] * len(technique.order))
    with pytest.raises(TypeError, match="positional arguments in AIMET's order sim, dataloader"):
        technique.function(sim, batches, *many)


def masked(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class Datasets(torch.utils.data.Dataset):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Tensor:
        return self.ids[row]


@pytest.mark.parametrize(
    "form",
    [
        lambda batches: [(ids,) for ids in batches],
        lambda batches: [[ids, torch.ones_like(ids)] for ids in batches],
        lambda batches: [masked(ids) for ids in batches],
        lambda batches: (ids for ids in batches),
        lambda batches: torch.utils.data.DataLoader(Datasets(torch.cat(batches)), batch_size=2),
    ],
    ids=["tuples", "lists-with-mask", "hugging-face", "generator", "DataLoader"],
)
def test_forms_of_data_give_one_result(
    technique: Any,
    make_sim: Any,
    pair: list[Tensor],
    outcome: Any,
    result_of: Any,
    form: Callable[..., Any],
) -> None:
    sim = make_sim(layers=1)
    technique.apply(sim, form(pair))
    assert result_of(sim) == outcome(technique, pair, 1)[0]


def test_batches_of_a_type_of_ones_own(
    technique: Any, make_sim: Any, pair: list[Tensor], outcome: Any, result_of: Any
) -> None:
    def forward_fn(model: nn.Module, batch: Any) -> Any:
        return model(torch.tensor([int(word) for word in batch["tokens"].split()]).view(2, 16))

    sim = make_sim(layers=1)
    texts = [{"tokens": " ".join(map(str, b.flatten().tolist()))} for b in pair]
    technique.apply(sim, texts, forward_fn=forward_fn)
    assert result_of(sim) == outcome(technique, pair, 1)[0]


@pytest.mark.techniques(where=lambda t: not t.from_data)
def test_without_data(
    technique: Any, make_sim: Any, pair: list[Tensor], outcome: Any, result_of: Any, state_of: Any
) -> None:
    """Left out, None, and batches that nobody reads are all the same; a number is an error."""

    def unread() -> Any:
        raise AssertionError("work began")
        yield

    for data in ((), (None,), (unread(),), (unread,)):
        sim = make_sim(layers=1)
        technique.function(sim, *data, progress=False, **technique.quick)
        assert result_of(sim) == outcome(technique, pair, 1)[0]
    sim = make_sim(layers=1)
    before = state_of(sim)
    with pytest.raises(TypeError, match=r"reads no data: .* got 20; call apply_\w+\(sim"):
        technique.function(sim, 20)
    assert state_of(sim) == before


def test_arguments_are_not_changed(technique: Any, sim: Any, ids: Any) -> None:
    batch = masked(ids())
    copies = {name: tensor.clone() for name, tensor in batch.items()}
    dataloader = [batch]
    technique.apply(sim, dataloader)
    assert len(dataloader) == 1 and dataloader[0] is batch and list(batch) == list(copies)
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


LONG = torch.ones(1, 65, dtype=torch.long)
BAD_DATA = {
    "empty": ([], ValueError, "at least one batch.*a generator can be walked through only once"),
    "exhausted": (lambda: iter([]), ValueError, "at least one batch.*generator"),
    "one batch": (torch.ones(2, 8, dtype=torch.long), TypeError, "single batch into a list"),
    "none": (None, TypeError, "dataloader must be an iterable of batches, got NoneType"),
    "text": (["hello"], TypeError, "batch 0 must be a tensor of ids.*got str.*forward_fn"),
    "no tensor": ([{"input_ids": [[1, 2]]}], TypeError, "batch 0 must hold at least one tensor"),
    "one row": ([torch.ones(8, dtype=torch.long)], ValueError, r"batch 0.*unsqueeze"),
    "no token": ([torch.ones(2, 0, dtype=torch.long)], ValueError, "batch 0.*at least one token"),
    "too long": ([LONG[:, :8], LONG], ValueError, "context of 64 tokens.*batch 1 has 65"),
    "too short": ([LONG[:, :4]], ValueError, "at least 8 tokens, got 4; calibrate with longer"),
    "id too big": ([LONG[:, :8] * 999], (RuntimeError, ValueError), "batch 0"),
    "elsewhere": (
        [torch.ones(2, 8, dtype=torch.long, device="meta")],
        (ValueError, RuntimeError),
        "batch 0.*batches must be on the model's device",
    ),
    "all masked": (
        [{"input_ids": LONG[:, :8], "attention_mask": 0 * LONG[:, :8]}],
        ValueError,
        "batch 0 must hold a token that is not masked",
    ),
}


@pytest.mark.techniques(where=lambda t: t.from_data)
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(refused: Any, case: str) -> None:
    layer_wise = not refused.technique.by_blocks  # nothing to prove: a few tokens are enough
    if (case == "too short" and layer_wise) or (case, refused.technique.name) == ("none", "lpbq"):
        return
    data, error, text = BAD_DATA[case]
    refused(error, text, data() if callable(data) else data)


@pytest.mark.techniques(where=lambda t: t.head and t.from_data)
@pytest.mark.parametrize("case", ["empty", "id too big", "elsewhere", "all masked"])
def test_bad_data_of_a_sim_with_an_output_layer(technique: Any, make_sim: Any, case: str) -> None:
    """The output layer is looked for in a pass through the whole model."""
    data, error, text = BAD_DATA[case]
    with pytest.raises(error, match=text):
        technique.apply(make_sim(lm_head=QSpec(bitwidth=8)), data)


@pytest.mark.techniques(where=lambda t: t.number)
@pytest.mark.parametrize("place", range(5))
def test_bad_number(refused: Any, batches: list[Tensor], place: int) -> None:
    number, wrong = refused.technique.number, refused.technique.wrong
    for value in wrong[place::5]:
        refused((TypeError, ValueError), number, batches, **{number: value})


@pytest.mark.techniques(where=lambda t: t.from_data)
def test_forward_fn_that_raises(refused: Any, batches: list[Tensor]) -> None:
    def forward_fn(model: nn.Module, batch: Tensor) -> Any:
        if len(batch) == 3:
            raise KeyError("no such column")
        return model(batch)

    error = refused(
        RuntimeError, "forward_fn failed on batch 1 with KeyError", batches, forward_fn=forward_fn
    )
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.techniques(where=lambda t: t.from_data)
def test_forward_fn_that_runs_something_else(refused: Any, batches: list[Tensor]) -> None:
    refused(ValueError, "must run the model it is given", batches, forward_fn=lambda m, b: b)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(refused: Any, batches: list[Tensor], value: float) -> None:
    with torch.no_grad():
        refused.sim.model.get_submodule(FIRST_LAYER).weight[3, 5] = value
    refused(ValueError, f"{FIRST_LAYER}.*finite.*NaN or infinity", batches)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.model.embed_tokens", r"embed_tokens\.weight: each must be finite, it holds NaN"),
        (
            "model.model.layers.1.input_layernorm",
            r"layers\.1\.(input_layernorm\.weight|self_attn\.q_proj).*finite.*NaN",
        ),
    ],
)
def test_other_parameters_that_are_not_finite(
    refused: Any, batches: list[Tensor], name: str, text: str
) -> None:
    with torch.no_grad():
        refused.sim.model.get_submodule(name).weight.fill_(math.nan)
    refused(ValueError, text, batches)


@pytest.mark.techniques(where=lambda t: t.by_blocks)
def test_a_layer_without_weight_quantizer(refused: Any, batches: list[Tensor]) -> None:
    layer = refused.sim.model.get_submodule(FIRST_LAYER)
    layer.param_quantizers["weight"] = None
    refused(
        ValueError, f"{FIRST_LAYER}.*weight quantizer and has none.*modules_to_exclude", batches
    )
    refused.technique.apply(refused.sim, batches, modules_to_exclude=[FIRST_LAYER])


@pytest.mark.techniques(where=lambda t: t.name != "lpbq")  # it replaces the grid
def test_weights_that_are_rounded(refused: Any, batches: list[Tensor]) -> None:
    quantizer = adapt(refused.sim).weight_quantizer(FIRST_LAYER)
    with torch.no_grad():
        quantizer.weight.copy_(fake_quantize(quantizer.weight, quantizer.grid()))
    refused(ValueError, f"{FIRST_LAYER}.*rounded to a grid already; load the original", batches)


@pytest.mark.techniques(where=lambda t: t.folds or t.name == "lpbq")
def test_weights_that_another_technique_froze(refused: Any, batches: list[Tensor]) -> None:
    adapt(refused.sim).weight_quantizer(FIRST_LAYER).freeze()
    refused(ValueError, f"{FIRST_LAYER}.*froze its range", batches)


def test_once_is_enough(refused: Any, batches: list[Tensor]) -> None:
    """Unfreezing the quantizers does not make a second run right: the ledger refuses too."""
    refused.technique.apply(refused.sim, batches)
    refused(ValueError, "froze|already applied to", batches)
    for quantizer in adapt(refused.sim).weight_quantizers().values():
        quantizer.freeze(False)
    text = f"{refused.technique.name} was already applied to .*layers.0.*a new sim"
    refused(ValueError, text, batches)


def test_names_of_layers_that_do_not_exist(refused: Any, batches: list[Tensor]) -> None:
    name = "model.layers.0.no_such"
    refused(ValueError, f"modules_to_exclude.*{name}", batches, modules_to_exclude=[name])


@pytest.mark.techniques(where=lambda t: t.by_blocks)
def test_unknown_architecture(technique: Any, batches: list[Tensor]) -> None:
    aimet_torch = importlib.import_module("aimet_torch")
    sim = aimet_torch.QuantizationSimModel(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.ones(2, 8)
    )
    with pytest.raises(ValueError, match="TopologyDescription"):
        technique.apply(sim, batches)


def test_something_that_is_no_sim(technique: Any, tiny_llama: Any, batches: list[Tensor]) -> None:
    with pytest.raises(
        TypeError, match=r"must be a QuantizationSimModel of aimet_torch.*create_sim"
    ):
        technique.apply(tiny_llama, batches)


def test_a_block_size_that_does_not_divide(tiny_llama: Any, ids: Any) -> None:
    spec = QSpec(granularity=aimet_ext.Blockwise(48))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*48"):
        aimet_ext.create_sim(tiny_llama, ids(), weights=spec, activations=None)


def test_settings_that_do_not_exist(refused: Any, batches: list[Tensor]) -> None:
    fields = [f.name for f in dataclasses.fields(registry.load(refused.technique.row.params))]
    text = f"no setting iterations; it has {', '.join(fields)}"
    refused(TypeError, text, batches, iterations=3)


@pytest.mark.parametrize("name", ["output_path", "checkpoint_dir", "cache_dir"])
def test_places_that_cannot_be_written(
    refused: Any, batches: list[Tensor], tmp_path: pathlib.Path, name: str
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    refused(
        (OSError, ValueError),
        name.replace("_", ".") + ".*file",
        batches,
        **{name: blocker / "inside"},
    )
    assert blocker.read_text() == "not a folder"


def test_a_foreign_folder_is_refused_before_any_work(
    refused: Any, batches: list[Tensor], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")

    def forward_fn(model: nn.Module, batch: Tensor) -> Any:
        raise AssertionError("work began")

    refused(
        FileExistsError,
        "holds other files, which are left as they are",
        batches,
        output_path=tmp_path,
        forward_fn=forward_fn,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("place", ["position", "keyword", "model first"])
def test_the_older_forms_of_aimet_are_translated(
    technique: Any, make_sim: Any, batches: Any, place: str
) -> None:
    """In one line, whether its class of parameters or the model gives it away."""
    seq_mse = pytest.importorskip("aimet_torch.seq_mse")
    params = seq_mse.SeqMseParams(4, num_candidates=7)
    sim = make_sim(layers=1)
    args, kwargs = (sim, batches, params), {}
    if place == "keyword":
        args, kwargs = (sim, batches), {"params": params}
    elif place == "model first":
        args = (sim.model, sim, batches, params)
    with pytest.raises(TypeError) as caught:
        technique.function(*args, **kwargs)
    message = str(caught.value)
    assert f"call apply_{technique.name}(sim, data_loader" in message and "\n" not in message
    assert "num_candidates=7" in message


def test_a_setting_that_is_not_allowed_is_named_in_one_line(
    technique: Any, make_sim: Any, batches: Any
) -> None:
    name = technique.number or "max_bitwidth"
    with pytest.raises(ValueError, match=rf"^apply_{technique.name}\(\): {name}: ") as caught:
        technique.function(make_sim(layers=1), batches, **{name: "many" * 50})
    message = str(caught.value)
    assert "got 'manymany" in message and "\n" not in message and "http" not in message
