"""Which batches are taken, how a model is called with them, and which tokens count."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from aimet_ext.data.batches import (
    attended_tokens,
    call_model,
    held_out,
    iterate_batches,
    map_tensors,
    token_mask,
    with_tokens,
)

IDS = torch.arange(6).view(2, 3)


class Echo(nn.Module):
    """Returns the arguments it was called with."""

    def forward(self, input_ids, attention_mask=None, **others):
        return input_ids, attention_mask, others


class Encoding(UserDict):
    """Like a tokenizer's output: a mapping with an attribute of its own."""

    @property
    def input_ids(self):
        return self.data["input_ids"]


@pytest.mark.parametrize(
    "batch", [IDS, (IDS,), [IDS, IDS > 0], {"input_ids": IDS}, Encoding(input_ids=IDS)]
)
def test_what_users_have_is_taken(batch):
    """Tensors, positional arguments and mappings come through as they are."""
    (taken,) = iterate_batches([batch])
    assert taken is batch
    assert torch.equal(call_model(Echo(), taken)[0], IDS)


def test_a_generator_works_once_and_its_second_use_is_named():
    """The second walk through a generator finds nothing, which must not pass silently."""
    generator = (IDS for _ in range(2))
    assert len(list(iterate_batches(generator))) == 2
    with pytest.raises(ValueError, match="walked through only once"):
        list(iterate_batches(generator))


@pytest.mark.parametrize(
    ("dataloader", "error", "text"),
    [
        ([], ValueError, "at least one batch"),
        (IDS, TypeError, "got Tensor; put a single batch into a list"),
        ({"input_ids": IDS}, TypeError, "got dict"),
        ("text", TypeError, "got str"),
        (3, TypeError, "got int"),
        ([IDS, "text"], TypeError, "batch 1 must be .* got str; pass a forward_fn"),
        ([[1, 2]], TypeError, "at least one tensor, got list"),
        ([{"labels": IDS}], TypeError, "at least one tensor"),
        ([torch.arange(3)], ValueError, r"got \[3\]; a single sequence takes"),
        ([torch.empty(2, 0)], ValueError, r"got \[2, 0\]"),
        ([IDS, IDS / 0.0 * 0], ValueError, "batch 1 holds NaN"),
        ([{"input_ids": IDS, "bias": torch.tensor([torch.nan])}], ValueError, "batch 0 holds NaN"),
    ],
)
def test_bad_dataloaders_are_named(dataloader, error, text):
    """Who, what was required, what came: also for the batch after the first."""
    with pytest.raises(error, match=text):
        list(iterate_batches(dataloader))


def test_opaque_batches_are_the_callers_own_but_not_nan():
    """A forward_fn may define its batches; NaN is a mistake in any of them."""
    assert list(iterate_batches(["text"], opaque=True)) == ["text"]
    with pytest.raises(ValueError, match="batch 0 holds NaN"):
        list(iterate_batches([[1, {"x": torch.tensor(torch.nan)}]], opaque=True))


def test_infinite_masks_are_no_mistake():
    """A 4-D mask may be minus infinity."""
    mask = torch.full((2, 1, 3, 3), -torch.inf)
    assert len(list(iterate_batches([(IDS, mask)]))) == 1


def test_labels_are_ignored_and_the_batch_left_as_it_was():
    """The model never sees labels; the caller's mapping keeps them."""
    batch = {"input_ids": IDS, "labels": IDS, "position_ids": IDS}
    assert set(call_model(Echo(), batch)[2]) == {"position_ids"}
    assert "labels" in batch


def test_forward_fn_receives_the_batch_itself():
    """Whatever type it has, with its attributes."""
    batch = Encoding(input_ids=IDS, labels=IDS)
    assert call_model(Echo(), batch, lambda _, got: got) is batch


def test_a_batch_that_cannot_be_moved_is_named():
    """A tensor without data has no other device to go to."""
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"model's device \(cpu\)"):
        call_model(model, torch.empty(2, 3, device="meta"))


