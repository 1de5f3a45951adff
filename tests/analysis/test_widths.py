"""Assigned widths: costs as measured, budgets kept to the bit, better than one width for all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext import LPBQ, Blockwise, PerTensor, QSpec, assign_widths, examples
from aimet_ext.analysis.divergence import Reference
from aimet_ext.sim.protocol import adapt

pytest.importorskip("aimet_torch")

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
CHOICES = ("int2", "int3", "int4", "int5", "int6")


@pytest.fixture(scope="module")
def packaged() -> tuple[Any, list[Any], list[Any]]:
    """The packaged model, windows to calibrate on, and held-out ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(examples.model_dir()).eval()
    tokenizer = AutoTokenizer.from_pretrained(examples.model_dir())
    return (
        model,
        *(
            aimet_ext.calibration_batches(tokenizer, examples.documents(split), 64, 4, 4)
            for split in ("calibration", "evaluation")
        ),
    )


@pytest.fixture(scope="module")
def report(packaged: Any) -> Any:
    """Widths at the bits of 4 bits for all."""
    model, batches, _ = packaged
    return assign_widths(model, batches, bits_of_all(model, 4), CHOICES, progress=False)


def bits_of_all(model: Any, width: int) -> float:
    """Average bits with a scale of 16 bits a row, counted from the weights in the blocks."""
    shapes = [p.shape for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    stored = sum(rows * columns * width + 16 * rows for rows, columns in shapes)
    return stored / sum(rows * columns for rows, columns in shapes)


def quantized(model: Any, ids: Any, overrides: Mapping[str, QSpec | None]) -> Any:
    """A simulation in which only these weights are quantized."""
    return aimet_ext.create_sim(
        model,
        ids,
        weights=None,
        lm_head=None,
        embedding=None,
        activations=None,
        overrides=overrides,
    )


def divergence(model: Any, batches: Any, overrides: Any, reference: Any) -> float:
    sim = quantized(model, batches[0][:1], overrides)
    return aimet_ext.evaluate_divergence(sim, batches, reference).kl


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).argsort().argsort().double()


def test_costs_are_near_what_is_measured(packaged: Any, report: Any) -> None:
    model, batches, _ = packaged
    expected, found = [], []
    for name in ("int3", "int5"):
        adaptor = adapt(
            quantized(model, IDS[:1], dict.fromkeys(report.overrides, report.specs[name]))
        )
        with adaptor.running(()) as run:
            reference = Reference(run, batches)
        for layer in report.layers[::3]:
            with adaptor.running([f"model.{layer.names[0]}.weight"]) as run:
                found.append(reference.divergence(run))
            expected.append(layer.kl[name])
    logs = [math.log(e / f) for e, f in zip(expected, found, strict=True)]
    assert max(map(abs, logs)) < math.log(2)
    spearman = torch.corrcoef(torch.stack([ranks(expected), ranks(found)]))[0, 1]
    assert spearman > 0.9


def test_mixed_widths_beat_one_width_of_no_fewer_bits(packaged: Any, report: Any) -> None:
    model, _, held_out = packaged
    reference = aimet_ext.float_logits(model, held_out)
    one = divergence(model, held_out, dict.fromkeys(report.overrides, QSpec()), reference)
    mixed = divergence(model, held_out, report.overrides, reference)
    assert report.average_bits <= bits_of_all(model, 4) + 1e-9
    assert mixed < 0.97 * one
    assert report.kl < report.uniform()["int4"][1]


def slow_costs(model: Any, ids: Any, specs: Mapping[str, QSpec]) -> dict[str, float]:
    """The divergence of each spec for all layers, by ``analyze``, one simulation each."""
    found = {}
    for name, spec in specs.items():
        sim = quantized(model, ids[0], {"model.layers.*": spec})
        rows = aimet_ext.analyze(sim, ids, top_k=0, progress=False).quantizers
        found |= {(name, row.name): row.kl_alone for row in rows}
    return found


