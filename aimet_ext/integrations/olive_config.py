"""Olive's package configuration with the pass of this package in the place of Olive's own."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

from aimet_ext.errors import CorruptFileError, MissingExtraError
from aimet_ext.files.reading import read_json
from aimet_ext.registry import TECHNIQUES

#: Name of the pass, in a workflow and in a package configuration, where its case does not count.
PASS = "AimetQuantization"
# Names that Olive allows as algorithms of a pass; OmniQuant is none of them.
_ALGORITHMS = {"awq", "gptq", "hqq", "quarot", "rtn", "spinquant"}
_MODULE_PATH = f"aimet_ext.integrations.olive.{PASS}"


def package_config(base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return Olive's package configuration, with this package's pass instead of its own.

    Olive reads such a file instead of its own one, and so it holds all passes.

    :param base: another package configuration to start from; None for the installed Olive's.
    :returns: what ``olive run --package-config`` and ``olive.workflows.run`` take.
    :raises ValueError: ``base`` is no package configuration.
    :raises MissingExtraError: Olive is not installed.

    >>> olive.workflows.run("workflow.json", package_config=package_config())
    """
    merged = _of_olive() if base is None else copy.deepcopy(base)
    passes = merged.get("passes") if isinstance(merged, dict) else None
    if not isinstance(passes, dict):
        raise ValueError(  # noqa: TRY004 - what is wrong is a file
            'a package configuration must be an object with the passes under "passes", '
            f"got {', '.join(merged) or 'nothing' if isinstance(merged, dict) else merged!r}"
        )
    name = next((key for key in passes if key.lower() == PASS.lower()), None)
    if name is None:
        raise ValueError(
            f"a package configuration that has {PASS} is required, since Olive says in it what the "
            f"pass runs on; got the passes {', '.join(sorted(passes)) or '(none)'}"
        )
    entry = passes[name]
    entry["module_path"] = _MODULE_PATH
    ours = [row.olive for row in TECHNIQUES.values() if row.olive in _ALGORITHMS]
    entry["supported_algorithms"] = list(
        dict.fromkeys([*entry.get("supported_algorithms", []), *ours])
    )
    return merged


def write_package_config(output: Path, base: Path | None) -> None:
    """Write Olive's package configuration with the pass of this package in it.

    :param base: Another package configuration to start from; None for Olive's own.
    :raises FileExistsError: ``output`` is a file that is no such configuration.
    :raises CorruptFileError: ``base`` is no JSON.
    :raises ValueError: ``base`` is no package configuration.
    """
    merged = package_config(None if base is None else _read(base))
    if output.exists():
        _check_ours(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(merged, indent=4) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise CorruptFileError(f"{path} must be a JSON file, but {error}") from error


def _check_ours(path: Path) -> None:
    """Refuse to replace what this package did not write."""
    try:
        passes = read_json(path)["passes"].values()
        ours = any(entry["module_path"].startswith("aimet_ext.") for entry in passes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"{path} is there and was not written by this command; name another file with --output"
        )


def _of_olive() -> dict[str, Any]:
    """Return Olive's own configuration, without the slow import of Olive."""
    found = importlib.util.find_spec("olive")
    if found is None or found.origin is None:
        raise MissingExtraError(
            "olive is needed here and is not installed. "
            'Install it with: pip install "aimet-ext[olive]"'
        )
    text = (Path(found.origin).parent / "olive_config.json").read_text("utf-8")
    return json.loads(text)
