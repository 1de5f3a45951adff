"""What may import what, and what `import aimet_ext` loads."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import pathlib
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

import aimet_ext
from aimet_ext.registry import public_homes

PACKAGE = pathlib.Path(aimet_ext.__file__).parent
STDLIB = sys.stdlib_module_names

# Modules: (what of ours, what from outside), the first pattern that fits. `errors`, `patterns`
# and `progress` are for all; `public` is the names that `import aimet_ext` offers.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": ({"registry"}, set()),
    "errors": (set(), set()),
    "patterns": (set(), set()),
    "progress": (set(), {"tqdm"}),
    "specs": (set(), {"pydantic"}),
    "config": (set(), {"pydantic"}),
    "registry": (set(), set()),
    "core*": ({"core", "config"}, {"torch"}),
    "files*": ({"files", "core", "config"}, {"torch", "safetensors", "pydantic"}),
    "data*": ({"data", "files", "core", "config"}, {"torch", "safetensors", "numpy"}),
    "walk*": ({"walk", "data", "files", "core", "config"}, {"torch"}),
    "models.huggingface": ({"models", "core", "config"}, {"torch", "transformers"}),
    "models*": (
        {"models", "walk", "data", "files", "core", "config"},
        {"torch", "transformers", "pydantic"},
    ),
    "onnx*": (
        {"onnx", "walk", "models", "data", "files", "core", "config"},
        {"torch", "numpy", "google", "onnx", "onnxruntime"},
    ),
    "sim.torch*": (
        {
            *("sim.torch", "sim.facts", "sim.points", "sim.protocol"),
            *("walk", "models", "data", "files", "core", "config"),
        },
        {"torch", "numpy", "aimet_torch"},
    ),
    "sim.onnx*": (
        {
            *("sim.onnx", "sim.facts", "sim.points", "sim.protocol", "onnx"),
            *("walk", "models", "data", "files", "core", "config"),
        },
        {"torch", "numpy", "aimet_onnx", "onnx", "onnx_ir", "onnxruntime"},
    ),
    "sim*": (
        {
            *("sim.protocol", "sim.facts", "sim.points"),
            *("walk", "models", "data", "core", "config"),
        },
        {"torch"},
    ),
    "grids*": (
        {"grids", "techniques", "sim", "models", "data", "files.reading", "core", "config"},
        {"torch"},
    ),
    "techniques.lpbq": (
        {"techniques", "grids", "core", "config"},
        {"torch"},
    ),
    "techniques.activation_ranges": (
        {
            *("techniques", "analysis", "sim.protocol", "sim.points", "files", "data", "core"),
            "config",
        },
        {"torch", "pydantic"},
    ),
    "techniques.layerwise.token_weights": (
        {"techniques", "analysis", "sim.protocol", "walk", "data", "core"},
        {"torch"},
    ),
    "techniques.rotating.keys": (
        {"techniques", "analysis", "data", "core", "config"},
        {"torch"},
    ),
    "techniques.dwq": (
        {
            *("techniques", "analysis", "evaluation", "sim.protocol", "sim.points"),
            *("models", "files", "data", "core", "config"),
        },
        {"torch", "pydantic"},
    ),
    "techniques*": (
        {
            *(
                "techniques",
                "registry",
                "sim.protocol",
                "sim.points",
                "walk",
                "models",
                "data",
                "files",
            ),
            *("core", "config"),
        },
        {"torch", "pydantic"},
    ),
    "recipes*": ({"recipes", "grids", "files", "config", "registry"}, {"pydantic", "yaml"}),
    "examples*": ({"examples"}, set()),
    "integrity*": (
        {"integrity", "onnx.index", "onnx.reading", "files", "core"},
        {"torch", "numpy", "safetensors", "onnx", "pydantic"},
    ),
    "evaluation*": (
        {"evaluation", "analysis", "sim", "walk", "models", "data", "core"},
        {"torch", "numpy"},
    ),
    "analysis.widths": (
        {
            *("analysis", "recipes", "sim.protocol", "grids.widths", "data", "core", "config"),
        },
        {"torch"},
    ),
    "analysis.model_weights": (
        {
            *("analysis", "sim.protocol", "sim.points", "sim.torch.setup", "sim.torch.unknown"),
            *("walk", "models", "data", "core", "config"),
        },
        {"torch"},
    ),
    "analysis.graph_weights": (
        {"analysis", "sim.protocol", "sim.points", "grids.onnx_layers", "data", "core", "config"},
        {"torch"},
    ),
    "analysis.weight_costs": (
        {"analysis", "sim.points", "data", "config"},
        {"torch"},
    ),
    "analysis.widths_report": (
        {"drawing", "recipes", "files", "config"},
        {"pydantic"},
    ),
    "drawing*": ({"drawing"}, {"matplotlib", "jinja2", "markupsafe"}),
    "reporting*": (
        {
            *("reporting", "drawing", "analysis", "techniques", "recipes", "sim.protocol"),
            *("files", "core", "config"),
        },
        {"torch", "pydantic", "yaml"},
    ),
    "analysis*": (
        {
            *("analysis", "drawing", "sim.protocol", "sim.points", "walk.hooks"),
            *("data", "files", "core"),
        },
        {"torch", "pydantic"},
    ),
    "artifact*": (
        {"artifact", "integrity", "grids", "sim", "onnx", "models", "data", "files", "core"},
        {"torch", "numpy", "onnx", "safetensors", "pydantic"},
    ),
    "linting*": (
        {"linting", "integrations.qnn_targets", "sim.protocol", "sim.facts", "config"},
        set(),
    ),
    "verification*": (
        {
            *("verification", "linting", "integrity", "artifact", "integrations"),
            *("evaluation", "sim", "onnx", "models", "data", "files", "core"),
        },
        {"torch", "numpy", "onnx"},
    ),
    "lora*": (
        {"lora", "artifact", "grids", "sim", "onnx", "models", "data", "files", "core", "config"},
        {"torch", "safetensors", "pydantic"},
    ),
    "integrations.olive*": (
        {"integrations", "registry", "sim", "files", "config", "reporting.writing", "public"},
        {"olive", "onnx", "pydantic"},
    ),
    "integrations.qnn*": (
        {"integrations", "onnx", "files"},
        {"numpy", "onnx", "onnxruntime", "onnxruntime_qnn", "safetensors"},
    ),
    "cli*": (
        {
            *("cli", "verification", "lora", "artifact", "integrations", "models", "files"),
            *("onnx", "data", "reporting", "drawing.page"),
            *("sim.protocol", "core", "config", "registry", "recipes", "public"),
        },
        {"typer", "torch", "transformers", "numpy"},
    ),
    "integrations": (set(), set()),
    "__main__": ({"cli"}, set()),
}


def rule_of(module: str) -> tuple[set[str], set[str]]:
    """Return the rule of a module, named without the package: ``sim.torch.adaptor``."""
    return next(rule for name, rule in RULES.items() if fnmatch.fnmatchcase(module, name))


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the dotted names a source imports, wherever in it; TYPE_CHECKING blocks are types."""
    full = f"aimet_ext.{module}" if module != "__init__" else "aimet_ext"
    package = full if is_package else full.rpartition(".")[0]
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped.update(inner for child in node.body for inner in ast.walk(child))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]])
                base += f".{node.module}" if node.module else ""
            if base == "aimet_ext":
                yield from (f"aimet_ext.{alias.name}" for alias in node.names)
            elif base.startswith("aimet_ext."):
                # `from aimet_ext.sim.torch import adaptor` imports the module, not a name of it.
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what a source imports against the rules."""
    ours, outside = rule_of(module)
    found = []
    for name in imported(source, module, is_package):
        top, _, rest = name.partition(".")
        if top == "aimet_ext":
            allowed = ours | {"errors", "patterns", "progress", "specs", "__version__"}
            if any(f"{rest}.".startswith(f"{package}.") for package in allowed):
                continue
            if "public" in ours and (not rest or rest in aimet_ext.__all__):
                continue
        elif top in STDLIB or top in outside:
            continue
        found.append(f"aimet_ext.{module} imports {name}")
    return found


def sources() -> list[tuple[str, pathlib.Path]]:
    """Return every module's dotted name without the package, and its file."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found.append((".".join(parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda value: str(value)[-40:])
