"""Models that run their blocks again: layers are decided on the inputs of all their calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aimet_ext

pytest.importorskip("aimet_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated

CALLS, WIDTH = 3, 12
MIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) * 0.3


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Looped(nn.Module):
    """Two blocks, run one after the other, three times over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Feed() for _ in range(2))
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(CALLS):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


class Around(nn.Module):
    """Blocks in sequence, and one layer that is called before and behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Feed() for _ in range(2))
        self.side = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.side(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.side(x))


def data(*seeds: int) -> list[Tensor]:
    """Sequences whose tokens resemble each other, ``[batch, seq, width]`` each."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.randn(4, 10, WIDTH, generator=g).cumsum(1) @ MIX / 2 for g in generators]


DATA, HELD_OUT = data(*range(6)), data(*range(100, 104))


@torch.no_grad()
def error(sim: Any, model: nn.Module) -> float:
    return float(sum((sim.model(x) - model(x)).square().sum() for x in HELD_OUT))


def simulated(model: nn.Module) -> Any:
    return aimet_ext.create_sim(model, DATA[0], activations=None)


@pytest.mark.parametrize(("model", "repeated"), [(Looped(), "up"), (Around(), "side")])
@pytest.mark.parametrize("name", ["gptq", "seq_mse", "adaround"])
def test_layers_are_decided_on_the_inputs_of_all_calls(
    model: nn.Module, repeated: str, name: str
) -> None:
    """The tokens of all calls count, and the model comes closer to float than rounding does."""
    sim = simulated(model.eval())
    plain = error(sim, model)
    settings = {"num_iterations": 50} if name == "adaround" else {}
    report = getattr(aimet_ext, f"apply_{name}")(sim, DATA, progress=False, **settings)
    tokens = sum(x[..., 0].numel() for x in DATA)
    calls = CALLS if isinstance(model, Looped) else 2
    for layer in report.layers:
        again = repeated in layer.name or (calls == CALLS and "blocks" in layer.name)
        assert layer.tokens == (calls if again else 1) * tokens
    assert not report.skipped and report.cost["walk"] == "rerun"
    assert error(sim, model) < plain


class TwiceRecurrent(nn.Module):
    """An LSTM that reads its own output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reader = Last(nn.LSTM(WIDTH, WIDTH, batch_first=True))
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reader(self.reader(x)))


class Last(nn.Module):
    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def test_a_recurrent_layer_may_be_called_again() -> None:
    model = TwiceRecurrent().eval()
    sim = simulated(model)
    plain = error(sim, model)
    report = aimet_ext.apply_gptq(sim, DATA, progress=False)
    tokens = sum(x[..., 0].numel() for x in DATA)
    assert [layer.tokens for layer in report.layers] == [2 * tokens, 2 * tokens, tokens]
    assert error(sim, model) < plain


class Longer(nn.Module):
    """Calls a layer twice, and once more if what its first layer returns is not as it was."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again = nn.Linear(WIDTH, WIDTH, bias=False), Feed()
        self.register_buffer("original", self.first.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        changed = (y - x @ self.original.T).abs().max() > 1e-4 * y.abs().max()
        for _ in range(2 + int(changed)):
            y = self.again(y)
        return y


def test_calls_without_a_partner_are_in_the_report() -> None:
    """The quantized model calls it thrice, the float one twice: the third call is left out."""
    sim = simulated(Longer().eval())
    report = aimet_ext.apply_gptq(sim, DATA, inp_symmetry="asym", progress=False)
    tokens = {layer.name: layer.tokens for layer in report.layers}
    assert tokens["again.up"] == 2 * tokens["first"]
    left_out = {"again.up": len(DATA), "again.down": len(DATA)}
    assert report.cost["calls_left_out"] == left_out
    for name, calls in left_out.items():
        said = f"without {calls} that one of them has more: {name}"
        assert any(said in note for note in report.notes) and said in str(report)


def test_weights_of_tokens_count_alike_there() -> None:
    """Only those of layers that are called once are weighted by the loss."""
    model = Looped().eval()
    sims = [simulated(model) for _ in range(2)]
    for sim, weights in zip(sims, ("none", "loss"), strict=True):
        aimet_ext.apply_gptq(sim, DATA, token_weights=weights, progress=False)
    ours, theirs = (dict(sim.model.named_parameters()) for sim in sims)
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert "blocks.0.up.weight" in same and "head.weight" not in same


@pytest.mark.parametrize("name", ["omniquant", "awq", "smoothquant", "autoround"])
def test_block_wise_techniques_say_what_to_take_instead(name: str) -> None:
    sim = simulated(Looped().eval())
    before = {key: value.clone() for key, value in sim.model.named_parameters()}
    message = r"once each and in order, but blocks\.0 follows blocks\.1; take a layer-wise"
    with pytest.raises(ValueError, match=message):
        getattr(aimet_ext, f"apply_{name}")(sim, DATA, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in sim.model.named_parameters())


def test_the_export_is_read_back_bit_by_bit(tmp_path: Any) -> None:
    model = Looped().eval()
    sim = aimet_ext.create_sim(model, DATA[0], activations=16)
    aimet_ext.apply_gptq(sim, DATA, progress=False)
    sim.compute_encodings(lambda module: [module(x) for x in DATA])
    aimet_ext.export(sim, tmp_path / "out", "model", DATA[0], progress=False)
    again = aimet_ext.load(tmp_path / "out", sim=simulated(model), progress=False)
    with torch.no_grad():
        assert torch.equal(again.model(HELD_OUT[0]), sim.model(HELD_OUT[0]))
