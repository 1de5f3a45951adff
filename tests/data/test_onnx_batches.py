"""Calibration batches for ONNX models: all forms give the same inputs, mistakes are named."""

from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models
from onnx import TensorProto, helper

from aimet_ext.data.onnx_batches import filled_values, onnx_batches


def inputs(**shapes):
    """Value infos; integers for names of token ids and masks."""
    ints = ("input_ids", "attention_mask")
    kinds = {n: TensorProto.INT64 if n in ints else TensorProto.FLOAT for n in shapes}
    return {n: helper.make_tensor_value_info(n, kinds[n], shape) for n, shape in shapes.items()}


ONE = inputs(x=["n", 3])
TWO = inputs(input_ids=["n", "s"], attention_mask=["n", "s"])


def arrays(count=3):
    return [np.full((2, 3), number, np.float32) for number in range(count)]


class Reader:
    """As onnxruntime's calibration wants it."""

    def __init__(self):
        self.rewind()

    def get_next(self):
        return next(self.items, None)

    def rewind(self):
        self.items = iter({"x": array} for array in arrays())


class Container:
    """As Olive's data containers: a data loader of pairs of a mapping and a label."""

    def create_dataloader(self):
        rows = [({"x": row}, 0) for array in arrays() for row in array]
        return DataLoader(rows, batch_size=2)