def test_batches_move_to_the_models_device():
    """Nested containers keep their types; the caller's own batch stays where it is."""
    model = nn.Linear(3, 3, device="meta")
    batch = Encoding(input_ids=IDS, rest=[IDS, (IDS, 1)])
    moved = call_model(model, batch, lambda _, got: got)
    assert type(moved) is Encoding
    assert moved.input_ids.is_meta
    assert moved["rest"][1][0].is_meta
    assert moved["rest"][1][1] == 1
    assert not batch.input_ids.is_meta


def test_map_tensors_keeps_named_tuples():
    """A named tuple is built from its fields, not from one list."""
    pair = namedtuple("pair", "a b")(IDS, None)
    doubled = map_tensors(lambda t: 2 * t, pair)
    assert torch.equal(doubled.a, 2 * IDS)
    assert doubled.b is None


MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


def test_token_mask_of_mappings_and_positional_arguments():
    """A position is a mask only by the name that the model gives it."""
    real = MASK.bool()
    assert torch.equal(token_mask({"input_ids": IDS, "attention_mask": MASK}), real)
    assert torch.equal(token_mask((IDS, MASK), Echo()), real)
    assert token_mask((IDS, MASK)) is None
    assert token_mask(IDS, Echo()) is None
    assert token_mask((IDS, MASK, IDS, IDS), Echo()) is None
    assert token_mask({"attention_mask": MASK[:, None, None, :]}) is None


def blocks_mask(real, *, fill, rescue):
    """The 4-D mask of a causal model, written out query by query."""
    batch, seq = real.shape
    allowed = torch.zeros(batch, 1, seq, seq, dtype=torch.bool)
    for b in range(batch):
        for query in range(seq):
            for key in range(query + 1):
                allowed[b, 0, query, key] = real[b, key]
            if rescue and not allowed[b, 0, query].any():
                allowed[b, 0, query] = True
    return allowed if fill is None else torch.zeros(allowed.shape).masked_fill(~allowed, fill)


@pytest.mark.parametrize("rescue", [False, True])
@pytest.mark.parametrize("fill", [None, -100.0, -torch.inf, torch.finfo(torch.float32).min])
def test_real_tokens_from_the_mask_a_block_received(fill, rescue):
    """Left, right and no padding; bool or additive; empty rows left or rescued."""
    real = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    attention = blocks_mask(real, fill=fill, rescue=rescue)
    assert torch.equal(attended_tokens(attention, (3, 4)), real)


def test_a_mask_of_what_is_hidden():
    """Some libraries hand their blocks True for what a query does not see."""
    seen = torch.ones(3, 3).tril().bool() & MASK.bool()[:, None, None, :]
    found = attended_tokens(~seen, (2, 3))
    assert torch.equal(found, MASK.bool()) and torch.equal(found, attended_tokens(seen, (2, 3)))


def test_masks_that_say_nothing():
    """No padding: all tokens are real. Another shape: unknown. Two dimensions: as they are."""
    assert attended_tokens(torch.zeros(1, 1, 3, 3), (2, 3)).all()
    assert attended_tokens(torch.ones(1, 1, 3, 3).tril().bool(), (2, 3)).all()
    assert attended_tokens(torch.zeros(1, 1, 3, 5), (2, 3)) is None
    assert torch.equal(attended_tokens(MASK, (2, 3)), MASK.bool())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 64])
def test_batches_to_judge_by_are_spread_over_all(count):
    train, held = held_out(count)
    assert set(train) | set(held) == set(range(count)) and held
    assert not set(train) & set(held) or count == 1
    assert len(held) == max(1, count // 4)
    width = count / len(held)
    assert all(width * n <= place < width * (n + 1) for n, place in enumerate(held))


@pytest.mark.parametrize("texts", [2, 3, 4])
@pytest.mark.parametrize("in_turn", [True, False])
def test_texts_have_their_shares_of_the_batches_that_are_chosen(texts, in_turn):
    """Of texts that take turns, as calibration_batches gives files, or follow one another."""
    count = 48
    owners = [n % texts if in_turn else n * texts // count for n in range(count)]
    train, held = held_out(count)
    batches = [torch.full((1, 10), number) for number in range(count)]
    chosen = [int(batch[0, 0]) for batch in with_tokens(batches, 10 * count // 4)]
    for numbers in (held, train, chosen):
        shares = [sum(owners[n] == text for n in numbers) / len(numbers) for text in range(texts)]
        assert min(shares) >= 0.5 / texts
