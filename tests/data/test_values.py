"""Cached values: nested, stored once where they are one, gone when nothing reads them."""

import pytest
import torch

from aimet_ext.data.cache import StoredBatches, ValueCache, keep_batches


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    cache = ValueCache(tmp_path if request.param == "disk" else None)
    yield cache
    cache.close()
    assert not list(tmp_path.iterdir())


def test_nested_values_come_back(cache):
    """Tensors as copies, everything else as it is."""
    one, shape = torch.ones(3), torch.Size([2, 3])
    cache.put(0, {"a": (one, {"b": [torch.zeros(2), "text"]}), "shape": shape, "none": None})
    one += 1
    found = cache.read(0, ["a", "shape", "none"])
    assert found["shape"] is shape
    assert found["none"] is None
    first, rest = found["a"]
    assert first.tolist() == [1, 1, 1]
    assert rest["b"][0].tolist() == [0, 0]
    assert rest["b"][1] == "text"
    first += 1
    assert cache.read(0, ["a"])["a"][0].tolist() == [1, 1, 1]


def test_one_tensor_stays_one(cache):
    """It is stored once, read once, and forgotten with the last value that holds it."""
    tensor = torch.ones(4)
    cache.put(0, {"x": tensor, "same": [tensor]})
    cache.put(1, {"x": tensor})
    assert cache.bytes == 2 * 16
    found = cache.read(0, ["x", "same"])
    assert found["x"] is found["same"][0]
    cache.drop(0, ["x", "unknown"])
    assert cache.bytes == 2 * 16
    cache.drop(0, ["same"])
    assert cache.bytes == 16
    cache.put(1, {"x": torch.ones(8)})
    assert cache.bytes == 32
    assert cache.read(1, ["x"])["x"].shape == (8,)
    with pytest.raises(KeyError):
        cache.read(0, ["x"])


def test_batches_of_a_generator_are_stored(tmp_path):
    """And lists are used as they are."""
    listed = [torch.ones(2)]
    assert keep_batches(listed) is listed
    stored = keep_batches(({"x": torch.ones(number)} for number in (1, 2)), tmp_path)
    assert isinstance(stored, StoredBatches)
    for _ in range(2):
        assert [len(batch["x"]) for batch in stored] == [1, 2]
    with pytest.raises(IndexError, match="there are 2 batches"):
        stored[2]
    stored.close()
    assert not list(tmp_path.iterdir())
