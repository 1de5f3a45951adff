"""Captured block inputs, replayed, are what the model's own forward pass computes."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from aimet_ext.data.cache import TensorCache
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.walk.states import hidden_state
from aimet_ext.walk.stream import BlockStream, capture_block_inputs
from aimet_ext.walk.streamed import StreamedBlock

FIRST = "model.layers.0"


class Logits(nn.Module):
    """The thin wrapper that QuantizationSimModel can trace: logits only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def ids(batch, seq, seed=0):
    return torch.randint(3, 128, (batch, seq), generator=torch.Generator().manual_seed(seed))


def padded(batch, seq, seed=0):
    """A tokenizer's output, first sequence padded on the left, the second on the right."""
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    return {"input_ids": ids(batch, seq, seed), "attention_mask": mask, "labels": ids(batch, seq)}


BATCHES = [ids(2, 9), padded(3, 7), ids(1, 12, 1), (ids(4, 4, 2),), padded(3, 7, 5), [ids(7, 7)]]


@torch.no_grad()
def own_outputs(model, blocks, batch):
    """Outputs of every block in the model's own forward pass."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: seen.append(hidden_state(output)))
        for block in blocks
    ]
    try:
        if isinstance(batch, dict):
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
        else:
            model(batch if isinstance(batch, torch.Tensor) else batch[0])
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def streamed(block, stream):
    return StreamedBlock(block, "block", {"float": stream})


def assert_replays(model, blocks, stream, batches):
    expected = [own_outputs(model, blocks, batch) for batch in batches]
    for depth, block in enumerate(blocks):
        streamed(block, stream).advance("float")
        for index in range(len(batches)):
            assert torch.equal(stream.hidden[index], expected[index][depth])


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_replay_is_bit_identical(tiny_model, tmp_path, family, cached):
    """All batch types, lengths and paddings in one stream, through all blocks."""
    model = tiny_model(family)
    stream = capture_block_inputs(model, FIRST, BATCHES, cache_dir=tmp_path if cached else None)
    assert [stream.shape(i) for i in range(len(stream))] == [
        (2, 9), (3, 7), (1, 12), (4, 4), (3, 7), (7, 7)
    ]  # fmt: skip
    assert_replays(model, model.model.layers, stream, BATCHES)
    stream.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_replay_of_a_wrapped_model(tiny_model, attention):
    """Names carry the wrapper's prefix; a positional mask is found by the wrapper's signature."""
    model = Logits(tiny_model("llama", attn_implementation=attention))
    batch = padded(3, 7)
    positional = [(batch["input_ids"], batch["attention_mask"]), ids(2, 5)]
    stream = capture_block_inputs(model, f"model.{FIRST}", positional)
    assert torch.equal(stream.mask(0), batch["attention_mask"].bool())
    assert stream.mask(1).all()
    assert_replays(model, model.model.model.layers, stream, [batch, positional[1]])


@pytest.mark.filterwarnings("ignore")  # AIMET uses what torch, transformers and AIMET deprecated
def test_replay_of_an_aimet_sim(tiny_llama):
    """The quantized stream of a calibrated sim, activation quantizers in the loop."""
    pytest.importorskip("aimet_torch")
    batches = [ids(2, 9), ids(1, 5, 1)]
    from aimet_torch import QuantizationSimModel

    sim = QuantizationSimModel(Logits(tiny_llama).eval(), dummy_input=(ids(1, 8),))
    sim.compute_encodings(lambda model, data: [model(batch) for batch in data], batches)
    stream = capture_block_inputs(sim.model, f"model.{FIRST}", batches)
    blocks = sim.model.model.model.layers
    assert_replays(sim.model, blocks, stream, batches)
    assert not torch.equal(
        stream.hidden[0], own_outputs(tiny_llama, tiny_llama.model.layers, batches[0])[-1]
    )


def test_the_model_runs_up_to_the_first_block_only(tiny_llama):
    """Neither a block nor the head is paid for."""
    ran = []
    tiny_llama.model.layers[0].self_attn.register_forward_hook(lambda *_: ran.append("block"))
    tiny_llama.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    capture_block_inputs(tiny_llama, FIRST, BATCHES)
    assert ran == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny_llama, fails):
    """Training flags module by module, use_cache and hooks, after an exception too."""
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    tiny_llama.config.use_cache = True
    flags = [module.training for module in tiny_llama.modules()]
    seen = []

    def forward_fn(model, batch):
        seen.append((model.training, model.config.use_cache, torch.is_grad_enabled()))
        if fails and len(seen) == 2:
            raise OSError("no data")
        return model(batch)

    if fails:
        with pytest.raises(RuntimeError, match="forward_fn failed on batch 1 with OSError: no dat"):
            capture_block_inputs(tiny_llama, FIRST, [ids(1, 4)] * 3, forward_fn)
    else:
        capture_block_inputs(tiny_llama, FIRST, [ids(1, 4)] * 3, forward_fn)
    assert set(seen) == {(False, False, False)}
    assert [module.training for module in tiny_llama.modules()] == flags
    assert tiny_llama.config.use_cache is True
    assert all(not module._forward_pre_hooks for module in tiny_llama.modules())


def test_a_forward_fn_that_asks_for_a_cache_gets_no_stateful_replay(tiny_llama):
    """A key-value cache would grow with every replay of the block."""
    batch = ids(2, 6)
    stream = capture_block_inputs(tiny_llama, FIRST, [batch], lambda m, b: m(b, use_cache=True))
    kwargs = stream.select(0).kwargs
    assert kwargs["past_key_values"] is None
    assert not kwargs["use_cache"]
    block = tiny_llama.model.layers[0]
    expected = own_outputs(tiny_llama, [block], batch)[0]
    with torch.no_grad():
        assert all(torch.equal(stream.call(block, 0), expected) for _ in range(2))


def test_a_forward_fn_that_guards_itself_does_not_see_the_stop(tiny_llama):
    """What ends the forward pass is no Exception that user code could take for a failure."""

    def guarded(model, batch):
        try:
            return model(batch["x"])
        except Exception as error:
            raise SystemError("the model is broken") from error

    assert len(capture_block_inputs(tiny_llama, FIRST, [{"x": ids(1, 4)}], guarded)) == 1


def test_masks_come_from_the_batch_or_from_the_block(tiny_model):
    """A forward_fn may hide the mask from us; the block's own 4-D mask says the same."""
    batch = padded(3, 7)
    for attention in ("eager", "sdpa"):
        model = tiny_model("llama", attn_implementation=attention)
        direct = capture_block_inputs(model, FIRST, [batch])
        hidden_from_us = capture_block_inputs(
            model, FIRST, [list(batch.values())], lambda m, b: m(b[0], attention_mask=b[1])
        )
        for stream in (direct, hidden_from_us):
            assert torch.equal(stream.mask(0), batch["attention_mask"].bool())


