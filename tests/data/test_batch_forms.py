"""Each form of a batch gives every consumer the same, torch and ONNX; mistakes are named alike."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import aimet_ext
from aimet_ext.data.batches import call_model, iterate_batches, token_ids, token_mask
from aimet_ext.data.feeds import InputSpec, filled_batches, graph_feeds, named_batches
from aimet_ext.evaluation.perplexity import evaluate_perplexity

IDS = InputSpec(("n", "s"), torch.int64)
ONE = {"input_ids": IDS}
TWO = {"input_ids": IDS, "attention_mask": IDS}


def arrays(count: int = 3) -> list[np.ndarray]:
    return [np.full((2, 4), number + 1, np.int64) for number in range(count)]


class Reader:
    """As onnxruntime's calibration wants it."""

    def __init__(self):
        self.rewind()

    def get_next(self):
        return next(self.items, None)

    def rewind(self):
        self.items = iter({"input_ids": array} for array in arrays())


class Container:
    """As Olive's data containers: a data loader of mappings."""

    def create_dataloader(self):
        return DataLoader([{"input_ids": row} for a in arrays() for row in a], batch_size=2)


class LabelledContainer:
    """As Olive's data containers: a data loader of pairs of a mapping and a label."""

    def create_dataloader(self):
        rows = [({"input_ids": row}, 0) for array in arrays() for row in array]
        return DataLoader(rows, batch_size=2)


class ByIndex(Dataset):
    """Knows its length and raises nothing beyond it."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"input_ids": arrays()[min(index, 2)]}


FORMS: dict[str, Callable[[], Any]] = {
    "list of mappings": lambda: [{"input_ids": array} for array in arrays()],
    "tuple of mappings": lambda: tuple({"input_ids": array} for array in arrays()),
    "mappings of tensors": lambda: [{"input_ids": torch.from_numpy(a)} for a in arrays()],
    "single arrays": arrays,
    "single tensors": lambda: [torch.from_numpy(array) for array in arrays()],
    "positional": lambda: [(array,) for array in arrays()],
    "positional tensors": lambda: [[torch.from_numpy(array)] for array in arrays()],
    "other mappings": lambda: [UserDict(input_ids=array) for array in arrays()],
    "further keys": lambda: [{"labels": "no array", "input_ids": array} for array in arrays()],
    "labels": lambda: [{"labels": array, "input_ids": array} for array in arrays()],
    "generator": lambda: ({"input_ids": array} for array in arrays()),
    "generator function": lambda: lambda: ({"input_ids": array} for array in arrays()),
    "function that returns a list": lambda: arrays,
    "torch DataLoader": lambda: DataLoader(np.concatenate(arrays()), batch_size=2),
    "data set without __iter__": ByIndex,
    "reader": Reader,
    "container": Container,
    "windows of text": lambda: windows(),
    "read-only arrays": lambda: [np.broadcast_to(a[:1], (2, 4)) for a in arrays()],
    "reversed arrays": lambda: [a[::-1] for a in arrays()],
    "big endian": lambda: [a.astype(">i8") for a in arrays()],
}
# A torch module takes a tuple as arguments, a graph the last of them as a label.
LABELLED: dict[str, Callable[[], Any]] = {
    "positional and a label": lambda: [[array, np.zeros(2)] for array in arrays()],
    "mapping and a label": lambda: [({"input_ids": array}, 5) for array in arrays()],
    "positional, in a pair with a label": lambda: [((array,), 5) for array in arrays()],
    "DataLoader with labels": lambda: DataLoader(
        [(row, 1) for row in np.concatenate(arrays())], batch_size=2
    ),
    "container with labels": LabelledContainer,
}


def windows() -> list[torch.Tensor]:
    """Ids cut from text, one document a window."""
    texts = [" ".join(3 * [str(number)]) for array in arrays() for number in array[:, 0]]
    tokenizer = SimpleNamespace(encode=lambda text, **_: [int(word) for word in text.split()])
    # The token that starts a document is that of its first word here.
    batches = []
    for text in texts:
        start = int(text[0])
        batches += aimet_ext.calibration_batches(tokenizer, text, 4, 1, bos_token_id=start)
    return [torch.cat(batches[at : at + 2]) for at in range(0, len(batches), 2)]


class Echo(nn.Module):
    """Return the ids it was called with."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return input_ids


