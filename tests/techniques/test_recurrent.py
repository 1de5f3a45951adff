"""Layer-wise techniques on the weights of LSTM, GRU and RNN in PyTorch simulations."""

import copy

import pytest
import torch
from recurrent_reference import rows_of_weights
from torch import nn

import aimet_ext
from aimet_ext.integrity.check import check_integrity
from aimet_ext.techniques import gptq
from aimet_ext.walk.recurrent import matrices

pytest.importorskip("aimet_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
MIX = torch.randn(12, 12, generator=torch.Generator().manual_seed(9)) * 0.3


class Tagger(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        torch.manual_seed(0)
        settings = {"num_layers": 2, "bidirectional": True, **settings}
        self.rnn = KINDS[kind](12, 24, batch_first=True, **settings)
        width = (self.rnn.proj_size or 24) * (1 + self.rnn.bidirectional)
        self.head = nn.Linear(width, 6)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def walks(*seeds):
    """Sequences whose steps resemble each other, ``[batch, steps, in]`` each."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randn(8, 10, 12, generator=g).cumsum(1) @ MIX / 2 for g in generators]


DATA, HELD_OUT = walks(*range(8)), walks(*range(100, 104))


def build(model, bits=4):
    """A simulation of weights alone."""
    from aimet_torch import QuantizationSimModel

    sim = QuantizationSimModel(model, DATA[0], default_param_bw=bits, default_output_bw=16)
    for module in sim.qmodules():
        module._remove_activation_quantizers()
        for name in list(module.param_quantizers):
            if "bias" in name:
                module.param_quantizers[name] = None
    sim.compute_encodings(lambda quantized: quantized(DATA[0]))
    return sim


@torch.no_grad()
def error(sim, model):
    return float(sum((sim.model(x) - model(x)).square().sum() for x in HELD_OUT))


def tensors(sim):
    return {n: value for n, value in sim.model.state_dict().items() if torch.is_tensor(value)}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("name", ["gptq", "seq_mse", "adaround"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_techniques_beat_rounding_on_sequences_not_seen(kind, name, bits):
    model = Tagger(kind).eval()
    sim = build(model, bits)
    keys = [*sim.model.state_dict()]
    plain = error(sim, model)
    report = getattr(aimet_ext, f"apply_{name}")(sim, DATA, progress=False)
    assert report.skipped == {}
    weights = [f"rnn.{matrix}" for matrix in matrices(model.rnn)]
    assert {layer.name for layer in report.layers} == {*weights, "head"}
    assert [*sim.model.state_dict()] == keys
    after = error(sim, model)
    assert after < 0.85 * plain
    sim.compute_encodings(lambda quantized: quantized(DATA[0]))
    assert error(sim, model) == after  # ranges stay, values are on them


@pytest.mark.parametrize("name", ["hqq", "rtn"])
def test_techniques_without_data_decide_them_too(name):
    sim = build(Tagger("LSTM").eval(), 3)
    report = getattr(aimet_ext, f"apply_{name}")(sim, progress=False)
    assert len(report.layers) == 9
    for weight, quantizer in sim.model.rnn.param_quantizers.items():
        if quantizer is not None:
            value = getattr(sim.model.rnn, weight)
            assert torch.equal(quantizer(value), value) and value.unique().numel() <= 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_is_the_error_on_the_rows_of_a_loop(kind):
    """In the float stream, and in the quantized one behind weights that were decided before."""
    model = Tagger(kind).eval()
    for symmetry in ("symfp", "symqt"):
        sim, going = build(model, 3), copy.deepcopy(model.rnn)
        report = aimet_ext.apply_gptq(sim, DATA, inp_symmetry=symmetry, progress=False)
        for layer in report.layers[:-1]:  # in the order in which they were decided
            name = layer.name.removeprefix("rnn.")
            rows = torch.cat([rows_of_weights(going, x)[1][name] for x in DATA])
            float_weight = getattr(model.rnn, name).detach()
            lost = (getattr(sim.model.rnn, name) - float_weight).double()
            assert layer.tokens == len(rows) == 640 and layer.inputs == rows.shape[1]
            loss = float((rows @ lost.T).square().sum(1).mean())
            assert layer.loss_after == pytest.approx(loss, rel=1e-3)
            assert layer.loss_after < layer.loss_nearest
            if symmetry == "symqt":
                with torch.no_grad():
                    getattr(going, name).copy_(getattr(sim.model.rnn, name))


def test_grids_of_channels_and_of_blocks():
    """AIMET quantizes a weight with one range; other grids can be put in its place."""
    from aimet_torch.quantization.affine import QuantizeDequantize

    model = Tagger("LSTM").eval()
    grids = {"channels": {"shape": (96, 1)}, "blocks": {"shape": (96, 2), "block_size": (1, 12)}}
    found = {}
    for name, settings in {"one": {"shape": ()}, **grids}.items():
        sim = build(model, 3)
        own = QuantizeDequantize(bitwidth=3, symmetric=True, **settings)
        sim.model.rnn.param_quantizers["weight_hh_l1"] = own
        report = aimet_ext.apply_gptq(sim, DATA, progress=False)
        (layer,) = (layer for layer in report.layers if layer.name == "rnn.weight_hh_l1")
        found[name] = layer.loss_after
        assert sim.model.rnn.param_quantizers["weight_hh_l1"] is own
        value = sim.model.rnn.weight_hh_l1
        assert not own.is_overwrite_allowed() and torch.equal(own(value), value)
    assert found["blocks"] < found["channels"] < found["one"]


def test_layers_and_their_weights_can_be_left_out():
    sim = build(Tagger("GRU").eval())
    for excluded in ([sim.model.rnn], ["rnn"], ["rnn.weight_*"]):
        again = copy.deepcopy(sim)
        own = [again.model.rnn] if isinstance(excluded[0], nn.Module) else excluded
        report = aimet_ext.apply_gptq(again, DATA, modules_to_exclude=own, progress=False)
        assert [layer.name for layer in report.layers] == ["head"]
    report = aimet_ext.apply_gptq(sim, DATA, modules_to_exclude=["*_reverse"], progress=False)
    assert len(report.layers) == 5


def test_what_a_layer_computes_inside_is_named():
    sim = build(Tagger("LSTM", proj_size=5).eval())
    report = aimet_ext.apply_gptq(sim, DATA, progress=False)
    assert list(report.skipped) == ["rnn"] and "weight_hr_l0" in report.skipped["rnn"]
    assert len(report.layers) == 9

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(12, 24), nn.Linear(24, 6)

        def forward(self, x):
            state = self.cell(x[:, 0])
            return self.head(self.cell(x[:, 1], state))

    sim = build(Steps().eval())
    report = aimet_ext.apply_gptq(sim, DATA, progress=False)
    assert report.skipped == {
        "cell": "a recurrent cell is called at each step, only layers of all steps are decided"
    }


def test_a_failure_leaves_everything_as_it_was(monkeypatch):
    model = Tagger("LSTM").eval()
    sim = build(model)
    before, rnn = copy.deepcopy(tensors(sim)), sim.model.rnn
    held = {name: id(parameter) for name, parameter in rnn.named_parameters(recurse=False)}
    output = sim.model(DATA[0])
    decide, count = gptq.GPTQ.decide, iter(range(9))

    def failing(solver, problem):
        if next(count) == 4:
            raise RuntimeError("no more")
        return decide(solver, problem)

    monkeypatch.setattr(gptq.GPTQ, "decide", failing)
    with pytest.raises(RuntimeError, match="no more"):
        aimet_ext.apply_gptq(sim, DATA, progress=False)
    assert held == {name: id(p) for name, p in rnn.named_parameters(recurse=False)}
    after = tensors(sim)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(sim.model(DATA[0]), output)
    assert "forward" not in vars(rnn) and sim.model.rnn is rnn


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    model, found = Tagger("LSTM").eval(), []
    for _ in range(2):
        sim = build(model)
        aimet_ext.apply_gptq(sim, DATA, checkpoint_dir=tmp_path / "steps", progress=False)
        found.append(tensors(sim))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_exports_compute_the_same(kind, tmp_path):
    from aimet_torch import QuantizationSimModel

    pytest.importorskip("onnx")

    def fresh():
        model = Tagger(kind).eval()
        return QuantizationSimModel(model, DATA[0], default_param_bw=4, default_output_bw=16)

    sim = fresh()
    aimet_ext.apply_gptq(sim, DATA, progress=False)
    sim.compute_encodings(lambda quantized: quantized(DATA[0]))
    aimet_ext.export(sim, tmp_path / "out", "m", DATA[0], progress=False)
    loaded = aimet_ext.load(tmp_path / "out", sim=fresh(), progress=False)
    assert torch.equal(loaded.model(DATA[1]), sim.model(DATA[1]))
    assert check_integrity(tmp_path / "out") == []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(12), nn.GRU(12, 12, batch_first=True)
        self.out = nn.Linear(12, 12)

    def forward(self, x):
        return x + self.out(self.rnn(self.norm(x))[0])


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(12, 6)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_inside_of_repeated_blocks_and_behind_a_forward_function():
    """Walked block by block, and by running the model again: as along the graph."""
    model = Stack().eval()
    sim, losses = build(model), []
    plain = error(sim, model)
    report = aimet_ext.apply_gptq(sim, DATA, progress=False)
    assert len(report.layers) == 3 * 3 + 1 and not report.skipped
    assert report.cost["walk"] == "blocks" and error(sim, model) < plain
    model = Tagger("LSTM", num_layers=1).eval()
    for walk, forward_fn in (("graph", None), ("rerun", lambda m, x: m(x))):
        report = aimet_ext.apply_gptq(
            build(model), DATA, forward_fn=forward_fn, inp_symmetry="asym", progress=False
        )
        assert report.cost["walk"] == walk
        losses.append([layer.loss_after for layer in report.layers])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_create_sim_gives_them_the_bits_of_weights():
    """One range for each matrix, whatever the granularity; float where weights are."""
    from aimet_ext import Blockwise, QSpec

    model, spec = Tagger("LSTM").eval(), QSpec(bitwidth=4, granularity=Blockwise(4))
    sim = aimet_ext.create_sim(model, DATA[0], weights=spec, activations=None)
    held = sim.model.rnn.param_quantizers
    weights = matrices(model.rnn)
    assert {(tuple(held[name].shape), held[name].bitwidth) for name in weights} == {((), 4)}
    assert all(held[name] is None for name in held if name not in weights)
    plain = error(sim, model)
    report = aimet_ext.apply_gptq(sim, DATA, progress=False)
    assert len(report.layers) == 9 and error(sim, model) < plain
    sim = aimet_ext.create_sim(model, DATA[0], weights=None, lm_head=None, allow_float=1.0)
    held = sim.model.rnn.param_quantizers
    assert all(held[name] is None for name in weights) and held["bias_ih_l0"].bitwidth == 16


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rnn": None}, {}),
        ({"rnn": 8}, {"weight_ih_l0": 8, "weight_hh_l0": 8}),
        ({"rnn.weight_hh*": 8}, {"weight_ih_l0": 4, "weight_hh_l0": 8}),
        ({"*_ih_l0": None, "*": 8}, {"weight_hh_l0": 8}),
    ],
)
def test_overrides_name_layers_and_matrices(overrides, expected):
    from aimet_ext import QSpec
    from aimet_ext.grids.create import arguments_from_settings

    model = Tagger("GRU", num_layers=1, bidirectional=False).eval()
    specs = {k: None if bits is None else QSpec(bitwidth=bits) for k, bits in overrides.items()}
    sim = aimet_ext.create_sim(model, DATA[0], activations=None, overrides=specs)
    again = aimet_ext.create_sim(model, DATA[0], **arguments_from_settings(sim.aimet_ext_settings))
    for made in (sim, again):
        assert made.aimet_ext_settings["left_float"] == []
        held = made.model.rnn.param_quantizers
        found = {k: held[k].bitwidth for k in matrices(model.rnn) if held[k] is not None}
        assert found == expected
    x = DATA[0]
    if not expected:
        assert torch.equal(sim.model.rnn(x)[0].as_subclass(torch.Tensor), model.rnn(x)[0])
    report = aimet_ext.apply_gptq(sim, DATA, progress=False)
    assert {layer.name.removeprefix("rnn.") for layer in report.layers} - {"head"} == set(expected)


def test_overrides_with_blocks_for_recurrent_layers_alone_are_refused():
    from aimet_ext import LPBQ, QSpec

    blocks = QSpec(bitwidth=4, granularity=LPBQ(4))
    with pytest.raises(ValueError, match=r"'rnn'\]: one range is required .* rnn.weight_ih_l0"):
        aimet_ext.create_sim(Tagger("LSTM").eval(), DATA[0], overrides={"rnn": blocks})
    with pytest.raises(ValueError, match=r"'rnm' fits none; names look like 'head'.* 'rnn'"):
        aimet_ext.create_sim(Tagger("LSTM").eval(), DATA[0], overrides={"rnm": None})
