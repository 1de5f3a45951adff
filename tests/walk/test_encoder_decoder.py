"""Walks through the stacks of an encoder and a decoder, and whose tokens count in each layer."""

import pytest
import torch
from encoder_decoders import batch_of, encoder_decoder
from torch import nn

from aimet_ext import prepare_model
from aimet_ext.walk.blocks import BlockWalk, find_stacks
from aimet_ext.walk.sides import find_sides
from aimet_ext.walk.walk import RerunWalk

FAMILIES = ("t5", "bart", "whisper")


def build(family, batches=2, **settings):
    model = prepare_model(encoder_decoder(family)).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name and "proj_out" not in name:
            module.weight.data *= 1.5
    data = [batch_of(family, seed, **settings) for seed in range(batches)]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)]
    return model, data, layers


def walk_of(model, batches, layers, **settings):
    stacks = find_stacks(model, layers, batches)
    names = [*layers, *(block for stack in stacks for block in stack.blocks)]
    sides = find_sides(model, names, batches, None)
    return BlockWalk(model, [], batches, layers, stacks=stacks, sides=sides, **settings), sides


def go_through(walk, model):
    """All inputs by layer, each layer rounded coarsely behind its stage."""
    seen = {}
    for stage in walk.stages():
        inputs = [
            (*given[:2], None if given[2] is None or given[2].all() else given[2])
            for given in stage.batches()
        ]
        for layer in stage.layers:
            weight = model.get_submodule(layer).weight.detach()
            step = weight.abs().max() / 2
            seen[layer] = inputs
            walk.decide(layer, (weight / step).round() * step)
    walk.close()
    return seen


@pytest.mark.parametrize("effective", [False, True], ids=["", "coarse tables"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_stacks_give_what_the_whole_model_gives(family, effective):
    """A pass through each stack against a pass from the inputs for every stage."""
    model, batches, layers = build(family)
    tables = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    coarse = {n: (w.detach() * 2).round() / 2 for n, w in tables.items()} if effective else {}
    settings = {"streams": "both", "effective": coarse}
    walk, sides = walk_of(model, batches, layers, **settings)
    assert len(walk.stacks) == 2 and "encoder" in walk.blocks[0] and "decoder" in walk.blocks[-1]
    fast = go_through(walk, model)
    slow = go_through(RerunWalk(model, batches, layers, sides=sides, **settings), model)
    assert fast.keys() == slow.keys() == set(layers)
    for layer, inputs in fast.items():
        for one, other in zip(inputs, slow[layer], strict=True):
            for x, y in zip(one, other, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=layer)


@pytest.mark.parametrize("target", [7, 12], ids=["other length", "same length"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_layer_counts_the_tokens_that_it_reads(family, target):
    """Padding of the source in the encoder and in the keys and values that attend to it."""
    model, batches, layers = build(family, target=target)
    walk, _ = walk_of(model, batches, layers)
    for layer, inputs in go_through(walk, model).items():
        crossed = ("EncDec" in layer or "encoder_attn" in layer) and layer.split(".")[-1][0] in "kv"
        of_source = crossed or ".encoder." in layer
        for batch, (_, _, mask) in zip(batches, inputs, strict=True):
            expected = batch["attention_mask" if of_source else "decoder_attention_mask"]
            assert mask is not None and torch.equal(mask, expected.bool()), layer


def test_a_walk_holds_the_states_of_the_encoder_once():
    """Blocks of the decoder share them: what is kept does not grow with their number."""
    model, batches, layers = build("bart", batches=1)
    walk, _ = walk_of(model, batches, layers)
    for stage in walk.stages():
        if "decoder" in stage.layers[0]:
            break
    arguments = walk._passes[-1].flows["quantized"]._arguments.tensors
    shapes = [tuple(tensor.shape) for tensor in arguments]
    walk.close()
    assert shapes.count((4, 12, 32)) == 1


class Heads(nn.Module):
    """Two stacks, of which the second is no sequence of blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return [head(x) for head in self.heads]


def test_a_stack_that_is_not_called_in_sequence_is_left_to_the_rest():
    model, batches = Heads().eval(), [torch.randn(2, 5, 4)]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    walk, sides = walk_of(model, batches, layers)
    assert walk.blocks == ("blocks.0", "blocks.1", "blocks.2") and sides.target is None
    assert [*go_through(walk, model)] == layers
