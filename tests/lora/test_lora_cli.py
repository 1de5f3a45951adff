"""The commands for adapters: what they print, write and refuse."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import aimet_ext
from aimet_ext import examples, lora
from aimet_ext.cli.lora import app
from aimet_ext.lora import read_adapter, read_adapters

peft = pytest.importorskip("peft")
pytest.importorskip("aimet_torch")

pytestmark = [
    # What peft 0.21 does with transformers 5.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def run(*arguments: str | pathlib.Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Any], tmp_path_factory: Any) -> pathlib.Path:
    """Folder with an original model, its export after OmniQuant, and two adapters."""
    root = tmp_path_factory.mktemp("made")
    model = tiny_model("llama", vocab_size=1024)
    model.save_pretrained(root / "original")
    for file in examples.model_dir().glob("tokenizer*"):
        shutil.copy(file, root / "original")
    ids = torch.randint(3, 1024, (2, 16), generator=torch.Generator().manual_seed(0))
    loaded = type(model).from_pretrained(root / "original")
    sim = aimet_ext.create_sim(loaded, ids)
    aimet_ext.apply_omniquant(sim, [ids], num_iterations=2, search_sweeps=0, progress=False)
    sim.compute_encodings(lambda quantized: quantized(ids))
    aimet_ext.export(sim, root / "export", "model", ids[:1])
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="poems"
    )
    wrapped.add_adapter("code", peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(root / "adapters")
    (root / "text.txt").write_text("\n\n".join(examples.documents("calibration")[:8]), "utf-8")
    return root


def test_fold_of_all_adapters(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    scales = made / "export" / "scales.safetensors"
    done = run("fold", made / "adapters", "--scales", scales, "--output", tmp_path / "folded")
    assert done.exit_code == 0, done.output
    assert "omniquant" in done.stdout
    found, expected = (
        read_adapters(tmp_path / "folded"),
        lora.fold_adapters(made / "adapters", scales),
    )
    assert sorted(found) == ["code", "poems"]
    for name, adapter in expected.items():
        assert all(torch.equal(found[name].tensors[k], t) for k, t in adapter.tensors.items())


def test_fold_of_one_adapter_as_json(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run(
        *("fold", made / "adapters", "--scales", made / "export", "--output", tmp_path / "one"),
        *("--name", "code", "--base", made / "original", "--json"),
    )
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["code"]["ranks"] == [4]
    assert printed["code"]["modules"] == 4
    assert printed["code"]["origin"] == aimet_ext.load_scales(made / "export").origin
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()
    again = run("fold", tmp_path / "one", "--scales", made / "export", "--output", tmp_path / "two")
    assert "was folded already" in str(again.exception)
    assert not (tmp_path / "two").exists()


def test_quantize_writes_what_can_be_loaded(made: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run(
        *("quantize", made / "adapters", made / "export", "--calibration", made / "text.txt"),
        *("--output", tmp_path / "out", "--seq-length", 16, "--num-batches", 2),
        *("--batch-size", 2, "--name", "poems"),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert "poems" in done.stdout
    assert "manifest.json" in done.stdout
    report = aimet_ext.RunReport.read(tmp_path / "out")
    (result,) = report.techniques
    assert result.name == "poems" and report.model == "export" and report.weights
    assert {phase.name for phase in report.phases} >= {"quantize the adapters", "export"}
    worst = result.worst(3)
    assert len(result.units) > 1 and all(unit.name in done.stdout for unit in worst)
    sim = lora.load(tmp_path / "out")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        adapted = sim.model(ids)
        lora.switch(sim, None)
        assert not torch.equal(adapted, sim.model(ids))
    assert read_adapter(tmp_path / "out" / "adapters" / "poems").folded is not None


def test_help_has_examples() -> None:
    for command in ("fold", "quantize"):
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert f"aimet-ext lora {command}" in shown.stdout