@pytest.mark.parametrize("rows", [[1], [2, 0], slice(1, 3), torch.tensor([0, 2])])
def test_selected_rows_are_rows_of_the_whole(tiny_llama, rows):
    """Masks are cut, shared position embeddings broadcast: same result as the whole batch."""
    block = tiny_llama.model.layers[0].double()
    stream = capture_block_inputs(tiny_llama.double(), FIRST, [padded(3, 7)])
    call = stream.select(0, rows)
    real = call.mask
    assert torch.equal(real, stream.mask(0)[rows])
    whole, part = stream.call(block, 0)[rows], call(block)
    torch.testing.assert_close(part[real], whole[real], rtol=1e-12, atol=1e-12)


def test_selection_cuts_by_the_batch_dimension_and_nothing_else():
    """Nested tuples; a vector of positions as long as the batch stays whole."""
    hidden = torch.randn(3, 3, 4)
    scale, mask = torch.randn(1, 3, 4), torch.randn(3, 1, 3, 3)
    cos, cache_position = torch.randn(3, 3, 2), torch.arange(3)
    kwargs = {
        "attention_mask": mask,
        "position_embeddings": (cos, [scale, 1.5]),
        "cache_position": cache_position,
        "flag": None,
    }
    stream = BlockStream("cpu")
    stream.append(hidden, (hidden, scale), kwargs, torch.ones(3, 3).bool())
    call = stream.select(0, [2, 0])
    assert torch.equal(call.args[0], hidden[[2, 0]])
    assert call.args[0] is call.hidden
    assert torch.equal(call.args[1], scale)
    assert torch.equal(call.kwargs["attention_mask"], mask[[2, 0]])
    assert torch.equal(call.kwargs["position_embeddings"][0], cos[[2, 0]])
    assert torch.equal(call.kwargs["position_embeddings"][1][0], scale)
    assert call.kwargs["position_embeddings"][1][1] == 1.5
    assert torch.equal(call.kwargs["cache_position"], cache_position)
    assert call.kwargs["flag"] is None


