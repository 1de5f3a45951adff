"""Walking a traced model: every layer's input as in the whole model, and little kept between."""

import copy
import logging

import pytest
import torch
import walk_reference
from torch import nn
from torch.nn import functional

from aimet_ext.walk.trace import NotTraceable
from aimet_ext.walk.traced import GraphWalk, walk_graph
from aimet_ext.walk.walk import RerunWalk

IMAGE = (3, 8, 8)


@pytest.fixture
def net():
    return walk_reference.tiny_net()


def images(count=2, size=3, shape=IMAGE):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=generator).double() for _ in range(count)]


def walk_through(walk, model):
    """Decide every layer as its own weight, and return the stages."""
    stages = []
    for stage in walk.stages():
        stages.append(stage)
        for layer in stage.layers:
            walk.decide(layer, model.get_submodule(layer).weight)
    walk.close()
    return stages


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
@pytest.mark.parametrize("streams", ["quantized", "float", "both"])
def test_inputs_are_those_of_the_whole_model(net, walk_class, streams):
    """With the weights decided so far in one stream and the original ones in the other."""
    batches, original = images(), copy.deepcopy(net)
    layers = [name for name in walk_reference.layer_names(net) if name != "blocks.0.conv2"]
    fixed = {"blocks.0.conv2": net.blocks[0].conv2.weight.detach() * 0.5}
    decided = dict(fixed)
    walk = walk_class(net, batches, layers, streams=streams, effective=fixed)
    order = []
    for stage in walk.stages():
        order += stage.layers
        for layer in stage.layers:
            for _ in range(2):  # as often as one likes
                inputs = list(stage.batches())
                assert len(inputs) == len(batches)
                for batch, (quantized, original_input, mask) in zip(batches, inputs, strict=True):
                    assert mask is None
                    for found, weights in ((quantized, decided), (original_input, {})):
                        if found is not None:
                            expected = walk_reference.layer_input(original, layer, batch, weights)
                            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
                    assert (quantized is None) == (streams == "float")
                    assert (original_input is None) == (streams == "quantized")
        for layer in stage.layers:
            weight = net.get_submodule(layer).weight
            decided[layer] = torch.round(weight.detach() * 4) / 4
            walk.hold(layer)
            weight.data.mul_(-3)  # a simulation may write what it decided, or anything else
            walk.decide(layer, decided[layer])
    assert sorted(order) == sorted(layers)
    walk.close()


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
def test_stages_and_activations(net, walk_class):
    """Branches of one geometry share a stage; ReLUs count only if they alone read the output."""
    stages = walk_through(walk_class(net, images(1), walk_reference.layer_names(net)), net)
    assert [stage.layers for stage in stages] == [
        ("stem",),
        ("blocks.0.conv1",),
        ("blocks.0.conv2",),
        ("blocks.1.conv1",),
        ("blocks.1.conv2",),
        ("blocks.2.conv1",),
        ("blocks.2.conv2",),
        ("blocks.2.shortcut",),
        ("left", "right"),
        ("depthwise",),
        ("head",),
    ]
    found = {name: relu for stage in stages for name, relu in stage.activations.items()}
    relus = {"stem", "blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1"}
    assert found == {
        **dict.fromkeys(relus, functional.relu),
        "depthwise": functional.relu6,
    }


