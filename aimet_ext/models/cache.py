"""Models by the name that they have on the Hugging Face hub, out of the local cache alone."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from aimet_ext.errors import require
from aimet_ext.patterns import meant

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def model_folder(name: str) -> Path:
    """Return the folder of a model: the one of this path, or else the cached one of this name.

    Nothing is downloaded. The cache is where huggingface_hub keeps it, which ``HF_HOME`` decides.

    :param name: Path of a folder, or a name such as ``"org/model"``, also ``"org/model@revision"``.
    :raises FileNotFoundError: it is neither a folder, nor all of it in the cache; the message says
        what was looked for, and how to get it.
    :raises MissingExtraError: it is no folder, and huggingface_hub is not installed.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise FileNotFoundError(f"a folder is required, or a file that ends in .onnx, got {name}")
    if name.lower().endswith(".onnx"):
        raise FileNotFoundError(f"there is no file {name}{_like(name)}")
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(
            f"a folder, or a name such as org/model, is required, got {name}: there is no such "
            f"folder, and no model of the Hugging Face hub is called so{_like(name)}"
        )
    hub = require("huggingface_hub", "torch")
    errors = require("huggingface_hub.errors", "torch")
    known, _, revision = name.partition("@")
    try:
        found = hub.snapshot_download(known, revision=revision or None, local_files_only=True)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        raise _absent(name, "it is not there") from error
    folder = Path(found)
    files = {file.name for file in folder.iterdir() if file.exists()}  # links may hang
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise _absent(name, f"only {', '.join(sorted(files)) or 'an empty folder'} is there")
    from aimet_ext.models.folders import weight_files  # imports transformers, which comes next

    try:
        weight_files(folder)
    except FileNotFoundError as error:
        raise _absent(name, f"not all of it is: {error}") from error
    return folder


def _like(name: str) -> str:
    """Return a question after paths like one that is absent, or how much of its folder exists."""
    parent = Path(name).parent
    if not parent.is_dir():
        last = next(each for each in parent.parents if each.is_dir())
        return f"; the path exists as far as {last.resolve()}"
    names = get_close_matches(Path(name).name, sorted(path.name for path in parent.iterdir()))
    return meant(str(parent / each) for each in names)


def model_name(folder: Path) -> str:
    """Return what a model is called: its name on the hub if it is in the cache, else its folder's.

    :param folder: Folder of the model; in the cache, where a commit names it,
        ``models--ORG--MODEL/snapshots/COMMIT``.
    """
    place = folder.resolve()
    kind, _, name = place.parent.parent.name.partition("--")
    if kind != "models" or place.parent.name != "snapshots":
        return place.name
    return name.replace("--", "/", 1)


def _absent(name: str, found: str) -> FileNotFoundError:
    constants = require("huggingface_hub.constants", "torch")
    known, _, revision = name.partition("@")
    more = f" --revision {revision}" if revision else ""
    return FileNotFoundError(
        f"{name} is no folder, and as a name of the Hugging Face hub it is looked for in the local "
        f"cache {constants.HF_HUB_CACHE}, where {found}. Nothing is downloaded here; get it with: "
        f"hf download {known}{more} (huggingface-cli download in older versions); or give the path "
        f"of a folder or .onnx file{_like(name) if Path(name).parent.is_dir() else ''}"
    )