class ByIndex(Dataset):
    """Knows its length and raises nothing beyond it."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"x": arrays()[min(index, 2)]}


FORMS = {
    "list of mappings": lambda: [{"x": array} for array in arrays()],
    "tuple of mappings": lambda: tuple({"x": array} for array in arrays()),
    "tensors": lambda: [{"x": torch.from_numpy(array)} for array in arrays()],
    "single arrays": arrays,
    "single tensors": lambda: [torch.from_numpy(array) for array in arrays()],
    "positional": lambda: [(array,) for array in arrays()],
    "positional and a label": lambda: [[array, np.zeros(2)] for array in arrays()],
    "other mappings": lambda: [UserDict(x=array) for array in arrays()],
    "mapping and a label": lambda: [({"x": array}, 5) for array in arrays()],
    "positional, in a pair with a label": lambda: [((array,), 5) for array in arrays()],
    "further keys": lambda: [{"labels": "no array", "x": array} for array in arrays()],
    "generator": lambda: ({"x": array} for array in arrays()),
    "generator function": lambda: lambda: ({"x": array} for array in arrays()),
    "function that returns a list": lambda: arrays,
    "torch DataLoader": lambda: DataLoader(np.concatenate(arrays()), batch_size=2),
    "DataLoader with labels": lambda: DataLoader(
        [(row, 1) for row in np.concatenate(arrays())], batch_size=2
    ),
    "data set without __iter__": ByIndex,
    "reader": Reader,
    "container": Container,
    "read-only arrays": lambda: [np.broadcast_to(a[:1], (2, 3)) for a in arrays()],
    "reversed arrays": lambda: [a[::-1] for a in arrays()],
    "big endian": lambda: [a.astype(">f4") for a in arrays()],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same(form):
    batches = onnx_batches(FORMS[form](), ONE)
    assert [list(batch) for batch in batches] == [["x"]] * 3
    for batch, expected in zip(batches, arrays(), strict=True):
        assert torch.equal(batch["x"], torch.from_numpy(expected))


def test_a_reader_is_read_from_the_beginning_each_time():
    reader = Reader()
    assert len(onnx_batches(reader, ONE)) == len(onnx_batches(reader, ONE)) == 3


def test_arrays_are_not_copied():
    array = arrays()[0]
    (batch,) = onnx_batches([{"x": array}], ONE)
    array[0, 0] = 7
    assert batch["x"][0, 0] == 7


def test_several_inputs():
    """By name in any order, or by position."""
    ids, mask = np.arange(6).reshape(2, 3), np.ones((2, 3), np.int64)
    by_name = onnx_batches([{"labels": ids, "attention_mask": mask, "input_ids": ids}], TWO)
    by_place = onnx_batches([(ids, mask)], TWO)
    assert list(by_name[0]) == list(by_place[0]) == ["input_ids", "attention_mask"]
    assert all(torch.equal(by_name[0][name], by_place[0][name]) for name in TWO)


def test_half_precision_and_empty_inputs():
    """Nothing past is an input of length 0."""
    model, _ = onnx_models.genai_llama()
    graph_inputs = {value.name: value for value in model.graph.input}
    (batch,) = onnx_batches([onnx_models.genai_inputs(model, [[3, 4, 5]])], graph_inputs)
    assert batch["past_key_values.0.key"].shape == (1, 2, 0, 16)
    half = {"x": helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 3])}
    assert onnx_batches([arrays()[0].astype(np.float16)], half)[0]["x"].dtype == torch.half


ROW = np.zeros((2, 3), np.float32)
IDS = np.ones((2, 3), np.int64)
MISTAKES = {
    "a single mapping": ({"x": ROW}, ONE, TypeError, r"single dict; put it into a list"),
    "a single array": (ROW, ONE, TypeError, r"single ndarray; put it into a list"),
    "a number": (3, ONE, TypeError, r"iterable of batches or a function.*got int"),
    "nothing": (None, ONE, TypeError, r"iterable of batches or a function.*got NoneType"),
    "function of nothing": (lambda: None, ONE, TypeError, r"must return an iterable.*NoneType"),
    "empty": ([], ONE, ValueError, r"at least one batch, it yielded none; a generator"),
    "missing": (
        [{"input_ids": IDS, "mask": IDS}],
        TWO,
        ValueError,
        r"batch 0 must hold the model's inputs input_ids, attention_mask; attention_mask is "
        r"missing, it holds input_ids, mask",
    ),
    "all missing": ([{"a": "text"}], TWO, ValueError, r"are missing, it holds nothing"),
    "too few": ([{"x": ROW}, ()], ONE, ValueError, r"batch 1 must hold .* x; x is missing"),
    "too many": ([(ROW, ROW, ROW)], ONE, ValueError, r"one array for each .*\(x\).*got 3 values"),
    "text": (["text"], ONE, TypeError, r"batch 0 must be a mapping .* got str"),
    "list of numbers": ([{"x": [1.0]}], ONE, TypeError, r"input 'x' must be an np.ndarray.*list"),
    "strings": ([{"x": np.array(["a"])}], ONE, TypeError, r"input 'x' must be .* numbers, got <U1"),
    "type": ([ROW.astype(float)], ONE, ValueError, r"input 'x' must be float32, got float64"),
    "ids": (
        [(IDS.astype(np.int32), IDS)],
        TWO,
        ValueError,
        r"input 'input_ids' must be int64, got int32",
    ),
    "rank": ([ROW[0]], ONE, ValueError, r"input 'x' must be of shape \[n, 3\], got \[3\]"),
    "width": ([ROW, ROW[:, :2]], ONE, ValueError, r"batch 1: .*\[n, 3\], got \[2, 2\]"),
    "NaN": ([ROW, ROW * np.nan], ONE, ValueError, r"batch 1: input 'x' holds NaN; remove it"),
    "no elements": ([ROW[:0]], ONE, ValueError, r"batch 0 must hold at least one element"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    dataloader, graph_inputs, error, match = MISTAKES[mistake]
    with pytest.raises(error, match=match):
        onnx_batches(dataloader, graph_inputs)


def test_masks_and_positions_are_made_where_they_are_inputs():
    names = ["input_ids", "attention_mask", "position_ids"]
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
    made = filled_values(ids, names, 0)
    assert list(made) == names
    assert made["attention_mask"].tolist() == [[1, 1, 1]]
    assert made["position_ids"].tolist() == [[0, 1, 2]]
    given = filled_values({"input_ids": ids, "attention_mask": mask}, names, 0)
    assert given["position_ids"].tolist() == [[0, 0, 1]]
    # The mask of a batch tells positions even where the graph takes none.
    hidden = filled_values({"input_ids": ids, "attention_mask": mask}, [names[0], names[2]], 0)
    assert list(hidden) == [names[0], names[2]]
    assert hidden["position_ids"].tolist() == [[0, 0, 1]]
    assert list(filled_values(ids, ["input_ids"], 0)) == ["input_ids"]
    assert list(filled_values(torch.zeros(1, 3, 4, 4), ["image", "attention_mask"], 0)) == ["image"]


def test_olive_data_container():
    """The real thing, where Olive is installed."""
    pytest.importorskip("olive", reason="Olive's data containers are an extra")
    from olive.data.config import DataComponentConfig, DataConfig
    from olive.data.registry import Registry

    @Registry.register_dataset("tiny_rows_for_a_test")
    def rows(**kwargs):
        return [({"x": row}, 0) for array in arrays() for row in array]

    config = DataConfig(
        name="tiny",
        type="DataContainer",
        load_dataset_config=DataComponentConfig(type="tiny_rows_for_a_test"),
        dataloader_config=DataComponentConfig(params={"batch_size": 2}),
    )
    container = config.to_data_container()
    for source in (container, container.create_calibration_dataloader()):
        batches = onnx_batches(source, ONE)
        assert torch.equal(
            torch.cat([b["x"] for b in batches]), torch.tensor(np.concatenate(arrays()))
        )