def test_costs_are_those_of_an_analysis_of_each_choice(tiny_model: Any) -> None:
    """<Σ g xᵀ, ΔW> = Σ g · ΔW x, with the same outcomes drawn, one window a batch."""
    model = tiny_model("llama", num_hidden_layers=1).double()
    model.lm_head.weight.data *= 8
    ids = list(IDS.split(1))
    report = assign_widths(model, ids, 9, ["int2", "uint4", "int3:16"], progress=False)
    slow = slow_costs(model, ids, report.specs)
    assert len(slow) == 3 * len(report.layers) == 21
    for (choice, place), cost in slow.items():
        name = place.removeprefix("model.").removesuffix(".weight")
        (layer,) = (each for each in report.layers if name in each.names)
        assert layer.kl[choice] == pytest.approx(cost, rel=1e-4)


def test_rows_of_a_batch_are_samples(tiny_model: Any, monkeypatch: Any) -> None:
    """One batch of all windows, and a batch for each: the same outcomes, the same squares."""
    monkeypatch.setattr("aimet_ext.analysis.weight_costs._DRAWS", 1)
    model = tiny_model("llama", num_hidden_layers=1).double()
    model.lm_head.weight.data *= 8
    together, apart = (
        assign_widths(model, data, 9, ["int3"], progress=False) for data in ([IDS], IDS.split(1))
    )
    for one, other in zip(together.layers, apart.layers, strict=True):
        assert one.kl["int3"] == pytest.approx(other.kl["int3"], rel=1e-4)


