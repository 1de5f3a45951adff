"""Reports of runs: what they count, how they are read back, compared, and reached."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import sys
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aimet_ext
from aimet_ext import CorruptFileError, Recorder, RunReport
from aimet_ext.core.affine import Grid
from aimet_ext.reporting.parts import TechniqueResult, UnitResult
from aimet_ext.reporting.weights import weight_use

pytest.importorskip("aimet_torch")

IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))


def made(
    model: Any, techniques: dict[str, Any], **grids: Any
) -> tuple[Any, dict[str, Any], RunReport]:
    """Return a simulation, the reports of its techniques, and the report of the run."""
    recipe = aimet_ext.Recipe(
        weights="int4", lm_head="int8", activations="none", techniques=techniques, **grids
    )
    recorder = Recorder()
    sim = recipe.create_sim(model, IDS)
    reports = recipe.apply(sim, [IDS], watch=recorder.phase, progress=False)
    sim.compute_encodings(lambda quantized: quantized(IDS))
    divergence = aimet_ext.evaluate_divergence(sim, [IDS], model)
    found = RunReport.of(
        sim,
        reports,
        model="tiny",
        recipe=recipe,
        settings={"seed": 3},
        perplexity={"float": 3.0, "rounding": 5.0, "quantized": 4.0},
        divergence={"quantized": divergence},
        text="some text",
        windows=4,
        recorder=recorder,
    )
    return sim, reports, found


@pytest.fixture(scope="module")
def gptq(tiny_model: Callable[..., Any]) -> tuple[Any, dict[str, Any], RunReport]:
    return made(tiny_model("llama"), {"gptq": {}})


# ---------------------------------------------------------------------------------------- contents


def test_losses_are_those_of_the_technique(gptq: Any) -> None:
    _, reports, found = gptq
    (result,) = found.techniques
    assert result.name == "gptq" and result.unit == "layer" and result.settings
    for unit, layer in zip(result.units, reports["gptq"].layers, strict=True):
        assert unit.name == layer.name and unit.sqnr_db == layer.sqnr_db
        assert unit.rounding == layer.loss_nearest / layer.signal
        assert unit.share == pytest.approx(layer.loss_after / layer.loss_nearest)
    assert result.seconds == reports["gptq"].seconds


def test_layers_are_named_by_what_they_lose_themselves(tiny_model: Callable[..., Any]) -> None:
    """One of 8 bits behind layers of 4 bits has their errors in its loss, and adds none."""
    _, _, run = made(tiny_model("llama"), {"gptq": {}}, overrides={"*.o_proj": "int8"})
    result = run.techniques[0]
    wide = [unit for unit in result.units if "o_proj" in unit.name]
    narrow = [unit for unit in result.units if "o_proj" not in unit.name]
    assert wide and max(u.own for u in wide) < 0.2 * max(u.own for u in narrow)
    assert min(u.result for u in wide) > min(u.result for u in narrow)
    assert not {unit.name for unit in wide} & {unit.name for unit in result.worst(3)}
    assert result.worst()[0].own == max(unit.own for unit in result.units)
    polished = {"KL held out, before": 0.1, "KL held out, after": 0.05}
    later = TechniqueResult(name="dwq", numbers=polished)
    shown = " ".join(str(dataclasses.replace(run, techniques=(result, later))).split())
    for words in ("; before dwq; losses of", "; KL held out 0.1 to 0.05, -50.0%", " int8 of "):
        assert words in shown


def test_codes_and_scales_are_those_that_aimet_computes(gptq: Any) -> None:
    sim, _, found = gptq
    uses = {use.name: use for use in found.weights}
    assert len(uses) >= 14
    for name, use in uses.items():
        module = sim.model.get_submodule(name)
        quantizer = module.param_quantizers["weight"]
        scale = quantizer.get_scale().reshape(-1, 1)
        codes = (module.weight / scale).round().clamp(use.qmin, use.qmax).long()
        counts = torch.bincount((codes - use.qmin).flatten(), minlength=use.qmax - use.qmin + 1)
        if use.bitwidth == 4:
            assert list(use.codes) == counts.tolist()
        assert sum(use.codes) == use.counted == use.weights == codes.numel()
        assert use.low_edge == pytest.approx((codes == use.qmin).double().mean().item())
        assert use.high_edge == pytest.approx((codes == use.qmax).double().mean().item())
        assert use.codes_used == len(codes.unique())
        shares = counts[counts > 0].double() / codes.numel()
        assert use.entropy == pytest.approx(float(-(shares * shares.log2()).sum()))
        assert use.cells == sum(use.scales) == scale.numel()
        assert use.scale_low == pytest.approx(scale.min().item())
        assert use.scale_high == pytest.approx(scale.max().item())
        assert use.bits == use.bitwidth * use.weights + 16 * use.cells
    widths = {use.bitwidth for use in found.weights}
    assert widths == {4, 8}


def test_of_a_large_weight_some_rows_are_counted(
    gptq: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimet_ext.reporting import weights

    monkeypatch.setattr(weights, "_COUNTED", 1024)
    whole = {use.name: use for use in gptq[2].weights}
    for use in weights.weight_uses(gptq[0]):
        assert 0 < use.counted == sum(use.codes) < use.weights == whole[use.name].weights
        assert use.scales == whole[use.name].scales
        assert use.low_edge == pytest.approx(whole[use.name].low_edge, abs=0.05)


@pytest.mark.parametrize("bits", [4, 16, 24, 32])
def test_any_width_and_number_is_counted(bits: int) -> None:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = torch.tensor([[-2.0, 0.0, 1.0, math.nan], [math.inf, 0.0, 1.0, 1.0], [1.0] * 4])
    grid = Grid(torch.tensor([[2.0**-bits], [0.0], [math.inf]]), torch.zeros(3, 1), qmin, qmax)
    quantizer: Any = types.SimpleNamespace(
        weight=weight,
        bitwidth=bits,
        matrix_grid=lambda device: grid,
        spec=lambda: aimet_ext.QSpec.parse(f"int{bits}"),
    )
    use = weight_use("layer", quantizer)
    # -2, 0 and 1 in the first row; three numbers above all in the second; four zeros in the third.
    assert use.counted == sum(use.codes) == 10 and use.codes_used == 3
    assert (use.low_edge, use.high_edge) == (0.1, 0.4)
    assert use.codes[0] == 1 and use.codes[-1] == 4 and len(use.codes) == min(64, 2**bits)
    assert use.cells == 3 and use.scales == (1,)
    assert (use.scale_low, use.scale_high) == (0.0, math.inf)
    grid = dataclasses.replace(grid, scale=torch.full((3, 1), math.nan))
    assert weight_use("layer", quantizer).counted == 0


def test_the_rest_is_what_was_given(gptq: Any) -> None:
    found = gptq[2]
    assert found.model == "tiny" and found.settings["seed"] == 3 and found.recipe["techniques"]
    assert found.quality.windows == 4 and found.quality.text == "some text"
    assert found.quality.recovered == pytest.approx(0.5)
    assert found.quality.states["quantized"].kl > 0
    assert [phase.name for phase in found.phases] == ["gptq"] and found.seconds > 0
    assert found.versions["aimet-ext"] == aimet_ext.__version__
    shown = str(found)
    for text in ("tiny", "gptq", "50% of the loss", "bits with scales", "as deployed"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_reports_of_all_kinds(tiny_model: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    techniques = {
        "rotation": {},
        "omniquant": {"num_iterations": 1, "pairs": ["v_o"]},
        "rtn": {},
    }
    _, reports, found = made(tiny_model("llama"), techniques)
    rotation, omniquant, rtn = found.techniques
    assert rotation.numbers["deviation of the float outputs"] == reports["rotation"].deviation
    assert [unit.name for unit in omniquant.units] == [b.name for b in reports["omniquant"].blocks]
    assert omniquant.unit == "block" and omniquant.units[0].grid.startswith("kept: ")
    assert rtn.units[0].rounding == rtn.units[0].result and "weights" in rtn.measure
    assert any(note.startswith("rtn: left alone") for note in found.warnings) == bool(
        reports["rtn"].skipped
    )
    found.save(tmp_path / "report.json")
    assert RunReport.read(tmp_path) == found


def test_wrong_arguments_are_named(gptq: Any) -> None:
    sim = gptq[0]
    with pytest.raises(ValueError, match="perplexity: the states float, rounding, quantized are"):
        RunReport.of(sim, {}, perplexity={"start": 1.0})
    with pytest.raises(TypeError, match=r"reports: the report that a technique returned .* 'x'"):
        RunReport.of(sim, {"x": {}})
    with pytest.raises(TypeError, match="QuantizationSimModel"):
        RunReport.of(torch.nn.Linear(2, 2), {})


# --------------------------------------------------------------------------------------- the file


def test_a_report_is_read_back_as_it_was(gptq: Any, tmp_path: pathlib.Path) -> None:
    found = gptq[2]
    found.save(tmp_path / "report.json")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert RunReport.read(tmp_path) == RunReport.read(tmp_path / "report.json") == found
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == found.to_dict()


def test_numbers_that_json_lacks_survive(tmp_path: pathlib.Path) -> None:
    units = tuple(
        UnitResult(name=str(value), rounding=1.0, result=value, sqnr_db=-value)
        for value in (math.inf, 0.0, math.nan)
    )
    run_report = RunReport(
        model="m", created="now", techniques=(TechniqueResult(name="t", units=units),)
    )
    run_report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text("utf-8")
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    read = RunReport.read(tmp_path).techniques[0].units
    assert read[:2] == units[:2] and math.isnan(read[2].result or 0.0)
    pytest.importorskip("matplotlib")
    run_report.save_html(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda plain: plain.update(format=2), "format"),
        (lambda plain: plain.pop("model"), "model"),
        (lambda plain: plain.update(extra=1), "extra"),
        (lambda plain: plain["quality"].update(windows="4"), "quality.windows"),
        (lambda plain: plain["quality"]["states"].update(other={}), "quality.states"),
        (lambda plain: plain["weights"][0].update(codes="many"), "weights.0.codes"),
        (lambda plain: plain["phases"][0].update(seconds=None), "phases.0.seconds"),
        (lambda plain: plain["techniques"][0].update(units={}), "techniques.0.units"),
    ],
)
def test_a_file_of_another_form_is_refused(
    gptq: Any, tmp_path: pathlib.Path, change: Callable[[dict[str, Any]], None], place: str
) -> None:
    plain = gptq[2].to_dict()
    change(plain)
    (tmp_path / "report.json").write_text(json.dumps(plain), "utf-8")
    with pytest.raises(CorruptFileError, match=rf"report\.json.*format 1.*{place}"):
        RunReport.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '"x"', "\x00"])
def test_what_is_no_report_is_refused(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content, "utf-8")
    with pytest.raises(CorruptFileError, match=r"report\.json"):
        RunReport.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="quantize writes it"):
        RunReport.read(tmp_path / "..")


# ------------------------------------------------------------------------------------ the recorder


def test_a_part_has_its_time_and_memory() -> None:
    recorder = Recorder()
    with recorder.phase("small"):
        pass
    with recorder.phase("large"):
        held = torch.ones(40_000_000)
    with pytest.raises(KeyError), recorder.phase("failing"):
        raise KeyError
    small, large, failing = recorder.phases
    assert (small.name, large.name, failing.name) == ("small", "large", "failing")
    assert 0 <= small.seconds < large.seconds
    if sys.platform == "linux":
        assert large.memory_bytes - small.memory_bytes > 0.9 * 4 * held.numel()


def test_parts_and_the_rest_are_all_the_time() -> None:
    started = time.perf_counter()
    recorder = Recorder()
    with recorder.phase("one"):
        time.sleep(0.02)
    time.sleep(0.05)
    recorder.stop()
    passed = time.perf_counter() - started
    phases = tuple(recorder.phases)
    run = RunReport(model="m", created="now", phases=phases, elapsed=recorder.elapsed)
    assert run.rest >= 0.05 and run.seconds == phases[0].seconds + run.rest
    assert run.seconds == pytest.approx(passed, abs=0.02)
    assert "the rest" in str(run) and "the rest" in str(run.compare(run))
    without = RunReport(model="m", created="now", phases=phases)
    assert without.seconds == phases[0].seconds and "the rest" not in str(without)


def test_warnings_are_kept_and_still_shown(caplog: pytest.LogCaptureFixture) -> None:
    recorder, shown = Recorder(), warnings.showwarning
    code = compile("import warnings\nwarnings.warn('old')", "/x/aimet_ext/y.py", "exec")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        listed = warnings.showwarning
        with recorder.phase("a"), recorder.phase("b"):
            logging.getLogger("aimet_ext.some").warning("%s is odd", "x")
            logging.getLogger("other").warning("not ours")
            exec(code)
            warnings.warn("not ours either", stacklevel=1)
        assert warnings.showwarning is listed
    assert recorder.warnings == ["x is odd", "old"]
    assert [str(each.message) for each in heard] == ["old", "not ours either"]
    assert "x is odd" in caplog.text and warnings.showwarning is shown


# -------------------------------------------------------------------------------------- comparison


def test_two_runs_differ_in_what_differs(
    gptq: Any, tiny_model: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    first = gptq[2]
    _, _, second = made(tiny_model("llama"), {"gptq": {"damping": 0.5}})
    found = first.compare(second)
    names = [name for name, _, _ in found.settings]
    assert any("damping" in name for name in names)
    assert not any(name.startswith(("versions", "machine")) for name in names)
    ((_, rows),) = found.losses.items()
    assert len(rows) == len(first.techniques[0].units)
    for row, one, other in zip(
        rows, first.techniques[0].units, second.techniques[0].units, strict=True
    ):
        assert (row.name, row.first, row.second) == (one.name, one.result, other.result)
    assert found.grids == []
    assert [name for name, *_ in found.phases] == ["gptq", "in all"]
    shown = str(found)
    for text in ("settings that differ", "damping", "measures", "perplexity", "time and memory"):
        assert text in shown
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["losses"] and plain["measures"]["perplexity, as deployed"] == [4.0, 4.0]
    same = first.compare(first)
    assert same.settings == same.grids == []
    assert all(row.distance == 0 for rows in same.losses.values() for row in rows)


def test_presets_that_differ_are_named_and_not_what_they_set(gptq: Any) -> None:
    """But for settings that a recipe gives itself."""
    first = gptq[2]

    def changed(given: dict[str, Any]) -> RunReport:
        settings = aimet_ext.GPTQParams(**given).to_dict()
        (result,) = first.techniques
        return dataclasses.replace(
            first,
            recipe={**first.recipe, "techniques": [{"gptq": given}]},
            techniques=(dataclasses.replace(result, settings=settings),),
        )

    fast = changed({"preset": "fast", "damping": 0.5})
    assert fast.techniques[0].settings != first.techniques[0].settings
    assert first.compare(fast).settings == [
        ("gptq damping", str(aimet_ext.GPTQParams().damping), "0.5"),
        ("gptq preset", "balanced", "fast"),
    ]
    assert "share of flips, as deployed" in str(first.compare(fast))
    flips = f"{100 * first.quality.states['quantized'].flips:.3g} %"
    assert str(first.compare(fast)).count(flips) >= 2


def test_measures_on_other_windows_are_not_compared(gptq: Any) -> None:
    first, note = gptq[2], "measures of A and B were taken on other windows"
    assert note not in str(first.compare(first)) and not first.compare(first).note
    plan = {**first.recipe["calibration"], "seq_length": 7}
    others = [
        dataclasses.replace(first, quality=dataclasses.replace(first.quality, windows=5)),
        dataclasses.replace(first, quality=dataclasses.replace(first.quality, text="other text")),
        dataclasses.replace(first, recipe={**first.recipe, "calibration": plan}),
    ]
    for other in others:
        found = first.compare(other, ("w4", "w3"))
        assert note in str(found) and note in found.to_dict()["note"]
        assert str(found).startswith("A: w4, tiny, ") and "\nB: w3, tiny, " in str(found)


def test_the_last_technique_that_measured_a_unit_counts() -> None:
    def unit(result: float) -> tuple[UnitResult, ...]:
        return (UnitResult(name="a", rounding=1.0, result=result),)

    techniques = tuple(
        TechniqueResult(name=name, measure="m", units=unit(result))
        for name, result in (("seq_mse", 0.5), ("gptq", 0.25))
    )
    one = RunReport(model="m", created="now", techniques=techniques)
    other = dataclasses.replace(one, techniques=techniques[:1])
    (row,) = one.compare(other).losses["m"]
    assert (row.first, row.second, row.change) == (0.25, 0.5, "+100.0%")