def test_hidden_states_by_name_and_of_another_stream():
    """A block that takes hidden_states by keyword is called the same way again."""
    hidden = torch.randn(2, 3, 4)
    stream = BlockStream("cpu")
    stream.append(hidden, (), {"hidden_states": hidden, "by": 2}, torch.ones(2, 3).bool())

    def block(*, hidden_states, by):
        return (hidden_states * by, None)

    assert torch.equal(stream.call(block, 0), hidden * 2)
    assert torch.equal(stream.select(0).with_hidden(hidden + 1)(block), (hidden + 1) * 2)
    with pytest.raises(TypeError, match=r"must return its hidden states.* got dict"):
        stream.call(lambda **_: {}, 0)


def test_equal_arguments_are_stored_once(tiny_llama):
    """16 batches of one length share position embeddings, ids and mask."""
    stream = capture_block_inputs(tiny_llama, FIRST, [ids(2, 8, seed) for seed in range(16)])
    once = capture_block_inputs(tiny_llama, FIRST, [ids(2, 8)])
    stored = stream._arguments.tensors
    assert len(stored) == len(once._arguments.tensors)
    assert len({tuple(tensor.shape) for tensor in stored}) > 1


def test_fork_and_targets_leave_the_stream_where_it_is(tiny_llama, tmp_path):
    """Float and quantized streams part; targets are computed beside the stream."""
    block = tiny_llama.model.layers[0]
    stream = capture_block_inputs(tiny_llama, FIRST, BATCHES, cache_dir=tmp_path)
    start = list(stream.hidden)
    twin, targets = stream.fork(), streamed(block, stream).outputs("float")
    streamed(block, twin).advance("float")
    for index, tensor in enumerate(start):
        assert torch.equal(stream.hidden[index], tensor)
        assert torch.equal(twin.hidden[index], targets[index])
        assert not targets[index].requires_grad
    stream.close()
    assert len(stream) == 0
    assert torch.equal(twin.call(block, 1), own_outputs_twice(tiny_llama, BATCHES[1]))
    twin.close()
    targets.close()
    assert list(tmp_path.iterdir()) == []


def own_outputs_twice(model, batch):
    """The first block applied twice, by hooks on the model's own forward pass."""
    first, second = model.model.layers
    second.load_state_dict(first.state_dict())
    return own_outputs(model, [first, second], batch)[1]


def test_gradients_reach_what_the_block_function_uses(tiny_llama):
    """Nothing in a stream requires a gradient; what is trained in the block gets one."""
    stream = capture_block_inputs(tiny_llama, FIRST, [ids(2, 6)])
    block = tiny_llama.model.layers[0]
    stream.call(block, 0, [1]).square().mean().backward()
    assert block.mlp.up_proj.weight.grad.abs().max() > 0
    assert tiny_llama.model.embed_tokens.weight.grad is None


def test_the_device_is_asked_for_at_every_call(tiny_llama):
    """The block moves, one batch follows it: hidden states, masks and nested arguments."""
    stream = capture_block_inputs(tiny_llama, FIRST, [padded(3, 7)])
    on_cpu = stream.select(0)
    stream.device = torch.device("meta")
    call = stream.select(0, [1])
    cos, sin = call.kwargs["position_embeddings"]
    assert all(tensor.is_meta for tensor in (call.hidden, call.mask, call.args[0], cos, sin))
    assert not on_cpu.kwargs["position_embeddings"][0].is_meta
    block = tiny_llama.model.layers[0].to("meta")
    assert stream.call(block, 0).shape == (3, 7, 64)


