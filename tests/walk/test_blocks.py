"""Walking block by block: each layer's input as in the whole model, and nothing left behind."""

import copy
from contextlib import suppress

import block_reference
import pytest
import torch
from block_reference import Experts, Plain
from torch import nn
from torch.nn import functional

from aimet_ext.data.cache import TensorCache
from aimet_ext.walk.blocks import BlockWalk, find_stack
from aimet_ext.walk.streamed import StreamedBlock

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48, "activation_function": "relu"},
}
MODELS = (*FAMILIES, "plain", "experts")


@pytest.fixture
def build(tiny_model):
    """``build(name)``: a model in float64, and two batches of different shapes for it."""

    def make(name, **changes):
        if name in FAMILIES:
            model = tiny_model(name, **{**FAMILIES[name], **changes}).double()
            generator = torch.Generator().manual_seed(1)
            ids = [torch.randint(3, 128, shape, generator=generator) for shape in [(3, 7), (2, 5)]]
            return model, [{"input_ids": batch, "use_cache": False} for batch in ids]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            model = (Plain if name == "plain" else Experts)(**changes).double().eval()
        return model, block_reference.plain_batches(5 if name == "plain" else 8)

    return make


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def walk_of(model, batches, layers=None, **options):
    layers = linears(model) if layers is None else layers
    return BlockWalk(model, find_stack(model, layers), batches, layers, **options)


def rounded(weight):
    return torch.round(weight.detach() * 8) / 8


def go_through(walk, model):
    """Decide every layer as its own weight; the stages, and the inputs of each."""
    stages, inputs = [], []
    for stage in walk.stages():
        stages.append(stage)
        inputs.append(list(stage.batches()))
        for layer in stage.layers:
            walk.decide(layer, rounded(model.get_submodule(layer).weight))
    walk.close()
    return stages, inputs


def check_walk(model, batches, layers, *, streams, effective=(), **options):
    """Every input of a walk against runs of the whole model; which layers were walked to."""
    original = copy.deepcopy(model)
    effective = {name: original.get_submodule(name).weight.detach() * 0.7 for name in effective}
    decided, order = dict(effective), []
    walk = walk_of(model, batches, layers, streams=streams, effective=effective, **options)
    plain = [block_reference.layer_inputs(original, batch, {}) for batch in batches]
    for stage in walk.stages():
        order += stage.layers
        found = list(stage.batches())
        assert len(found) == len(batches)
        for number, batch in enumerate(batches):
            quantized, float_, _ = found[number]
            assert (quantized is None) == (streams == "float")
            assert (float_ is None) == (streams == "quantized")
            for layer in stage.layers:
                if quantized is not None:
                    expected = block_reference.layer_inputs(original, batch, decided).get(layer)
                    check_input(quantized, expected)
                if float_ is not None:
                    check_input(float_, plain[number].get(layer))
        for layer in stage.layers:
            weight = model.get_submodule(layer).weight
            decided[layer] = rounded(weight)
            walk.hold(layer)
            weight.data.mul_(-3)  # a simulation may write what it decided, or anything else
            walk.decide(layer, decided[layer])
    walk.close()
    return order


def check_input(found, expected):
    if expected is None:  # an expert that no token is routed to
        assert found.shape[0] == 0 and found.dim() == 2
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- what reaches the layers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        (n, s)
        for n in MODELS
        for s in ("quantized", "float", "both")
        if (n, s) != ("experts", "both")
    ],
)
def test_inputs_are_those_of_the_whole_model(build, name, streams):
    """With the weights decided so far in one stream and the original ones in the other.

    Not both for experts: they get other tokens when the router sees other values.
    """
    model, batches = build(name)
    layers = linears(model)
    inside = [layer for layer in layers if ".1." in layer]
    others = [inside[1], *(n for n, m in model.named_modules() if isinstance(m, nn.Embedding))]
    if name == "opt":
        others = others[:2]  # positions have an embedding of their own kind
    wanted = [layer for layer in layers if layer not in others]
    order = check_walk(model, batches, wanted, streams=streams, effective=others)
    assert sorted(order) == sorted(wanted)


