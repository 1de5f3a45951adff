"""A sim is rebuilt from its folder, bit by bit, and nothing damaged is taken for sound."""

from __future__ import annotations

import copy
import gc
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext
from aimet_ext import LPBQ, Blockwise, QSpec
from aimet_ext.artifact.inspect import inspect_export
from aimet_ext.errors import CorruptFileError
from aimet_ext.files.folders import replace_folder
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import write_manifest
from aimet_ext.files.scales import write_scales
from aimet_ext.integrity.check import check_integrity
from aimet_ext.sim.protocol import adapt
from aimet_ext.sim.torch.state import quantizers_to_tensors

aimet_torch = pytest.importorskip("aimet_torch")
pytest.importorskip("onnx")

IDS = torch.arange(32).reshape(2, 16) * 3 % 128
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
Q0 = "model.model.layers.0.self_attn.q_proj"


def calibrated(model: nn.Module, **settings: Any) -> Any:
    sim = aimet_ext.create_sim(model, IDS, **settings)
    sim.compute_encodings(lambda module: module(IDS))
    return sim


@torch.no_grad()
def logits(sim: Any, *args: Tensor) -> Tensor:
    return sim.model(*(args or (IDS, MASK)))


def assert_same(one: Any, other: Any) -> None:
    """The same logits and quantizer states, bit by bit."""
    assert torch.equal(logits(one), logits(other))
    tensors, described = quantizers_to_tensors(one)
    other_tensors, other_described = quantizers_to_tensors(other)
    assert described == other_described
    assert all(torch.equal(value, other_tensors[name]) for name, value in tensors.items())


class Net(nn.Module):
    """A model that is not of transformers, with a layer that is used twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def by_hand(width: int = 8, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(width).eval()
    sim = aimet_torch.QuantizationSimModel(net, X, default_param_bw=4)
    sim.compute_encodings(lambda module: module(X))
    return sim


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("load") / "out"
    aimet_ext.export(calibrated(tiny_model("llama")), path, "m", IDS)
    return path


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("llama", {}, {"weights": QSpec(granularity=LPBQ(32, scale_bits=3))}),
        ("qwen2", {"tie_word_embeddings": True}, {"activations": 8}),
        (
            "qwen3",
            {"intermediate_size": 100},
            {
                "weights": QSpec(
                    bitwidth=3,
                    symmetric=False,
                    granularity=Blockwise(32),
                    on_indivisible="pad",
                ),
                "overrides": {"*.o_proj": None},
            },
        ),
    ],
    ids=["lpbq", "tied", "padded"],
)
def test_a_sim_comes_back_bit_by_bit(
    tmp_path: pathlib.Path,
    tiny_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    sim = calibrated(tiny_model(family, **changes), **settings)
    adapt(sim).weight_quantizer(Q0).freeze()
    aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    monkeypatch.setattr(torch, "load", None)  # nothing may be unpickled
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    loaded = aimet_ext.load(tmp_path / "elsewhere")
    assert_same(sim, loaded)
    assert adapt(loaded).weight_quantizer(Q0).frozen
    assert adapt(loaded).settings == adapt(sim).settings

    aimet_ext.export(loaded, tmp_path / "again", "m", IDS)
    weights = [(tmp_path / name / "model.safetensors") for name in ("elsewhere", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("dtype", "activations"),
    [(torch.bfloat16, None), (torch.float64, None), (torch.float64, 16)],
)
def test_other_dtypes_come_back(
    tmp_path: pathlib.Path, tiny_llama: nn.Module, dtype: torch.dtype, activations: int | None
) -> None:
    model = tiny_llama.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-12)  # float32 does not hold the products
    sim = calibrated(model, activations=activations)
    before = logits(sim)
    aimet_ext.export(sim, tmp_path / "out", "m", IDS, hf_checkpoint=dtype is torch.float64)
    assert logits(sim).dtype == dtype and torch.equal(logits(sim), before)
    assert_same(sim, aimet_ext.load(tmp_path / "out"))
    assert not check_integrity(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_numbers_of_other_dtypes_are_inputs(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    x, net = X.to(dtype), Net().eval().to(dtype)
    sim = aimet_ext.create_sim(net, x, activations=None)
    aimet_ext.export(sim, tmp_path / "out", "net", x)
    other = aimet_ext.create_sim(copy.deepcopy(net), x, activations=None)
    assert torch.equal(logits(aimet_ext.load(tmp_path / "out", sim=other), x), logits(sim, x))


def test_what_was_changed_after_create_sim_comes_back(
    tmp_path: pathlib.Path, tiny_llama: nn.Module
) -> None:
    """Quantizers taken out, replaced and shared by hand, and weights transformed."""
    from aimet_torch.quantization.affine import QuantizeDequantize

    sim = calibrated(tiny_llama, activations=8)
    block = sim.model.model.model.layers[0]
    block.self_attn.q_proj.param_quantizers["weight"] = None
    block.mlp.down_proj.output_quantizers[0] = None
    block.mlp.gate_proj.param_quantizers["weight"] = QuantizeDequantize(
        (128, 4), 2, True, block_size=(1, 16), zero_point_shift=0.5
    )
    block.self_attn.k_proj.output_quantizers[0] = block.self_attn.v_proj.output_quantizers[0]
    with torch.no_grad():
        block.self_attn.q_proj.weight.mul_(1.5)
    sim.compute_encodings(lambda module: module(IDS))
    ledger = Ledger("ef" * 32)
    ledger.log_run("omniquant", [Q0])
    adapt(sim).ledger = ledger

    aimet_ext.export(sim, tmp_path / "out", "m", IDS)
    loaded = aimet_ext.load(tmp_path / "out")
    assert_same(sim, loaded)
    with pytest.raises(ValueError, match="already applied"):
        adapt(loaded).ledger.check_can_apply("omniquant", [Q0])


def test_a_sim_built_by_hand_is_loaded_into_one(tmp_path: pathlib.Path) -> None:
    sim, other = by_hand(seed=0), by_hand(seed=1)
    manifest = aimet_ext.export(sim, tmp_path / "out", "net", X)
    assert not (tmp_path / "out" / "config.json").exists()
    assert manifest["model"]["loads_in_transformers"] is False
    with pytest.raises(ValueError, match=r"load\(path, sim=sim\)"):
        aimet_ext.load(tmp_path / "out")
    assert not torch.equal(logits(sim, X), logits(other, X))
    assert aimet_ext.load(tmp_path / "out", sim=other) is other
    assert torch.equal(logits(sim, X), logits(other, X))


def test_a_sim_of_another_model_is_refused_untouched(tmp_path: pathlib.Path) -> None:
    aimet_ext.export(by_hand(), tmp_path / "out", "net", X)
    other = by_hand(width=16)
    before = logits(other, X)
    with pytest.raises(ValueError, match=r"first\.weight has shape \(8, 8\) instead of \(16, 8\)"):
        aimet_ext.load(tmp_path / "out", sim=other)
    assert torch.equal(logits(other, X), before)


def test_every_file_is_checked(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    """One flipped bit, anywhere, in any file."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 11
    for number, name in enumerate(sorted(files)):
        copied = tmp_path / str(number)
        shutil.copytree(folder, copied)
        content = bytearray((copied / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copied / name).write_bytes(content)
        with pytest.raises(CorruptFileError, match=name.name):
            aimet_ext.load(copied)
        with pytest.raises(CorruptFileError, match=name.name):
            inspect_export(copied)


def test_a_missing_or_cut_file_is_named(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "quantizers.safetensors").unlink()
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors has .* quantizers\.\w+ is abs"):
        aimet_ext.load(tmp_path / "out")


def write_folder_of_scales(path: pathlib.Path, ledger: Ledger) -> None:
    """Write what a technique leaves behind."""
    with replace_folder(path) as folder:
        write_scales(folder, ledger)
        write_manifest(folder, "scales", techniques=list(ledger.techniques))


def test_other_folders_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="written by aimet_ext"):
        aimet_ext.load(tmp_path / "nothing")
    write_folder_of_scales(tmp_path / "scales", Ledger())
    with pytest.raises(CorruptFileError, match="an export is required"):
        aimet_ext.load(tmp_path / "scales")