class Model(nn.Module):
    """Logits that depend on the ids."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(input_ids, 8).float() * input_ids[..., None]


class Session:
    """As a session of onnxruntime, of the same model."""

    def get_inputs(self):
        return [SimpleNamespace(name="input_ids", type="tensor(int64)", shape=["n", "s"])]

    def get_outputs(self):
        return [SimpleNamespace(name="logits")]

    def run(self, names, feeds):
        return [Model()(torch.from_numpy(feeds["input_ids"])).numpy()]


STATIC = {"input_ids": InputSpec((2, 4), torch.int64)}
CONSUMERS: dict[str, Callable[[Any], list[Any]]] = {
    "torch module": lambda data: [call_model(Echo(), b) for b in iterate_batches(data)],
    "token ids": lambda data: [token_ids(b) for b in iterate_batches(data)],
    "graph": lambda data: [b["input_ids"] for b in named_batches(data, ONE)],
    "graph with a mask": lambda data: [b["input_ids"] for _, b in filled_batches(data, TWO)],
    "exported graph": lambda data: [f["input_ids"] for f in graph_feeds(data, STATIC)],
}
TORCH = ("torch module", "token ids")


@pytest.mark.parametrize(
    ("form", "consumer"),
    [(f, c) for c in CONSUMERS for f in (FORMS if c in TORCH else [*FORMS, *LABELLED])],
)
def test_all_forms_give_the_same(form: str, consumer: str) -> None:
    found = CONSUMERS[consumer]({**FORMS, **LABELLED}[form]())
    assert len(found) == 3
    for batch, expected in zip(found, arrays(), strict=True):
        assert np.array_equal(np.asarray(batch), expected)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_have_one_perplexity(form: str) -> None:
    expected = evaluate_perplexity(Model(), [torch.from_numpy(a) for a in arrays()])
    for model in (Model(), Session()):
        assert evaluate_perplexity(model, FORMS[form]()) == pytest.approx(expected)


def test_a_reader_is_read_from_the_beginning_each_time():
    reader = Reader()
    assert len(named_batches(reader, ONE)) == len(list(iterate_batches(reader))) == 3


MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize("form", ["mapping", "tensors", "positional"])
def test_a_mask_tells_every_consumer_the_same(form: str) -> None:
    ids = arrays()[0]
    batch: Any = {"attention_mask": MASK, "input_ids": ids}
    if form == "tensors":
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    elif form == "positional":
        batch = (ids, MASK)
    (called,) = iterate_batches([batch])
    (named,) = named_batches([batch], TWO)
    ((_, filled),) = filled_batches([batch], TWO)
    (feed,) = graph_feeds([batch], {name: InputSpec((2, 4), torch.int64) for name in TWO})
    for found in (token_mask(called, Echo()), *map(token_mask, (named, filled, feed))):
        assert found is not None and np.array_equal(np.asarray(found), MASK == 1)


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_an_array_is_read_without_a_copy(consumer: str) -> None:
    array = arrays()[0]
    (found,) = CONSUMERS[consumer]([{"input_ids": array}])
    array[0, 0] = 7
    assert found[0, 0] == (1 if consumer == "exported graph" else 7)  # which is cut


def test_several_inputs():
    """By name in any order, or by position."""
    ids, mask = np.arange(6).reshape(2, 3), np.ones((2, 3), np.int64)
    by_name = named_batches([{"labels": ids, "attention_mask": mask, "input_ids": ids}], TWO)
    by_place = named_batches([(ids, mask)], TWO)
    assert list(by_name[0]) == list(by_place[0]) == ["input_ids", "attention_mask"]
    assert all(torch.equal(by_name[0][name], by_place[0][name]) for name in TWO)


def test_half_precision_and_empty_inputs():
    """Nothing past is an input of length 0."""
    inputs = {
        "x": InputSpec(("n", 3), torch.half),
        "past": InputSpec((None, 2, "past", 16), torch.float32),
    }
    past = np.zeros((2, 2, 0, 16), np.float32)
    (batch,) = named_batches([(np.zeros((2, 3), np.float16), past)], inputs)
    assert batch["x"].dtype == torch.half and batch["past"].shape == (2, 2, 0, 16)


ROW = np.zeros((2, 3), np.float32)
INTS = np.ones((2, 3), np.int64)
X = {"x": InputSpec(("n", 3), torch.float32)}

SOURCES: dict[str, tuple[Any, type[Exception], str]] = {
    "a single mapping": ({"x": INTS}, TypeError, "got dict; put a single batch into a list"),
    "a single array": (INTS, TypeError, "got ndarray; put a single batch into a list"),
    "a single tensor": (torch.ones(2, 3), TypeError, "got Tensor; put a single batch into a list"),
    "text": ("text", TypeError, "must be an iterable of batches, got str"),
    "a number": (3, TypeError, "iterable of batches, got int; a function"),
    "nothing": (None, TypeError, "iterable of batches, got NoneType; a function"),
    "function of nothing": (lambda: None, TypeError, "must return an iterable.*NoneType"),
    "empty": ([], ValueError, "at least one batch, it yielded none; a generator"),
    "a batch that is text": (["text"], TypeError, "batch 0 must be a .* got str"),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("mistake", SOURCES)
def test_every_consumer_names_the_mistake_alike(mistake: str, consumer: str) -> None:
    dataloader, error, match = SOURCES[mistake]
    with pytest.raises(error, match=match):
        CONSUMERS[consumer](dataloader)


@pytest.mark.parametrize("consumer", [iterate_batches, named_batches, graph_feeds])
def test_nan_is_named_with_its_input(consumer: Callable[..., Any]) -> None:
    data = [{"x": ROW}, {"x": ROW * np.nan}]
    arguments = (data,) if consumer is iterate_batches else (data, X)
    with pytest.raises(ValueError, match=r"batch 1 holds NaN in input 'x' .*remove it"):
        list(consumer(*arguments))


MISTAKES = {
    "missing": (
        [{"input_ids": INTS, "mask": INTS}],
        TWO,
        ValueError,
        r"batch 0 must hold the model's inputs input_ids, attention_mask; attention_mask is "
        r"missing, it holds input_ids, mask",
    ),
    "all missing": ([{"a": "text"}], TWO, ValueError, r"are missing, it holds nothing"),
    "too few": ([{"x": ROW}, ()], X, ValueError, r"batch 1 must hold .* x; x is missing"),
    "too many": ([(ROW, ROW, ROW)], X, ValueError, r"one array for each .*\(x\).*got 3 values"),
    "text": (["text"], X, TypeError, r"batch 0 must be a mapping .* got str"),
    "list of numbers": ([{"x": [1.0]}], X, TypeError, r"input 'x' must be an np.ndarray.*list"),
    "strings": ([{"x": np.array(["a"])}], X, TypeError, r"input 'x' must be .* numbers, got <U1"),
    "type": ([ROW.astype(float)], X, ValueError, r"input 'x' must be float32, got float64"),
    "ids": (
        [(INTS.astype(np.int32), INTS)],
        TWO,
        ValueError,
        r"input 'input_ids' must be int64, got int32",
    ),
    "rank": ([ROW[0]], X, ValueError, r"input 'x' must be of shape \[n, 3\], got \[3\]"),
    "width": ([ROW, ROW[:, :2]], X, ValueError, r"batch 1: .*\[n, 3\], got \[2, 2\]"),
    "no elements": ([ROW[:0]], X, ValueError, r"batch 0 must hold at least one element"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    dataloader, inputs, error, match = MISTAKES[mistake]
    with pytest.raises(error, match=match):
        named_batches(dataloader, inputs)


def filled(batch: Any, *names: str) -> dict[str, torch.Tensor]:
    ((_, found),) = filled_batches([batch], dict.fromkeys(names, InputSpec()))
    return found


def test_masks_and_positions_are_made_where_a_batch_has_none():
    names = ["input_ids", "attention_mask", "position_ids"]
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
    made = filled(ids, *names)
    assert list(made) == names
    assert made["attention_mask"].tolist() == [[1, 1, 1]]
    assert made["position_ids"].tolist() == [[0, 1, 2]]
    given = filled({"input_ids": ids, "attention_mask": mask}, *names)
    assert given["position_ids"].tolist() == [[0, 0, 1]]
    # The mask of a batch tells positions even where the graph takes none.
    hidden = filled({"input_ids": ids, "attention_mask": mask}, names[0], names[2])
    assert hidden["position_ids"].tolist() == [[0, 0, 1]]
    # A feed holds what the graph takes, and no more.
    assert list(graph_feeds([ids], dict.fromkeys(["input_ids"], InputSpec()))[0]) == ["input_ids"]
    assert list(filled(torch.zeros(1, 3, 4, 4), "image", "attention_mask")) == ["image"]
    assert torch.equal(filled({"input_ids": ids}, "tokens")["tokens"], ids)


def test_batches_are_cut_to_the_graph():
    """Windows are gathered across batches; rows of other inputs are taken apart."""
    ids = torch.arange(22).reshape(2, 11)
    feeds = graph_feeds([ids], {"input_ids": InputSpec((3, 5))})
    assert [f["input_ids"][:, 0].tolist() for f in feeds] == [[0, 5, 11]]
    free = graph_feeds([ids], {"input_ids": InputSpec(("n", "s"))})
    assert [f["input_ids"].tolist() for f in free] == [[row] for row in ids.tolist()]
    images = np.arange(8.0).reshape(4, 1, 2)
    cut = graph_feeds([images], {"image": InputSpec((2, 1, 2), torch.float64)})
    assert [f["image"].tolist() for f in cut] == [images[:2].tolist(), images[2:].tolist()]


def test_olive_data_container():
    """The real thing, where Olive is installed."""
    pytest.importorskip("olive", reason="Olive's data containers are an extra")
    from olive.data.config import DataComponentConfig, DataConfig
    from olive.data.registry import Registry

    @Registry.register_dataset("tiny_rows_for_a_test")
    def rows(**kwargs):
        return [({"input_ids": row}, 0) for array in arrays() for row in array]

    config = DataConfig(
        name="tiny",
        type="DataContainer",
        load_dataset_config=DataComponentConfig(type="tiny_rows_for_a_test"),
        dataloader_config=DataComponentConfig(params={"batch_size": 2}),
    )
    container = config.to_data_container()
    for source in (container, container.create_calibration_dataloader()):
        batches = named_batches(source, ONE)
        found = torch.cat([batch["input_ids"] for batch in batches])
        assert torch.equal(found, torch.tensor(np.concatenate(arrays())))
