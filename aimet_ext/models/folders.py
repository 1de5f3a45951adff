"""Model folders of Hugging Face, read without running their code and without a network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel

from aimet_ext.errors import CorruptFileError, some
from aimet_ext.files.reading import naming, open_safetensors, read_json

_CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Layers of a model, and experts of a layer: Doge's has 16,384 by default.
_MOST = {"layer": 4096, "expert": 2**16}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class _Shards(BaseModel):
    weight_map: dict[str, str]


def read_config(folder: Path) -> Any:
    """Read the configuration of a model folder.

    :raises ValueError: there is none, or it asks for code of its own.
    :raises CorruptFileError: it is damaged.
    """
    if not (folder / _CONFIG).is_file():
        raise ValueError(
            f"{folder}: the folder of a Hugging Face model is required, but it has no {_CONFIG}"
        )
    content = read_json(folder / _CONFIG)
    kind = str(content.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        own = " from the Python code that auto_map names, which is not run" * (
            "auto_map" in content
        )
        raise ValueError(
            f"{folder / _CONFIG}: a model_type that transformers {transformers.__version__} has is "
            f"required, got {kind!r}{own}; load such a model yourself and pass it to create_sim"
        )
    _check_counts(folder / _CONFIG, content)
    with _named(folder / _CONFIG):
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def _check_counts(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse counts and sizes below 0, and numbers of layers or experts that only take time.

    :raises CorruptFileError: The field is named.
    """
    for key, value in content.items():
        if isinstance(value, dict):
            _check_counts(path, value)
        elif re.search("^(num|max)_|_(size|dim)$", key) and isinstance(value, int) and value < 0:
            raise CorruptFileError(f"{path}: {key} of at least 0 is required, got {value}")
        for word, most in _MOST.items():
            if word in key and isinstance(value, int) and value > most:
                raise CorruptFileError(
                    f"{path}: {key} of at most {most} is required, got {str(value)[:20]}"
                )


def read_causal_lm(folder: Path, **options: Any) -> Any:
    """Load a causal language model with all its weights from safetensors.

    :param options: Further options of ``AutoModelForCausalLM.from_pretrained``.
    :returns: the model in evaluation mode.
    :raises ValueError: the folder holds no such model, code of its own, pickled weights, or too few
        of them.
    :raises FileNotFoundError: the folder has no weights.
    :raises CorruptFileError: a file is damaged.
    """
    config = read_config(folder)
    for file in weight_files(folder):
        open_safetensors(file)
    with _named(folder), _quiet():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder}: all weights of the model are required, but {some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} absent; {_CONFIG} and weights are not of one "
            "model, or a file is missing"
        )
    return model.eval()


def empty_causal_lm(folder: Path, config: Any, device: str = "meta") -> Any:
    """Make the causal language model of a configuration, with random weights, or none on "meta".

    :param folder: Folder to name in an error.
    :returns: the model in evaluation mode.
    :raises ValueError: transformers has no such model.
    """
    with _named(folder), _quiet(), torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def stored_tensors(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Return type, numbers and bytes of each tensor in the files of a model, which are not read.

    :raises FileNotFoundError: there are none.
    :raises CorruptFileError: a file is damaged.
    """
    found = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                stored = file.get_slice(name)
                count, dtype = math.prod(stored.get_shape()), str(stored.get_dtype())
                bits = int(re.sub(r"^\D+(\d+).*$|^.*$", r"\1", dtype) or 8)
                found[name] = dtype, count, count * bits // 8
    return found


def read_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    :raises ValueError: the folder holds none.
    :raises CorruptFileError: a file is damaged.
    """
    for file in sorted(folder.glob("*token*.json")):
        read_json(file)
    with _named(folder, "the tokenizer"):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer.encode("text", add_special_tokens=False)
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model.

    :raises FileNotFoundError: there is none, or a shard is absent.
    :raises ValueError: the weights are pickled.
    :raises CorruptFileError: the index of shards is damaged.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        names = sorted(set(read_json(folder / _INDEX, _Shards).weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CorruptFileError(
                f"{folder / _INDEX}: files of the folder are required, got {some(outside)}"
            )
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder}: {some(absent)} of {_INDEX} is absent")
        return [folder / name for name in names]
    for pickle in _PICKLES:
        if (folder / pickle).is_file():
            raise ValueError(
                f"{folder / pickle} is a pickle, which can run code when it is read, and is "
                "refused; load the model with transformers and save it with save_pretrained"
            )
    raise FileNotFoundError(f"{folder}: a model with {_WEIGHTS} or {_INDEX} is required")


def _named(place: Path, what: str = "the model") -> AbstractContextManager[None]:
    """Return a context in which an error of transformers, of whatever kind, names the file."""
    return naming(place, torch.OutOfMemoryError, problem=f"{what} could not be loaded")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep away reports and bars of transformers: what matters of them is an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