def test_experts_are_found_in_later_batches(build):
    """Batches of one token reach one expert each; together they reach all."""
    model, batches = build("experts", experts=2)
    tokens = [row.view(1, 1, -1) for batch in batches for row in batch.flatten(0, 1)]
    walk = walk_of(model, tokens)
    stages, inputs = go_through(walk, model)
    assert sorted(n for s in stages for n in s.layers) == sorted(linears(model))
    for stage, found in zip(stages, inputs, strict=True):
        reached = sum(quantized.shape[0] for quantized, _, _ in found)
        assert 0 < reached < len(tokens) if "expert" in stage.layers[0] else reached == len(tokens)


ATTENTION = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
STAGES = {
    "llama": [*ATTENTION, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "qwen2": [*ATTENTION, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "phi3": [
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ],
    "gpt_neox": [
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
    "opt": [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ],
    "plain": [
        ("mixer.left", "mixer.right"),
        ("mixer.out",),
        ("feed.up",),
        ("feed.down",),
        ("feed.last",),
    ],
}
AROUND = {
    "opt": ([("model.decoder.project_in",)], [("model.decoder.project_out",), ("lm_head",)]),
    "plain": ([("stem",), ("gain",)], [("side", "neck"), ("head",)]),
}


@pytest.mark.parametrize("name", list(STAGES))
def test_layers_that_read_one_input_share_a_stage(build, name):
    """In the order of their calls; before the blocks, in them, after them."""
    model, batches = build(name)
    layers = linears(model)
    stages, _ = go_through(walk_of(model, batches), model)
    before, after = AROUND.get(name, ([], [(layers[-1],)]))
    inside = [
        tuple(sorted(f"{block}.{layer}" for layer in names))
        for block in find_stack(model, layers)
        for names in STAGES[name]
    ]
    expected = [*before, *inside, *(tuple(sorted(names)) for names in after)]
    assert [tuple(sorted(stage.layers)) for stage in stages] == expected


def test_relus_are_found_where_they_alone_read_the_output(build):
    for name, expected in (
        ("llama", set()),
        ("opt", {"model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"}),
        ("plain", {"neck", *(f"blocks.{number}.feed.up" for number in range(3))}),
    ):
        model, batches = build(name)
        stages, _ = go_through(walk_of(model, batches), model)
        found = {layer: relu for stage in stages for layer, relu in stage.activations.items()}
        assert found == dict.fromkeys(expected, functional.relu)


def test_masks_of_the_batch_reach_every_layer(build):
    """As the batch gives them, also where a layer reads flattened tokens."""
    model, batches = build("plain")
    masks = [torch.ones(batch.shape[:2], dtype=torch.long) for batch in batches]
    masks[0][0, :2] = 0
    masks[1][1, 3:] = 0
    given = [{"x": x, "attention_mask": m} for x, m in zip(batches, masks, strict=True)]
    stages, inputs = go_through(walk_of(model, given), model)
    for stage, found in zip(stages, inputs, strict=True):
        for (quantized, _, mask), expected in zip(found, masks, strict=True):
            flat = quantized.dim() == 2
            assert flat == (".feed." in stage.layers[0])
            assert torch.equal(mask, (expected.flatten() if flat else expected).bool())


def test_a_forward_fn_calls_the_model(build):
    model, batches = build("llama")
    wrapped = [{"batch": batch} for batch in batches]
    walk = walk_of(model, wrapped, forward_fn=lambda model, batch: model(**batch["batch"]))
    _, inputs = go_through(walk, model)
    _, expected = go_through(walk_of(model, batches), model)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=0)


def test_tied_weights_are_swapped_apart(build):
    """The head's grid is none of the embedding's business, and the other way round."""
    model, batches = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fixed = {"lm_head": model.lm_head.weight.detach() * 0}
    layers = [name for name in linears(model) if name != "lm_head"]
    parameter = model.lm_head.weight
    _, expected = go_through(walk_of(model, batches, layers), model)
    _, inputs = go_through(walk_of(model, batches, layers, effective=fixed), model)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=0)
    assert model.lm_head.weight is parameter is model.model.embed_tokens.weight


# ---- caches, and what they cost ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "plain", "experts"])
def test_finished_parts_give_what_running_them_gives(build, name, monkeypatch):
    """Bit for bit, with fewer calls of their layers; and so do files in place of RAM."""
    model, batches = build(name)
    streams = "quantized" if name == "experts" else "both"
    calls = []
    counted = find_stack(model, linears(model))[0]
    first = {"llama": "self_attn.q_proj", "plain": "feed.up", "experts": "router"}[name]
    model.get_submodule(f"{counted}.{first}").register_forward_hook(lambda *a: calls.append(1))

    def inputs():
        calls.clear()
        _, found = go_through(walk_of(model, batches, streams=streams), model)
        return found, len(calls)

    kept, fewer = inputs()
    monkeypatch.setattr(StreamedBlock, "_to_keep", lambda *_: None)
    run_again, more = inputs()
    torch.testing.assert_close(kept, run_again, rtol=0, atol=0)
    assert fewer < more if name != "experts" else fewer == more


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_cache_dir_holds_the_values_and_is_left_empty(build, name, tmp_path):
    model, batches = build(name)
    on_disk = walk_of(model, batches, streams="both", cache_dir=tmp_path)
    in_memory = walk_of(model, batches, streams="both")
    for one, other in zip(on_disk.stages(), in_memory.stages(), strict=True):
        assert one.layers == other.layers
        torch.testing.assert_close(list(one.batches()), list(other.batches()), rtol=0, atol=0)
        for walk in (on_disk, in_memory):
            for layer in one.layers:
                walk.decide(layer, rounded(model.get_submodule(layer).weight))
        files = list(tmp_path.rglob("*.safetensors"))
    assert files
    assert on_disk.cost == in_memory.cost
    on_disk.close()
    assert not list(tmp_path.iterdir())


def calls_of(build, depth, streams="quantized"):
    """Calls of blocks that walks to all layers take, as reported and as counted."""
    calls = []
    model, batches = build("llama", num_hidden_layers=depth)
    layers = [name for name in linears(model) if name != "lm_head"]
    walk = walk_of(model, batches, layers, streams=streams)
    for block in walk.blocks:
        model.get_submodule(block).register_forward_pre_hook(lambda *a: calls.append(1))
    go_through(walk, model)
    assert walk.cost.keys() == {"walk", "blocks", "block_calls"}
    assert (walk.cost["walk"], walk.cost["blocks"]) == ("blocks", depth)
    return walk.cost["block_calls"], len(calls), len(batches)


def test_cost_is_linear_in_the_blocks(build):
    """A call of a block for each of its stages and one to move on; two more to look at it."""
    for depth in (2, 4, 8):
        reported, counted, batches = calls_of(build, depth)
        captured = last = batches  # nothing is asked for after the last block
        assert reported == 10 * depth - last
        assert counted == reported + 2 * depth + captured


def test_the_float_stream_runs_each_block_once(build, monkeypatch):
    """However many stages it has; without room for what they read, for each of them."""
    alone, _, batches = calls_of(build, 3)
    both, _, _ = calls_of(build, 3, "both")
    assert both == alone + 3 * batches
    monkeypatch.setattr(TensorCache, "has_room", lambda *_: False)
    without_room, _, _ = calls_of(build, 3, "both")
    assert without_room == 2 * alone


@pytest.mark.parametrize("name", ["llama", "plain", "experts"])
def test_room_changes_no_value(build, name, monkeypatch):
    model, batches = build(name)
    streams = "float" if name == "experts" else "both"  # which see other tokens in each

    def inputs():
        walk = walk_of(model, batches, streams=streams)
        seen = go_through(walk, model)[1]
        return seen, walk.cost["block_calls"]

    roomy, fewer = inputs()
    monkeypatch.setattr(TensorCache, "has_room", lambda *_: False)
    narrow, more = inputs()
    torch.testing.assert_close(roomy, narrow, rtol=0, atol=0)
    assert fewer < more


def test_layers_around_the_blocks_do_not_run_them(build):
    model, batches = build("plain")
    calls = []
    walk = walk_of(model, batches, streams="both")
    for stage in walk.stages():
        model.blocks[1].mixer.register_forward_hook(lambda *a: calls.append(1))
        if stage.layers[0] in ("neck", "side", "head"):
            calls.clear()
            list(stage.batches())
            assert not calls
        for layer in stage.layers:
            walk.decide(layer, rounded(model.get_submodule(layer).weight))
    assert walk.cost["before_the_blocks"]["walk"] == "rerun"


# ---- nothing left behind -------------------------------------------------------------------------


def state_of(model):
    modules = {
        name: (
            module.training,
            "forward" in vars(module),
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")],
            getattr(getattr(module, "config", None), "use_cache", None),
        )
        for name, module in model.named_modules()
    }
    parameters = {
        name: (id(p), p.requires_grad, p.grad is None, p.device, p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    return modules, parameters


def same_state(model, before):
    modules, parameters = state_of(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (*facts, values) in parameters.items():
        assert facts == list(before[1][name][:-1])
        assert torch.equal(values, before[1][name][-1])


@pytest.mark.parametrize("stop", range(10))
@pytest.mark.parametrize("name", ["llama", "plain"])
def test_an_abandoned_walk_leaves_nothing(build, name, stop, tmp_path):
    """Closed while a stage's batches are read, wherever that is."""
    model, batches = build(name)
    before = state_of(model)
    walk = walk_of(model, batches, streams="both", cache_dir=tmp_path)
    for number, stage in enumerate(walk.stages()):
        reading = stage.batches()
        next(reading)
        if number == stop:
            break
        for layer in stage.layers:
            walk.decide(layer, rounded(model.get_submodule(layer).weight))
    walk.close()
    same_state(model, before)
    assert not list(tmp_path.iterdir())
    assert next(walk.stages(), None) is None


class Interrupted(BaseException):
    """Somebody presses a key."""


@pytest.mark.parametrize("calls", [0, 1, 2, 5, 9, 14, 21])
@pytest.mark.parametrize("kind", [Interrupted, RuntimeError])
@pytest.mark.parametrize("layer", ["blocks.1.feed.down", "blocks.2.mixer.left", "stem", "neck"])
def test_an_error_in_the_model_leaves_nothing(build, layer, kind, calls):
    """Whenever it happens, in whichever pass."""
    model, batches = build("plain")
    before = state_of(model)
    left = [calls]

    def fail(*args):
        left[0] -= 1
        if left[0] < 0:
            raise kind("no")

    hook = model.get_submodule(layer).register_forward_hook(fail)
    walk = walk_of(model, batches, streams="both")
    with suppress(kind):
        go_through(walk, model)
    hook.remove()
    walk.close()
    same_state(model, before)


def test_a_block_moves_to_the_device_while_it_is_worked_on(build):
    """And back, also if the walk ends there."""
    model, batches = build("llama")
    moves = []
    for number, block in enumerate(model.model.layers):
        block.to = lambda device, number=number: moves.append((number, str(device)))
    walk = walk_of(model, batches, streams="both", device="cpu")
    assert moves == []
    next(walk.stages())
    assert moves == [(0, "cpu")]
    walk.close()
    assert moves == [(0, "cpu")] * 2
    walk = walk_of(model, batches, device="cpu")
    moves.clear()
    go_through(walk, model)
    assert moves == [(0, "cpu")] * 2 + [(1, "cpu")] * 2


# ---- what is refused -----------------------------------------------------------------------------


def test_a_layer_that_is_never_called_is_named(build):
    model, batches = build("plain")
    for parent in (model.blocks[1].feed, model):
        parent.spare = nn.Linear(8, 8).double()
        layers = linears(model)
        with pytest.raises(ValueError, match="never received data") as error:
            go_through(walk_of(model, batches, layers), model)
        name = "spare" if parent is model else "blocks.1.feed.spare"
        assert str(error.value).startswith(f"these layers never received data: {name};")
        del parent.spare


def test_a_layer_that_is_called_twice_is_named(build):
    model, batches = build("plain")
    feed = model.blocks[2].feed
    feed.forward = lambda x: feed.last(feed.last(x))
    layers = [name for name in linears(model) if "feed" not in name or "last" in name]
    with pytest.raises(ValueError, match=r"'blocks\.2\.feed\.last' is called again"):
        go_through(walk_of(model, batches, layers), model)


def test_a_layer_between_the_blocks_is_refused(build):
    model, batches = build("plain")
    model.between = nn.Linear(8, 8).double()
    model.blocks[1].register_forward_hook(
        lambda module, args, output: (model.between(output[0]), output[1])
    )
    with pytest.raises(ValueError, match="'between' must be called before or after"):
        go_through(walk_of(model, batches), model)


def test_batches_of_a_block_that_is_over_are_refused(build):
    model, batches = build("llama")
    walk = walk_of(model, batches)
    stages = walk.stages()
    first = next(stages)
    for stage in stages:
        if "layers.1." in stage.layers[0]:
            break
    with pytest.raises(RuntimeError, match=r"stages of model\.layers\.0 are over"):
        next(first.batches())
    walk.close()


def test_weights_of_another_shape_are_refused(build):
    model, batches = build("llama")
    walk = walk_of(model, batches)
    (layer, *_) = next(walk.stages()).layers
    with pytest.raises(ValueError, match="must be of shape"):
        walk.decide(layer, torch.zeros(3, 3))
    walk.close()


# ---- which stack ---------------------------------------------------------------------------------


def names(stem, count):
    return [f"{stem}.{number}" for number in range(count)]


def test_find_stack_takes_the_repeated_blocks(build):
    for name, stem in (
        ("llama", "model.layers"),
        ("opt", "model.decoder.layers"),
        ("gpt_neox", "gpt_neox.layers"),
    ):
        model, _ = build(name)
        assert find_stack(model, linears(model)) == names(stem, 2)
    model, _ = build("experts")
    assert find_stack(model, linears(model)) == names("layers", 2)  # not the experts in a block


def test_find_stack_of_layers_that_are_not_in_blocks(build):
    """A list of layers is no stack, nor is one that most layers are outside of."""
    model, _ = build("plain")
    assert find_stack(model, ["stem", "head"]) == []
    assert find_stack(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0", "1"]) == []
    assert find_stack(nn.ModuleList([nn.Linear(2, 2)] * 2), ["0", "1"]) == []
    wrapped = nn.Module()
    wrapped.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_stack(wrapped, ["layers.0", "layers.1"]) == []
    assert find_stack(model, ["stem", "gain", "head", "blocks.1.feed.up"]) == []
    assert find_stack(model, ["stem", *(f"blocks.{n}.feed.up" for n in range(2))]) != []


def test_find_stack_takes_the_larger_of_two(build):
    """A vision tower before the text model, for one."""
    model, _ = build("plain", depth=2)
    both = nn.ModuleDict({"small": model, "large": build("plain", depth=4)[0]})
    assert find_stack(both, linears(both)) == names("large.blocks", 4)


def test_find_stack_of_a_bare_list():
    model = nn.ModuleList(block_reference.Routed() for _ in range(2))
    assert find_stack(model, linears(model)) == ["0", "1"]
