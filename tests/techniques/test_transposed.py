"""Layer-wise techniques on transposed convolutions."""

import pytest
import torch
from torch import nn

import aimet_ext

pytest.importorskip("aimet_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated


class Decoder(nn.Module):
    """From small pictures to larger ones; the last layer has groups."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.again = nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=1, dilation=1)
        self.grouped = nn.ConvTranspose2d(6, 4, 3, groups=2)

    def forward(self, x):
        x = self.up(self.enter(x).relu()).relu()
        return self.again(x), self.grouped(x)


def pictures(seed, count=4):
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=(8, 8), mode="bicubic")


def build(bits=4, *, per_channel=True):
    from aimet_torch import QuantizationSimModel
    from aimet_torch.quantization.affine import QuantizeDequantize

    model = Decoder().eval()
    sim = QuantizationSimModel(model, pictures(0), default_param_bw=bits, default_output_bw=16)
    for module in (sim.model.enter, sim.model.up, sim.model.again, sim.model.grouped):
        module._remove_activation_quantizers()
        if not per_channel:
            module.param_quantizers["weight"] = QuantizeDequantize((), bits, symmetric=True)
    sim.compute_encodings(lambda quantized: quantized(pictures(0)))
    return model, sim


@torch.no_grad()
def error(sim, model):
    batches = [pictures(100 + seed) for seed in range(4)]
    return float(sum((sim.model(x)[0] - model(x)[0]).square().sum() for x in batches))


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("name", ["gptq", "adaround", "seq_mse", "hqq"])
def test_techniques_beat_rounding(name, per_channel):
    model, sim = build(per_channel=per_channel)
    plain = error(sim, model)
    data = () if name == "hqq" else ([pictures(seed) for seed in range(8)],)
    report = getattr(aimet_ext, f"apply_{name}")(sim, *data, progress=False)
    decided = {layer.name: layer for layer in report.layers}
    assert decided.keys() == {"enter", "up", "again", *(() if per_channel else ("grouped",))}
    assert ("cells of several output rows" in report.skipped.get("grouped", "")) == per_channel
    assert decided["up"].rows == 6
    if data:
        assert decided["up"].tokens == 8 * 4 * 16 * 16 and decided["up"].inputs == 8 * 16
    assert error(sim, model) < plain or name == "hqq"
    before = error(sim, model)
    sim.compute_encodings(lambda quantized: quantized(pictures(0)))
    assert error(sim, model) == before  # ranges stay, values are on them


def test_create_sim_gives_them_the_spec():
    """A range for each output channel, the second dimension, also where blocks are asked for."""
    from aimet_ext import Blockwise, QSpec

    model, spec = Decoder().eval(), QSpec(bitwidth=4, granularity=Blockwise(2))
    sim = aimet_ext.create_sim(
        model, pictures(0), weights=spec, activations=None, overrides={"enter": None}
    )
    shapes = {
        name: tuple(sim.model.get_submodule(name).param_quantizers["weight"].shape)
        for name in ("up", "again", "grouped")
    }
    assert shapes == {"up": (1, 6, 1, 1), "again": (1, 6, 1, 1), "grouped": (1, 2, 1, 1)}
    settings = sim.aimet_ext_settings
    assert settings["per_channel_instead"] == [*shapes] and not settings["left_float"]
    plain = error(sim, model)
    report = aimet_ext.apply_gptq(sim, [pictures(seed) for seed in range(8)], progress=False)
    assert [layer.bitwidth for layer in report.layers] == [4, 4]
    assert error(sim, model) < plain


def test_the_report_is_the_error_of_the_layer():
    """Behind a float layer, of a whole layer run by torch."""
    model, sim = build(bits=3)
    batches = [pictures(seed) for seed in range(3)]
    report = aimet_ext.apply_gptq(
        sim, batches, inp_symmetry="symfp", modules_to_exclude=[sim.model.enter], progress=False
    )
    (layer,) = (layer for layer in report.layers if layer.name == "up")
    with torch.no_grad():
        inputs = [model.enter(x).relu() for x in batches]
        lost = [sim.model.up(x) - model.up(x) for x in inputs]
    squared = sum(float(each.double().square().sum()) for each in lost)
    # A bias may be set to what cancels the mean error, of which the squares are free.
    assert layer.loss_after == pytest.approx(squared / layer.tokens, rel=1e-3)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 4, 3, stride=2)
        self.states = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 6)

    def forward(self, x):
        return self.head(self.states(self.up(x).transpose(1, 2))[0])


def test_scales_are_learnt_on_what_was_rounded():
    """DWQ behind GPTQ reads and writes the weight of a transposed convolution as it lies there.

    The weights of the recurrent layer, which it leaves alone, stay as GPTQ decided them.
    """
    from aimet_torch import QuantizationSimModel

    torch.manual_seed(0)
    model = Recurrent().eval()
    batches = [torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    sim = QuantizationSimModel(model, batches[0], default_param_bw=3, default_output_bw=16)
    report = aimet_ext.apply_gptq(sim, batches, progress=False)
    assert report.skipped == {}
    states = {"states.weight_ih_l0", "states.weight_hh_l0"}
    assert {layer.name for layer in report.layers} == {"up", *states, "head"}
    weight, own = sim.model.states.weight_hh_l0, sim.model.states.param_quantizers["weight_hh_l0"]
    decided = weight.detach().clone()
    codes = sim.model.up.weight.detach().unique().numel()
    learnt = aimet_ext.apply_dwq(sim, batches, reference=model, progress=False)
    assert learnt.after.kl < learnt.before.kl
    assert (
        list(learnt.skipped) == ["states"] and "layer-wise techniques" in learnt.skipped["states"]
    )
    assert torch.equal(weight, decided) and torch.equal(own(weight), decided)
    assert sim.model.up.weight.detach().unique().numel() == codes