class Net(torch.nn.Module):
    """Three layers, with functions between them that may work in place."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 16)
        self.second = torch.nn.Linear(16, 16)
        self.last = torch.nn.Linear(16, 4)
        self.unused = torch.nn.Linear(4, 4)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self.first(x))
        return self.last(self.between(self.second(x)))


def test_costs_are_the_same_where_outputs_are_changed_in_place(caplog: Any) -> None:
    data = [torch.randn(32, 8, generator=torch.Generator().manual_seed(1))]
    plain, changed = (
        assign_widths(Net(between), data, 6, progress=False).layers
        for between in (torch.relu, torch.relu_)
    )
    assert plain == changed
    assert [layer.names for layer in plain] == [("first",), ("second",), ("last",)]
    assert all(kl > 0 for layer in plain for kl in layer.kl.values())
    assert "data never reach unused" in caplog.text


def test_an_input_that_changes_is_refused() -> None:
    class Changing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x))
            y = self.second(x)
            return self.last(x.add_(y))

    with pytest.raises(ValueError, match=r"second: an input that stays as it is"):
        assign_widths(Changing(None), [torch.randn(4, 8)], 6, progress=False)


def stored_bits(name: str, rows: int, columns: int) -> int:
    """Bits by counting weights, blocks and rows one by one."""
    bits = 0
    for _ in range(rows):
        blocks = {"int4:16": columns // 16, "int3:lpbq32": columns // 32}.get(name, 1)
        bits += {"int4:16": 16, "int3:lpbq32": 4, "uint8": 16 + 8, "int2": 16}[name] * blocks
        bits += 16 * (name == "int3:lpbq32")
        bits += columns * int("".join(filter(str.isdigit, name.partition(":")[0])))
    return bits


@pytest.mark.parametrize("budget", [3.3, "4.5 bits", 6, "24 kB", "27000 bytes"])
def test_a_budget_is_kept_as_counted_slowly(tiny_model: Any, budget: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    choices = [
        "int2",
        QSpec(bitwidth=3, granularity=LPBQ(32)),
        QSpec(granularity=Blockwise(16)),
        "uint8",
    ]
    report = assign_widths(model, [IDS], budget, choices, progress=False)
    bits = 0
    for layer in report.layers:
        weight = model.get_submodule(layer.names[0]).weight
        assert layer.bits == {name: stored_bits(name, *weight.shape) for name in report.specs}
        bits += stored_bits(layer.choice, *weight.shape)
    allowed = {"24 kB": 8 * 24_000, "27000 bytes": 8 * 27_000, "4.5 bits": 4.5 * report.weights}
    capacity = allowed.get(budget) or budget * report.weights
    assert report.bits == bits <= capacity
    assert report.bytes == math.ceil(bits / 8)
    assert report.average_bits == bits / report.weights
    assert set(report.overrides) == {n for layer in report.layers for n in layer.names}


def test_the_best_that_is_measured_is_kept(tiny_model: Any, monkeypatch: Any) -> None:
    """Not always the least sum: here the one without the smallest choice is said to be better."""
    from aimet_ext.analysis import widths

    model = tiny_model("llama", num_hidden_layers=1)
    model.lm_head.weight.data *= 8
    true = widths.divergences
    seen: list[list[float]] = []

    def measure(together: Any, choices: Any, *rest: Any) -> list[float]:
        seen.append(true(together, choices, *rest))
        return [1.0, 0.5, *[2.0] * (len(choices) - 2)]

    first = assign_widths(model, [IDS], 5, CHOICES, progress=False)
    monkeypatch.setattr(widths, "divergences", measure)
    second = assign_widths(model, [IDS], 5, CHOICES, progress=False)
    assert second.measured == 0.5
    assert "int2" not in {layer.choice for layer in second.layers}
    assert second.kl >= min(kl for bits, kl in second.curve if bits <= 5)
    reference = aimet_ext.float_logits(model, [IDS])
    assert first.measured == min(seen[0])
    assert first.measured == pytest.approx(
        divergence(model, [IDS], first.overrides, reference), rel=1e-2
    )


def test_groups_and_shared_weights_get_one_choice(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    first, second = model.model.layers
    second.self_attn.o_proj.weight = first.self_attn.o_proj.weight
    groups = [("q_proj", "k_proj", "v_proj"), "*.down_proj"]
    seen = set()
    for budget in (3.5, 4.5, 5.5):
        report = assign_widths(model, [IDS], budget, CHOICES, groups=groups, progress=False)
        grids = report.overrides
        for number in range(2):
            fused = {
                grids[f"model.layers.{number}.self_attn.{part}_proj"].bitwidth for part in "qkv"
            }
            assert len(fused) == 1
            seen |= fused
        for part in ("mlp.down_proj", "self_attn.o_proj"):
            assert grids[f"model.layers.0.{part}"] == grids[f"model.layers.1.{part}"]
        assert report.weights == sum(
            p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight")
        )
    assert len(seen) > 1
    assert any("o_proj" in name for layer in report.layers for name in layer.names[1:])


def test_a_report_makes_a_recipe_and_the_model_is_left_alone(
    tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    model.train()
    report = assign_widths(
        model, [IDS], 4.4, ["int3", "int4:16", "int8"], modules_to_exclude=["*.o_proj"],
        progress=False,
    )  # fmt: skip
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert "model.layers.0.self_attn.o_proj" not in report.overrides
    sim = quantized(model, IDS, report.overrides)
    again = assign_widths(
        sim, [IDS], 4.4, ["int3", "int4:16", "int8"], modules_to_exclude=["*.o_proj"],
        progress=False,
    )  # fmt: skip
    assert again.layers == report.layers
    report.recipe.save(tmp_path / "mine.yaml")
    recipe = aimet_ext.read_recipe(tmp_path / "mine.yaml")
    built = recipe.create_sim(model, IDS)
    for name, spec in report.overrides.items():
        made = built.model.get_submodule(f"model.{name}").param_quantizers["weight"]
        assert made.bitwidth == spec.bitwidth
        assert (made.block_size is None) == (spec.block_size is None)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report.to_dict()
    report.plot(tmp_path / "curve.svg")
    drawing = (tmp_path / "curve.svg").read_text("utf-8")
    assert drawing.startswith("<svg") and "int4:16" in drawing and "assigned" in drawing
    text = str(report)
    assert f"{report.average_bits:.4f} bits a weight, {report.bytes} bytes" in text
    assert "model.layers.0.mlp.down_proj" in text and "all int8" in text
    curve = drawing.partition('id="curve"')[2].partition("</g>\n</g>")[0]
    assert curve.count("<use ") == len(report.curve) and "measured" in drawing
    report.plot(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert (
        drawing in page
        and "model.layers.0.mlp.down_proj" in page
        and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    )
    with pytest.raises(ValueError, match=r"must end in \.svg"):
        report.plot(tmp_path / "curve.png")


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (3.0, {}, r"at least 4\.2223 bits .* are required.*got 3\.0; the largest .* 8\.2222"),
        ("1 kB", {}, r"at least .* \(\d+ bytes\) are required.*got 1 kB"),
        ("four", {}, r"budget: average bits.*got 'four'"),
        ("4 TB", {}, r"budget: average bits.*got '4 TB'"),
        (5, {"choices": []}, "choices: at least one"),
        (5, {"choices": ["int4/64"]}, r'a width such as "int4"'),
        (5, {"choices": ["int4", "int9"]}, r"^choices: weights of 2 to 8 bits.* got 9 bits"),
        (5, {"choices": ["int4:x"]}, r"int4:lpbq64.*got 'int4:x'"),
        (5, {"choices": ["int4:48"]}, "block size that divides"),
        (5, {"choices": [QSpec(granularity=Blockwise(48), on_indivisible="pad")]}, "per_channel"),
        (5, {"groups": ["*.nothing"]}, r"groups: .*'\*\.nothing' fits none.*q_proj"),
        (5, {"modules_to_exclude": ["x"]}, "modules_to_exclude: .*'x' fits none"),
    ],
)
def test_mistakes_are_said(tiny_model: Any, budget: Any, options: Any, message: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    arguments = {"choices": ["int4", "int8"], "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        assign_widths(model, [IDS], budget, **arguments)


def test_a_grid_without_a_form_in_recipes_is_said(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    report = assign_widths(model, [IDS], 5, [QSpec(granularity=PerTensor())], progress=False)
    assert set(report.overrides.values()) == {QSpec(granularity=PerTensor())}
    with pytest.raises(ValueError, match="got int4:tensor; pass overrides to create_sim"):
        _ = report.recipe


@pytest.fixture
def exported(tiny_model: Any) -> Any:
    """From a model to simulations of its graph, in 8 bits."""
    pytest.importorskip("aimet_onnx")
    from onnx_models import exported_module
    from onnx_sims import build_sim

    def of(model: Any) -> Any:
        prepared = aimet_ext.prepare_model(model, mask_value=-100.0)
        graph = exported_module(prepared, (IDS[:1],), ["input_ids"], ["logits"], None)
        return build_sim(graph, QSpec(bitwidth=8), None)

    return of


def test_a_graph_gets_the_widths_of_its_model(
    tiny_model: Any, exported: Any, tmp_path: Path
) -> None:
    """Batches of one sample: gradients are the same, so are costs, and so are choices."""
    from onnx_pairs import state_of

    model = tiny_model("llama", num_hidden_layers=2)
    model.lm_head.weight.data *= 8
    options = {"groups": [("gate_proj", "up_proj")], "modules_to_exclude": ["*.1.*.o_proj"]}
    choices = ["int3", "int4:16", QSpec(bitwidth=5, symmetric=False), "int6:lpbq32"]
    rows = IDS.split(1)
    expected = assign_widths(model, rows, 4.8, choices, progress=False, **options)
    sim = exported(model)
    before = state_of(sim)
    feeds = [{"input_ids": ids.numpy()} for ids in rows]
    found = assign_widths(sim, feeds, 4.8, choices, progress=False, **options)
    assert state_of(sim) == before
    assert [(x.choice, x.bits) for x in found.layers] == [
        (x.choice, x.bits) for x in expected.layers
    ]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.names[0].endswith(other.names[0])
        assert list(one.kl.values()) == pytest.approx(list(other.kl.values()), rel=0.02)
    assert found.measured == pytest.approx(expected.measured, rel=1e-3)
    # The widths of either, and those of a file, are set by name.
    expected.save(tmp_path / "widths.json")
    grids = []
    for given in (found, expected, tmp_path / "widths.json"):
        made = exported(model)
        report = aimet_ext.set_widths(made, given)
        assert len(report.specs) == 13
        grids.append({n: q.spec() for n, q in adapt(made).weight_quantizers().items()})
    assert grids[0] == grids[1] == grids[2]
    assert len(set(map(str, grids[0].values()))) > 2
    assert {spec.bitwidth for name, spec in grids[0].items() if "lm_head" in name} == {8}


def test_widths_are_set_in_a_torch_simulation(tiny_model: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    specs = {"*.q_proj": "int3:16", "model.layers.0.mlp.up_proj": None, "*.mlp.*": QSpec()}
    sim = aimet_ext.create_sim(model, IDS, activations=None)
    aimet_ext.set_widths(sim, specs, modules_to_exclude=["*.down_proj"])
    overrides = {"*.q_proj": QSpec(bitwidth=3, granularity=Blockwise(16)), "*.up_proj": None}
    built = aimet_ext.create_sim(model, IDS, activations=None, overrides=overrides)
    found, expected = (
        {n: q.spec() for n, q in adapt(each).weight_quantizers().items()} for each in (sim, built)
    )
    assert found == expected and any(spec.bitwidth == 3 for spec in found.values())


@pytest.mark.parametrize(
    ("widths", "kind", "message"),
    [
        ({"*.nothing": "int4"}, ValueError, r"'\*\.nothing' fits none"),
        ({"*.q_proj": "four"}, ValueError, 'a width such as "int4"'),
        ({"*.q_proj": "int4:48"}, ValueError, "block size that divides"),
        ({"*.q_proj": 4}, TypeError, "overrides must map patterns to QSpec"),
        (["int4"], TypeError, "widths must be a mapping .*got list"),
    ],
)
def test_wrong_widths_are_said(tiny_model: Any, widths: Any, kind: Any, message: str) -> None:
    sim = aimet_ext.create_sim(tiny_model("llama", num_hidden_layers=1), IDS, activations=None)
    before = {n: q.spec() for n, q in adapt(sim).weight_quantizers().items()}
    with pytest.raises(kind, match=message):
        aimet_ext.set_widths(sim, widths)
    assert {n: q.spec() for n, q in adapt(sim).weight_quantizers().items()} == before


def test_another_file_is_no_file_of_widths(tiny_model: Any, tmp_path: Path) -> None:
    sim = aimet_ext.create_sim(tiny_model("llama", num_hidden_layers=1), IDS, activations=None)
    (tmp_path / "other.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"other\.json: a file that the report of assign_widths"):
        aimet_ext.set_widths(sim, tmp_path / "other.json")


def test_the_command_writes_a_recipe(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from aimet_ext.cli.app import app

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(examples.documents("calibration")[:3]), "utf-8")
    called = ["assign-widths", str(examples.model_dir()), "--calibration", str(text)]
    called += ["--choices", "int3, int4:32,int8", "--group", "gate_proj,up_proj", "--json"]
    called += ["--seq-length", "32", "--num-batches", "1", "--exclude", "*.o_proj"]
    called += ["--output", str(tmp_path / "mine.yaml"), "--plot", str(tmp_path / "curve.svg")]
    found = CliRunner().invoke(app, [*called, "--budget", "4.5"])
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    assert printed["average_bits"] <= 4.5
    recipe = aimet_ext.read_recipe(tmp_path / "mine.yaml")
    assert recipe.calibration.seq_length == 32
    named = {name: grid.spec() for name, grid in recipe.overrides.items()}
    for layer in printed["layers"]:
        for name in layer["names"]:
            spec = named.get(name, recipe.weights.spec())
            assert spec == QSpec.from_dict(printed["specs"][layer["choice"]])
    assert (tmp_path / "curve.svg").is_file()
    low = CliRunner().invoke(app, [*called, "--budget", "2"])
    assert low.exit_code != 0
