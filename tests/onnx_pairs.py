"""One float model as a PyTorch and as an ONNX simulation, with data for both."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import onnx_models
import torch
from layerwise_reference import IMAGES, Net, random, seeded
from torch import Tensor, nn

import aimet_ext
from aimet_ext.sim.protocol import adapt
from aimet_ext.specs import LPBQ, Blockwise, PerTensor, QSpec

__all__ = ["GRIDS", "MLP", "PAIRS", "Pair", "encodings", "onnx_sim", "outputs", "state_of"]

GRIDS = {
    "channel": QSpec(bitwidth=4),
    "channel-asymmetric": QSpec(bitwidth=3, symmetric=False),
    "tensor": QSpec(bitwidth=8, granularity=PerTensor()),
    "blocks": QSpec(bitwidth=4, symmetric=False, granularity=Blockwise(16)),
    "LPBQ": QSpec(bitwidth=4, granularity=LPBQ(16)),
}
MLP = (16, 32, 32, 8)


def onnx_sim(model: Any, spec: Any, activations: QSpec | None = None, feed: Any = None) -> Any:
    from onnx_sims import build_sim

    return build_sim(model, spec, activations, dummy_input=feed)


def torch_sim(module: nn.Module, sample: Any, specs: dict[str, QSpec]) -> Any:
    from aimet_ext.sim.torch.setup import build_sim

    return build_sim(copy.deepcopy(module), sample, specs, None, "htp_v79")


def digest(array: Any) -> str:
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def encodings(quantizer: Any) -> Any:
    found = quantizer.get_encodings()
    return found and [(e.min, e.max, e.delta, e.offset, e.bw) for e in found]


def state_of(sim: Any) -> dict[str, Any]:
    """Everything of an ONNX sim that a failed call must leave as it was."""
    graph = adapt(sim).graph
    state: dict[str, Any] = {name: digest(graph.array(name)) for name in graph.initializers}
    for name, q in sim.qc_quantize_op_dict.items():
        info = q.quant_info
        state[f"quantizer {name}"] = (
            (q.enabled, q.bitwidth, q.use_symmetric_encodings, str(q.op_mode)),
            (q.is_encoding_frozen(), q.is_initialized(), encodings(q)),
            (info.usePerChannelMode, info.blockSize, str(q._scale_quantizer)),
        )
    ledger = getattr(sim, "aimet_ext_ledger", None)
    state["ledger"] = ledger and (len(ledger.entries), len(ledger.runs), id(ledger))
    return state


def outputs(sim: Any, batches: Any) -> list[Any]:
    feeds = ({key: value.numpy() for key, value in batch.items()} for batch in batches)
    return [torch.from_numpy(sim.session.run(None, feed)[0]) for feed in feeds]


class Pair:
    """The same float model as a PyTorch and as an ONNX simulation, and data for both."""

    def __init__(self, module: nn.Module, model: Any, batches: Any, feed: Any = None) -> None:
        self.module, self.model, self.batches = module, model, batches
        self.feed = feed or (lambda batch: {key: value.numpy() for key, value in batch.items()})
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        self.layers = [name for name, p in module.named_modules() if isinstance(p, kinds)]
        self._names: dict[str, str] | None = None

    def sims(self, spec: QSpec) -> tuple[Any, Any]:
        sample = tuple(self.batches[0].values())
        theirs = torch_sim(self.module, sample, dict.fromkeys(self.layers, spec))
        feed = self.feed(self.batches[0])  # AIMET's own has no token that counts
        names = self._names or self.names(onnx_sim(self.model, {}, feed=feed))
        return theirs, onnx_sim(self.model, dict.fromkeys(names.values(), spec), feed=feed)

    def names(self, sim: Any) -> dict[str, str]:
        """Node by module: the one with the module's weight, the same in every simulation."""
        if self._names is not None:
            return self._names
        every = adapt(sim).model
        shells = {n: m for n, m in every.named_modules() if getattr(m, "weight", None) is not None}
        found = {}
        for name in self.layers:
            own = self.module.get_submodule(name).weight
            fitting = [n for n, m in shells.items() if torch.equal(m.weight, own)]
            assert len(fitting) == 1, (name, fitting)
            found[name] = fitting[0]
        self._names = found
        return found

    def arguments(self) -> tuple[Any, Any]:
        """The batches for the one and for the other."""
        theirs = [tuple(batch.values()) for batch in self.batches]
        return theirs, [self.feed(batch) for batch in self.batches]


def language_model(family: str, **changes: Any) -> Pair:
    exported = onnx_models.exported_llama(family=family, layers=1, **changes)
    return Pair(exported.module, exported.model, sentences())


def as_genai_builds_it(family: str) -> Pair:
    """The operators of onnxruntime-genai: attention in one node, caches of length 0."""
    model, module = onnx_models.genai_llama(family=family, num_hidden_layers=1)
    feed = functools.partial(genai_feed, model)
    return Pair(aimet_ext.prepare_model(module).eval(), model, sentences(), feed)


def genai_feed(model: Any, batch: Any) -> dict[str, Any]:
    return onnx_models.genai_inputs(model, batch["input_ids"], batch["attention_mask"])


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for batch, seq in ((4, 24), (3, 16)):
        ids = torch.randint(3, 128, (batch, seq), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, seq // 2 :] = 0  # padding counts nowhere
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def network(module: nn.Module, *inputs: Tensor) -> Pair:
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    model = onnx_models.exported_module(module, (inputs[0],), ["x"], ["y"], axes)
    return Pair(module, model, [{"x": x} for x in inputs])


class Upsampling(nn.Module):
    """Pictures that get larger, by transposed convolutions with all that these can have."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, (4, 3), stride=2, padding=1)
        self.again = nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1)
        self.wide = nn.ConvTranspose2d(6, 4, 3, dilation=2, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.enter(x).relu()).relu()
        again, wide = self.again(x).mean((2, 3)), self.wide(x).mean((2, 3))
        return self.head(again) + wide


def perceptron() -> Pair:
    def build() -> nn.Module:
        parts = [(nn.Linear(*widths), nn.ReLU()) for widths in itertools.pairwise(MLP)]
        return nn.Sequential(*[*itertools.chain.from_iterable(parts)][:-1])

    mixed = random(96, MLP[0]) @ random(MLP[0], MLP[0], seed=1)
    return network(seeded(build), mixed[:64], mixed[64:])


#: Each is built once; simulations are made of copies.
PAIRS: dict[str, Callable[[], Pair]] = {
    "llama": functools.cache(lambda: language_model("llama")),
    "qwen2": functools.cache(lambda: language_model("qwen2")),
    "genai": functools.cache(lambda: as_genai_builds_it("qwen2")),
    "convolutions": functools.cache(lambda: network(seeded(Net), *IMAGES)),
    "upsampling": functools.cache(lambda: network(seeded(Upsampling), *IMAGES)),
    "perceptron": functools.cache(perceptron),
}
