"""Every public name is in the API pages, and its docstring says what a caller has to know."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest

import aimet_ext

pytest.importorskip("aimet_torch")
pytest.importorskip("peft")
ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMESPACES = (aimet_ext, aimet_ext.lora, aimet_ext.examples)

# What these implement was published, or is AIMET's, or is of this project.
METHODS = [name for name in aimet_ext.__all__ if name.startswith("apply_")]
METHODS += ["analyze", "assign_widths", "set_blockwise", "set_lpbq"]
SOURCE = re.compile(r"^Source: .*(?:arXiv \d{4}\.\d{5}|https://|AIMET|this project)", re.M)
# Arguments that hold tensors, or arrays, of a shape that a caller has to give.
TENSORS = {"dataloader", "batches", "sample_input_ids", "dummy_input", "ids", "input_ids"}
SHAPE = re.compile(r"``\[\w+.*?\]``|\[\w+, \w+\]|:(?:func|class|meth):`|[Nn]ot needed|techniques")


def public() -> Iterator[tuple[str, Any]]:
    """Yield all public names with what they are, those of public classes too."""
    for space in NAMESPACES:
        for name in space.__all__:
            value = getattr(space, name)
            if name.startswith("_") or inspect.ismodule(value):
                continue
            yield f"{space.__name__}.{name}", value
            for member, inner in vars(value).items() if inspect.isclass(value) else ():
                own = getattr(inner, "__module__", "").startswith("aimet_ext")
                if not member.startswith("_") and isinstance(inner, FunctionType) and own:
                    yield f"{space.__name__}.{name}.{member}", inner


NAMES = dict(public())
FUNCTIONS = {name: value for name, value in NAMES.items() if isinstance(value, FunctionType)}
CLASSES = {name: value for name, value in NAMES.items() if inspect.isclass(value)}


def fields(value: Any) -> dict[str, str]:
    """Return the ``:param …:`` fields of a docstring, by name."""
    return dict(
        re.findall(
            r"^ *:param (\w+): ((?:.|\n)*?)(?=\n *:|\n\n|\Z)", inspect.getdoc(value) or "", re.M
        )
    )


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def is_method(name: str) -> bool:
    return name.rpartition(".")[0] in CLASSES


def test_the_pages_list_every_public_name_once() -> None:
    pages = "\n".join(path.read_text("utf-8") for path in (ROOT / "apiref").rglob("*.rst"))
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: (\S+)", pages, re.M)
    for module, members in re.findall(r"^\.\. automodule:: (\S+)\n    :members: (.+)", pages, re.M):
        listed += [f"{module}.{name}" for name in members.split(", ")]
    assert len(listed) == len(set(listed))
    assert {name for name in NAMES if not is_method(name)} - set(listed) == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_raises(name: str) -> None:
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function) or ""
    assert re.match(r"[A-Z][a-z]+[a-rt-z] ", doc), "begin with a verb"
    taken = parameters(function)
    # Methods show or write what their object holds; what takes nothing has nothing to refuse.
    if taken and not is_method(name):
        assert [each for each in taken if each not in fields(function)] == []
        assert re.search(r"^:raises \w+: \S", doc, re.M)


@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if TENSORS & {*fields(FUNCTIONS[name])}]
)
def test_tensors_have_shapes(name: str) -> None:
    said = fields(FUNCTIONS[name])
    assert [each for each in TENSORS & {*said} if not SHAPE.search(said[each])] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_source(name: str) -> None:
    assert SOURCE.search(inspect.getdoc(getattr(aimet_ext, name)))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_its_fields_are(name: str) -> None:
    value = CLASSES[name]
    assert len((inspect.getdoc(value) or "").split()) >= 2
    named = (
        [each.name for each in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    )
    named += getattr(value, "model_fields", {})
    said = {each for base in value.__mro__ for each in fields(base)}
    assert [each for each in named if not each.startswith("_") and each not in said] == []