class Branch(nn.Module):
    """``kind`` says what reads the first layer's output beside a ReLU."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        z = self.relu(y)
        if self.kind == "residual":
            z = z + y
        if self.kind == "shape":
            z = z.view(y.shape[0], y.size(1))
        if self.kind == "returned":
            return self.last(z), y
        return self.last(z)


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
@pytest.mark.parametrize(("kind", "alone"), [("", 1), ("shape", 1), ("residual", 0)])
def test_a_relu_must_be_the_only_reader(walk_class, kind, alone):
    """Of values; reading a shape does no harm."""
    model = Branch(kind).eval()
    first, _ = walk_through(walk_class(model, [torch.randn(2, 4)], ["first", "last"]), model)
    assert list(first.activations) == ["first"] * alone


def test_a_returned_value_has_a_second_reader():
    """The graph knows what the model returns."""
    model = Branch("returned").eval()
    first, _ = walk_through(GraphWalk(model, [torch.randn(2, 4)], ["first", "last"]), model)
    assert not first.activations


class Chain(nn.Sequential):
    """Linear layers one after the other, ``depth`` of them."""

    def __init__(self, depth, width=16):
        super().__init__(*(nn.Linear(width, width) for _ in range(depth)))


def test_only_the_frontier_is_kept():
    """However deep the model: one layer's input, for all batches, and twice that for a batch."""
    peaks = {}
    for depth in (3, 12):
        model, batches = Chain(depth).eval(), [torch.randn(8, 16) for _ in range(10)]
        walk = GraphWalk(model, batches, [str(number) for number in range(depth)])
        walk_through(walk, model)
        peaks[depth] = walk.cost
    one = 8 * 16 * 4
    assert peaks[12] == {"walk": "graph", "segments": 12, "peak_cached_bytes": 10 * one}
    assert peaks[3]["peak_cached_bytes"] == 10 * one


def test_both_streams_are_one_until_a_weight_changes():
    """A second copy is kept from the first decided layer on."""
    model, batches = Chain(3).eval(), [torch.randn(8, 16)]
    walk = GraphWalk(model, batches, ["1", "2"], streams="both")
    bytes_kept = []
    for stage in walk.stages():
        bytes_kept.append(walk.cost["peak_cached_bytes"])
        for layer in stage.layers:
            walk.decide(layer, model[int(layer)].weight)
    assert bytes_kept == [8 * 16 * 4, 2 * 8 * 16 * 4]


def test_cache_dir_holds_the_values_and_is_left_empty(net, tmp_path):
    """The same values as in memory, bit for bit; batches of a generator are there too."""
    layers = walk_reference.layer_names(net)
    on_disk = GraphWalk(net, iter(images()), layers, streams="both", cache_dir=tmp_path)
    in_memory = GraphWalk(net, images(), layers, streams="both")
    for one, other in zip(on_disk.stages(), in_memory.stages(), strict=True):
        assert any(tmp_path.rglob("*.safetensors"))
        for mine, theirs in zip(one.batches(), other.batches(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine[:2], theirs[:2], strict=True))
        for layer in one.layers:
            weight = net.get_submodule(layer).weight * 0.9
            on_disk.decide(layer, weight)
            in_memory.decide(layer, weight)
    assert on_disk.cost == in_memory.cost
    on_disk.close()
    assert not list(tmp_path.iterdir())


class InPlace(nn.Module):
    """Changes values that an earlier layer has read and that are read again later."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.same = nn.Identity()
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        again = self.same(y)
        z = self.second(y)
        functional.relu_(y)  # its result is not used, its effect is
        z += self.third(y)
        return z + again


def test_in_place_changes_reach_what_is_read_later():
    """Across stages: ``again`` is one tensor with ``y``; second and third read two values."""
    model, batch = InPlace().double().eval(), torch.randn(5, 4, dtype=torch.double)
    layers = ["first", "second", "third"]
    walk = GraphWalk(model, [batch], layers)
    stages = []
    for stage in walk.stages():
        stages.append(stage.layers)
        found = next(stage.batches())[0]
        expected = walk_reference.layer_input(model, stage.layers[0], batch, {})
        torch.testing.assert_close(found, expected)
        for layer in stage.layers:
            walk.decide(layer, model.get_submodule(layer).weight)
    assert stages == [("first",), ("second",), ("third",)]


class Options(nn.Module):
    """Positional and keyword arguments, some of them no tensors, nested outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, *, flip=False):
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        if flip:
            x = x.flip(1)
        return {"logits": self.last(self.layer(x)), "parts": x.split(2, -1)}


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
def test_keyword_arguments_masks_and_other_modules(walk_class):
    """Tokens that are masked are marked; a weight may be fixed for an embedding as well."""
    model = Options().eval()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    ids = torch.randint(0, 7, (2, 5))
    table = torch.randn(7, 4)
    batches = [{"input_ids": ids, "attention_mask": mask, "flip": True}] * 2
    walk = walk_class(model, batches, ["layer"], streams="both", effective={"embed": table})
    stage = next(walk.stages())
    for quantized, original, found in stage.batches():
        assert torch.equal(found, mask.bool())
        torch.testing.assert_close(quantized, (table[ids] * mask[..., None]).flip(1))
        torch.testing.assert_close(original, (model.embed(ids) * mask[..., None]).flip(1))


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
def test_a_batch_norm_must_be_folded(walk_class):
    """Where it could be: it alone reads a convolution's output."""
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    batches = [torch.randn(2, *IMAGE)]
    with pytest.raises(ValueError, match=r"after layer '0' must be folded.*fold_all_batch_norms"):
        walk_class(model, batches, ["0", "3"])
    assert walk_class(model, batches, ["3"]).layers == ("3",)
    model[1] = nn.Identity()
    (first, _) = walk_through(walk_class(model, batches, ["0", "3"]), model)
    assert first.activations == {"0": functional.relu}


