"""Topology and proof on the live model of a simulation, its quantizers switched off."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from aimet_ext.models.proof import failing_pairs, probe, probe_inputs, prove_pairs
from aimet_ext.models.topology import find_blocks, select_pairs

aimet_torch = pytest.importorskip("aimet_torch")

# AIMET calls a deprecated property of its own in every forward pass.
pytestmark = pytest.mark.filterwarnings("ignore:.*_allow_overwrite is:DeprecationWarning")

LENGTH = 12


class LogitsOnly(nn.Module):
    """What a simulation can trace: ids, a 4-D mask and positions to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, positions):
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return output.logits


def sample_inputs():
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) + 3
    mask = torch.full((LENGTH, LENGTH), -1e9).triu(1).expand(2, 1, LENGTH, LENGTH).contiguous()
    return ids, mask, torch.arange(LENGTH).expand(2, LENGTH).contiguous()


def calibrated_sim(plain):
    """AIMET and the tracing of torch warn about calls of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim = aimet_torch.QuantizationSimModel(plain, dummy_input=sample_inputs())
        sim.compute_encodings(lambda model: model(*sample_inputs()))
    return sim


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_pairs_hold_on_a_live_block(tiny_model, family):
    from aimet_torch.utils import remove_all_quantizers

    plain = LogitsOnly(tiny_model(family))
    sim = calibrated_sim(plain)
    with remove_all_quantizers(sim.model):
        found = find_blocks(sim.model, run=lambda: sim.model(*sample_inputs()))
    assert [block.name for block in found] == [block.name for block in find_blocks(plain)]

    topology = found[1]
    block = sim.model.get_submodule(topology.name)
    calls = []
    handle = block.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    sim.model(*sample_inputs())
    handle.remove()
    params = {name: p for name, p in block.named_parameters() if "quantizers" not in name}
    block_fn = probe(block, (), probe_inputs(block, *calls[0]))

    with remove_all_quantizers(sim.model):
        prove_pairs(block_fn, params, topology.pairs, where=topology.name)
        (values,) = select_pairs(topology, ["v_o"])
        index = torch.arange(32).repeat_interleave(2)
        sides = (values.sides[0], dataclasses.replace(values.sides[1], index=index))
        planted = dataclasses.replace(values, sides=sides)
        (failure,) = failing_pairs(block_fn, params, [*topology.pairs, planted])
        assert failure.pair is planted
    # With quantizers on, the rounding moves: the proof is one of the float function only.
    assert failing_pairs(block_fn, params, topology.pairs)