def test_the_stream_has_a_content_hash(tiny_llama):
    """Equal for equal data, other for other ids or another mask."""
    batch = padded(3, 7)
    longer = {**batch, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    hashes = [
        hash_tensors(capture_block_inputs(tiny_llama, FIRST, [data]).named_tensors())
        for data in (batch, padded(3, 7), longer, padded(3, 7, 1))
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([], ValueError, "at least one batch"),
        (["text"], TypeError, "batch 0 must be .* got str"),
        ([ids(1, 4), ids(1, 129)], ValueError, "context of 128 tokens .* batch 1 has 129"),
        ([(ids(1, 129),)], ValueError, "batch 0 has 129"),
        ([torch.full((1, 4), 500)], RuntimeError, "model's forward pass failed on batch 0"),
        ([{"input_ids": ids(1, 4), "attention_mask": 0 * ids(1, 4)}], ValueError, "masks all 4"),
    ],
)
def test_bad_batches_leave_nothing_behind(tiny_llama, tmp_path, batches, error, text):
    """Named by number, and the cache folder is as empty as before."""
    with pytest.raises(error, match=text):
        capture_block_inputs(tiny_llama, FIRST, batches, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bad_models_are_named(tiny_llama):
    """An unknown block, one that is not called, NaN in the embedding."""
    batches = [ids(1, 4)]
    with pytest.raises(ValueError, match=r"first_block_name must .* got 'model.h.0'"):
        capture_block_inputs(tiny_llama, "model.h.0", batches)
    with pytest.raises(ValueError, match="must be called for every batch"):
        capture_block_inputs(tiny_llama, FIRST, batches, lambda model, batch: None)
    with pytest.raises(ValueError, match=r"must receive hidden states .* got \[1, 4\]"):
        capture_block_inputs(tiny_llama, "model.embed_tokens", batches)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[int(batches[0][0, 0])] = torch.nan
    with pytest.raises(ValueError, match="must be finite, batch 0"):
        capture_block_inputs(tiny_llama, FIRST, batches)


def test_the_length_that_counts_is_the_one_forward_fn_gives(tiny_llama):
    """It is known only when the block is reached: too long is named, cut short is fine."""
    stream = capture_block_inputs(tiny_llama, FIRST, [ids(1, 200)], lambda m, b: m(b[:, :50]))
    assert stream.shape(0) == (1, 50)
    with pytest.raises(ValueError, match="batch 0 has 200"):
        capture_block_inputs(tiny_llama, FIRST, [None], lambda model, _: model(ids(1, 200)))


def test_only_one_batch_is_in_memory(tiny_llama, tmp_path, monkeypatch):
    """With cache_dir, a tensor from a cache is gone before the next batch is read."""
    alive, peak = weakref.WeakSet(), [0]
    read = TensorCache.read

    def counted(cache, index, device="cpu"):
        tensor = read(cache, index, device)
        alive.add(tensor)
        gc.collect(0)
        peak[0] = max(peak[0], sum(t.nbytes for t in alive))
        return tensor

    monkeypatch.setattr(TensorCache, "read", counted)
    peaks = []
    for count in (2, 8):
        peak[0] = 0
        batches = [ids(2, 32, seed) for seed in range(count)]
        stream = capture_block_inputs(tiny_llama, FIRST, batches, cache_dir=tmp_path)
        twin = stream.fork()
        for block in tiny_llama.model.layers:
            streamed(block, stream).advance("float")
            streamed(block, twin).advance("float")
        peaks.append(peak[0])
        stream.close()
        twin.close()
    assert peaks[0] == peaks[1] > 0


def test_calls_are_plain_values(tiny_llama):
    """A call can be unpacked by those who want its arguments for a proof of their own."""
    stream = capture_block_inputs(tiny_llama, FIRST, [ids(2, 6)])
    call = stream.select(0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.hidden = None
    block = tiny_llama.model.layers[0]
    with torch.no_grad():
        assert torch.equal(block(*call.args, **call.kwargs), call(block))