class Twice(nn.Module):
    """Calls one layer twice and another one never."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        return self.other(self.layer(self.layer(x)))


def test_a_layer_that_is_called_twice_is_none_for_the_graph():
    model, batches = Twice().eval(), [torch.randn(2, 4)]
    with pytest.raises(ValueError, match="once in a forward pass, 'layer' is called again"):
        GraphWalk(model, batches, ["layer"])
    walk = walk_graph(model, batches, ["layer", "other"])
    assert isinstance(walk, RerunWalk) and "'layer' is called again" in walk.cost["reason"]


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
def test_layers_that_cannot_be_walked_to_are_named(walk_class):
    """Never called, not there, of another kind, without a weight, named twice."""
    model, batches = Twice().eval(), [torch.randn(2, 4)]
    for layers, message in [
        (["other", "spare"], "never received data: spare;"),
        (["missing"], "layers must name modules of Twice, got 'missing'"),
        ([""], "with a weight, '' .Twice. has none"),
        (["other", "other"], "each module once, 'other'"),
    ]:
        with pytest.raises(ValueError, match=message):
            walk_class(model, batches, layers)
    with pytest.raises(ValueError, match="effective must name modules of Twice, got 'no'"):
        walk_class(model, batches, ["other"], effective={"no": torch.ones(1)})
    with pytest.raises(TypeError, match=r"layer '0': .*LayerNorm"):
        walk_class(nn.Sequential(nn.LayerNorm(4)).eval(), batches, ["0"])
    with pytest.raises(ValueError, match="at least one batch, got none"):
        walk_class(model, iter([]), ["other"])
    with pytest.raises(ValueError, match="evaluation mode, Twice is in training mode"):
        walk_class(Twice(), batches, ["other"])


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
def test_mistakes_of_the_caller(walk_class):
    """A wrong shape or name, a stage read too late, a layer left undecided."""
    model, batches = Chain(2).eval(), [torch.randn(2, 16)] * 2
    walk = walk_class(model, batches, ["0", "1"])
    stages = walk.stages()
    first = next(stages)
    with pytest.raises(ValueError, match=r"'0' must be of shape \[16, 16\], got \[3\]"):
        walk.decide("0", torch.ones(3))
    with pytest.raises(ValueError, match="one of the 2 walked to, got '2'"):
        walk.decide("2", torch.ones(3))
    with pytest.raises(ValueError, match="one of the 2 walked to, got '2'"):
        walk_class(model, batches, ["0", "1"], streams="float").hold("2")
    with pytest.raises(AssertionError, match=r"'0'.* must be decided first"):
        next(stages)
    walk = walk_class(model, batches, ["0", "1"])
    stages = walk.stages()
    first = next(stages)
    late = first.batches()
    next(late)
    walk.decide("0", model[0].weight)
    next(stages)
    for batches in (late, first.batches()):
        with pytest.raises(RuntimeError, match="stage of 0 is over"):
            next(batches)


class Even(nn.Module):
    """Control flow on data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x if x.sum() > 0 else -x)