def test_inspecting_sums_up_an_export(folder: pathlib.Path) -> None:
    found = inspect_export(folder)
    assert found["quantizers"]["parameters"] == {"int4": 14, "int8": 2, "uint16": 5}
    assert found["quantizers"]["without_range"] == 0
    assert found["encodings"]["m.encodings"]["param_encodings"] == 21
    assert found["encodings"]["m.2.0.0.encodings"]["version"] == "2.0.0"
    assert found["scales"] == {"modules": 0, "techniques": [], "pairs": {}}
    assert found["unlisted"] == [] and found["settings"]["weights"]["bitwidth"] == 4


def test_inspecting_scales(tmp_path: pathlib.Path) -> None:
    ledger = Ledger()
    ledger.record("omniquant", "b", "p", "v_o", [("o", "in", torch.full((4,), 2.0))], size=2)
    write_folder_of_scales(tmp_path / "out", ledger)
    (tmp_path / "out" / "later.txt").write_text("")
    found = inspect_export(tmp_path / "out")
    assert found["scales"] == {"modules": 1, "techniques": ["omniquant"], "pairs": {"v_o": 1}}
    assert found["unlisted"] == ["later.txt"] and "quantizers" not in found


@pytest.mark.parametrize("on", [True, False])
def test_python_does_not_search_for_cycles_while_it_loads(
    tiny_llama: nn.Module, tmp_path: pathlib.Path, on: bool
) -> None:
    """Each search visits all objects, so that a block of a deep model would cost more."""
    aimet_ext.export(calibrated(tiny_llama), tmp_path / "out", "model", IDS, progress=False)
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(info["generation"])

    before = gc.get_threshold()
    gc.set_threshold(50)  # by which the search would be all the time
    (gc.enable if on else gc.disable)()
    gc.callbacks.append(note)
    try:
        aimet_ext.load(tmp_path / "out", progress=False)
        count, after = len(seen), gc.isenabled()
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
        gc.enable()
    assert count < 100  # more than a thousand otherwise
    assert after == on
