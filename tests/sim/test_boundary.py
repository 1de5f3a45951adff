"""All knowledge of AIMET is in ``aimet_ext.sim``: other code asks the adaptor of a simulation."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

import aimet_ext

PACKAGE = pathlib.Path(aimet_ext.__file__).parent
# Containers, methods and attributes of AIMET's simulations, layers and quantizers.
_NAMES = frozenset(
    {
        *("param_quantizers", "input_quantizers", "output_quantizers", "qc_quantize_op_dict"),
        *("named_quantizers", "named_qmodules", "qmodules", "connected_graph", "quant_args"),
        *("is_overwrite_allowed", "allow_overwrite", "is_initialized", "is_encoding_frozen"),
        *("get_scale", "get_offset", "get_min", "get_max", "compute_param_encodings"),
        *("register_quantization_parameter", "get_original_model", "tensor_quantizer_params"),
    }
)
# Where the names that AIMET gives quantizers are part of a file's format.
_FORMAT = "files/tensors.py"


def knowledge(source: str) -> list[str]:
    """Return what a source knows of AIMET; types and docstrings may name it."""
    tree = ast.parse(source)
    skipped = {id(node) for node in _types_and_docstrings(tree)}
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    return [ast.unparse(node) for node in nodes if _imports(node) or _knows(node)]


def _imports(node: ast.AST) -> bool:
    """Return True for an import of AIMET."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(name.partition(".")[0] in ("aimet_torch", "aimet_onnx") for name in modules)


def _knows(node: ast.AST) -> bool:
    """Return True for a name of AIMET's, a private of a sim, or a dispatch by what a sim has."""
    match node:
        case ast.Attribute():
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            return node.attr in _NAMES or (private and _is(node.value, "sim"))
        case ast.Constant(value=str(text)):
            return any(part in _NAMES for part in text.split("."))
        case ast.Call(func=ast.Name(id="hasattr")):
            return _is(node.args[0], "sim", "adaptor")
        case ast.Compare(left=inner) | ast.Subscript(slice=inner):
            return _is_class_name(inner)
    return False


def _types_and_docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (inner for child in node.body for inner in ast.walk(child))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def _is(node: ast.AST, *names: str) -> bool:
    """Return True for a variable or attribute of one of these names."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    return name in names


def _is_class_name(node: ast.AST) -> bool:
    """Return True for ``type(sim).__name__``, and the same of an adaptor."""
    if not isinstance(node, ast.Attribute) or node.attr not in ("__name__", "__qualname__"):
        return False
    call = node.value
    if not isinstance(call, ast.Call) or not _is(call.func, "type"):
        return False
    return _is(call.args[0], "sim", "adaptor")


def sources() -> list[str]:
    """Return the files of the package outside ``sim/``."""
    found = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return [path for path in found if not path.startswith("sim/") and path != _FORMAT]


@pytest.mark.parametrize("path", sources())
def test_nothing_outside_sim_knows_aimet(path: str) -> None:
    assert knowledge((PACKAGE / path).read_text("utf-8")) == []


def test_the_format_names_quantizers_and_nothing_else() -> None:
    found = knowledge((PACKAGE / _FORMAT).read_text("utf-8"))
    assert found
    assert all("param_quantizers." in text and "=" not in text for text in found)


@pytest.mark.parametrize(
    "source",
    [
        "import aimet_torch",
        "def f():\n    from aimet_onnx.quantsim import QuantizationSimModel",
        "layer.param_quantizers['weight'] = None",
        "bits = sim.model.layer.output_quantizers[0].bitwidth",
        "every = adaptor.sim.qc_quantize_op_dict.values()",
        "found = dict(sim.named_quantizers())",
        "operators = sim.connected_graph.ordered_ops",
        "sim._rebuild_session()",
        "adaptor.sim._excluded_layer_names",
        "frozen = not quantizer.is_overwrite_allowed()",
        "leaf = hasattr(module, 'param_quantizers')",
        "weights = [name for name in names if '.param_quantizers.' in name]",
        "owner = f'{layer}.param_quantizers.{key}'",
        "if hasattr(sim, 'session'):\n    pass",
        "if hasattr(adaptor, 'graph'):\n    pass",
        "if type(adaptor).__name__ == 'OnnxSim':\n    pass",
        "table = TABLES[type(adaptor).__name__]",
    ],
)
def test_a_planted_violation_is_found(source: str) -> None:
    assert knowledge(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""The quantizers of aimet_torch, in layer.param_quantizers."""',
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import aimet_torch",
        "kind = type(error).__name__",
        "raise TypeError(f'a simulation is required, got {type(sim).__name__}')",
        "module = require('aimet_torch', 'torch')",
        "adapt(sim).weight_quantizer(name)",
    ],
)
def test_words_and_types_are_free(source: str) -> None:
    assert knowledge(source) == []