class Unnoticed(nn.Module):
    """Tracing sees one side of this, and nothing fails."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x * 2 if isinstance(x, torch.Tensor) else x)


@pytest.mark.parametrize("model", [Even(), Unnoticed()])
def test_models_that_cannot_be_traced_run_again(model, caplog):
    """Which is said once in the log, and in the cost. A graph that is wrong is found out."""
    model.eval()
    batches = [-torch.ones(2, 4)]
    with pytest.raises(NotTraceable):
        GraphWalk(model, batches, ["layer"])
    with caplog.at_level(logging.WARNING):
        walk = walk_graph(model, iter(batches), ["layer"])
    assert isinstance(walk, RerunWalk)
    (record,) = caplog.records
    assert "cannot be traced" in record.getMessage()
    stage = next(walk.stages())
    expected = walk_reference.layer_input(model, "layer", batches[0], {})
    torch.testing.assert_close(next(stage.batches())[0], expected)
    assert walk.cost["walk"] == "rerun"
    assert walk.cost["reason"] in record.getMessage()


def test_the_graph_where_it_can_be_had():
    """A forward_fn is the user's own, so its model runs again; batches of several kinds do too."""
    model, batch = Chain(1).eval(), torch.randn(2, 16)
    assert isinstance(walk_graph(model, [batch], ["0"]), GraphWalk)
    assert isinstance(walk_graph(model, [batch, (batch,)], ["0"]), RerunWalk)
    walk = walk_graph(model, [batch], ["0"], forward_fn=lambda model, batch: model(batch + 1))
    stage = next(walk.stages())
    torch.testing.assert_close(next(stage.batches())[0], batch + 1)


def test_what_the_model_itself_raises_is_reported():
    """An error of the data, not of the walk."""
    for build in (GraphWalk, RerunWalk, walk_graph):
        with pytest.raises(RuntimeError, match="the model's forward pass failed on batch 0"):
            build(Chain(1).eval(), [torch.randn(2, 3)], ["0"])


def test_weights_are_asked_for_when_they_are_reached():
    """And only once, since computing them may cost a lot of memory."""
    asked = []

    class Weights(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    model = Chain(4).eval()
    fixed = Weights({"0": model[0].weight, "2": model[2].weight})
    walk = GraphWalk(model, [torch.randn(2, 16)], ["1", "3"], effective=fixed)
    seen = []
    for stage in walk.stages():
        seen.append(list(asked))
        walk.decide(stage.layers[0], model[int(stage.layers[0])].weight)
    assert seen == [["0"], ["0", "2"]]


@pytest.mark.parametrize("walk_class", [GraphWalk, RerunWalk])
@pytest.mark.parametrize("config", ["default", "htp_v79"])
def test_a_simulation_with_its_quantizers_off(net, walk_class, config):
    """AIMET's modules are leaves; inputs and ReLUs are those of the float model."""
    aimet_nn = pytest.importorskip("aimet_torch.nn")
    aimet_nn.QuantizationMixin.ignore(walk_reference.PadShortcut)
    from aimet_ext.sim.torch.adaptor import TorchSim
    from aimet_ext.sim.torch.setup import build_sim
    from aimet_ext.specs import PerChannel, QSpec

    net, layers = net.float(), walk_reference.layer_names(net)
    batches = [batch.float() for batch in images()]
    weight, activation = (
        QSpec(bitwidth=4, granularity=PerChannel()),
        QSpec(bitwidth=8, symmetric=False),
    )
    sim = build_sim(net, batches[0], dict.fromkeys(layers, weight), activation, config)
    adaptor, plain = TorchSim(sim), walk_through(walk_class(net, batches, layers), net)
    decided = {}
    with adaptor.disabled_quantizers():
        leaves = {"leaves": sim.qmodules()} if walk_class is GraphWalk else {}
        walk = walk_class(sim.model, batches, layers, streams="both", **leaves)
    stages = walk.stages()
    for expected in plain:
        with adaptor.disabled_quantizers():
            stage = next(stages)
            quantized, original, _ = next(stage.batches())
        assert stage.layers == expected.layers
        assert stage.activations == expected.activations
        for found, weights in ((quantized, decided), (original, {})):
            wanted = walk_reference.layer_input(net, stage.layers[0], batches[0], weights)
            torch.testing.assert_close(found, wanted)
        for layer in stage.layers:
            decided[layer] = net.get_submodule(layer).weight.detach() * 0.9
            walk.decide(layer, decided[layer])
    assert next(stages, None) is None