def test_imports_follow_the_rules(module: str, path: pathlib.Path) -> None:
    source = path.read_text("utf-8")
    assert violations(source, module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.affine", "import numpy"),
        ("core.affine", "from aimet_ext.models import topology"),
        ("core.affine", "from ..models.topology import find_blocks"),
        ("walk.stream", "def f():\n    import transformers"),
        ("walk.stream", "import onnx"),
        ("sim.torch.adaptor", "import onnxruntime"),
        ("sim.torch.adaptor", "from aimet_ext.sim.onnx import adaptor"),
        ("sim.onnx.adaptor", "import aimet_torch"),
        ("onnx.graph", "import aimet_onnx"),
        ("sim.protocol", "from aimet_torch import QuantizationSimModel"),
        ("files.ledger", "from aimet_ext.sim.protocol import adapt"),
        ("techniques.omniquant", "from aimet_ext.sim.torch import adaptor"),
        ("techniques.omniquant", "import aimet_torch.quantsim"),
        ("cli.jobs", "from aimet_ext.techniques import omniquant"),
        ("config", "from aimet_ext import core"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert violations(source, module)


def test_types_alone_may_be_imported_from_anywhere() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import aimet_torch"
    assert violations(source, "core.affine") == []


# ------------------------------------------------------------------------------ the light import


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that sees the package which is tested here."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("module", ["aimet_ext", "aimet_ext.cli", "aimet_ext.examples"])
def test_import_is_light(module: str) -> None:
    heavy = {"torch", "aimet_torch", "aimet_onnx", "transformers", "peft", "onnx", "onnxruntime"}
    done = python(f"import {module}\nprint(sorted({heavy!r} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "hidden", "extra"),
    [
        ("prepare_model", "transformers", "torch"),
        ("create_sim", "aimet_torch", "torch"),
    ],
)
def test_a_missing_extra_names_the_pip_line(name: str, hidden: str, extra: str) -> None:
    """Getting the name or calling it, one of both, says what to install."""
    done = python(
        "import builtins, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {hidden!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "import aimet_ext, torch\n"
        "try:\n"
        f"    aimet_ext.{name}(torch.nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.long))\n"
        "except aimet_ext.MissingExtraError as error:\n"
        "    print(error)\n"
    )
    assert hidden in done.stdout, done.stderr
    assert f'pip install "aimet-ext[{extra}]"' in done.stdout


@pytest.mark.parametrize("name", ["export", "load", "set_lpbq", "lora.bake_adapter", "lint"])
def test_what_serves_onnx_needs_no_aimet_torch(name: str) -> None:
    done = python(
        "import sys\nsys.modules['aimet_torch'] = None\nimport aimet_ext\n"
        f"print(callable(aimet_ext.{name}))"
    )
    assert done.stdout.strip() == "True", done.stderr


# ------------------------------------------------------------------------------ the public names


def test_every_public_name_is_there_and_stays_what_it_is() -> None:
    """Also once all subpackages are imported: none of them has the name of a function."""
    modules = [
        found.name
        for found in pkgutil.walk_packages([str(PACKAGE)], "aimet_ext.")
        if not found.name.startswith("aimet_ext.integrations")
    ]
    for module in modules:
        importlib.import_module(module)
    for name in aimet_ext.__all__:
        value = getattr(aimet_ext, name)
        assert name in dir(aimet_ext)
        assert isinstance(value, types.ModuleType) == (name in ("examples", "lora")), name


def test_the_lazy_names_are_the_ones_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {**aimet_ext._HOMES, **public_homes()}
    assert aimet_ext._HOMES.items() <= seen.items() <= homes.items()
    assert sorted(homes) == sorted(set(aimet_ext.__all__) - {"__version__"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'apply_magic'"):
        aimet_ext.apply_magic  # noqa: B018
