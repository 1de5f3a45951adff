"""Weights that an adapter belongs to, by their original names, read one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimet_ext.files.manifest import CONFIG, WEIGHTS, is_export, read_manifest
from aimet_ext.files.reading import open_safetensors, read_json
from aimet_ext.files.tensors import hash_tensors
from aimet_ext.models.folders import weight_files
from aimet_ext.models.huggingface import causal_lm, checkpoint_prefix
from aimet_ext.models.padding import pad_rows

# What peft puts into the names of a model's own parameters, and names of parameters of its own.
_AROUND = re.compile(r"\.(token_adapter\.)?(base_layer|original_module)\.")
_OF_PEFT = (".lora_", ".token_adapter.", ".modules_to_save.")
# Families by what their norms add to a weight: files of weights do not say it.
_GAIN_OFFSETS: Mapping[float, frozenset[str]] = {
    0.0: frozenset(
        ("gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2")
    ),
    1.0: frozenset(("gemma", "gemma2", "gemma3", "nemotron")),
}
_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights of a model under their original names.

    :param shapes: Shapes by name of parameter; tied ones under each of their names.
    :param read: Function that returns a parameter by name, in the dtype it is stored in.
    :param gain_offset: 1.0 where norms multiply by ``1 + weight``; None if the family is unknown.
    :param source: Name of the model, for messages.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    gain_offset: float | None
    source: str

    def modules(self) -> set[str]:
        """Return the names of all modules that hold a parameter."""
        return {name.rpartition(".")[0] for name in self.shapes}

    def has_hash(self, origin: str, padding: Padding) -> bool:
        """Return True if this is the model that scales were made for, of any dtype.

        :param origin: Hash of that model's weights.
        :param padding: Padding of its MLPs before they were hashed.
        """
        return any(hash_tensors(self._padded(padding, dtype)) == origin for dtype in _DTYPES)

    def _padded(self, padding: Padding, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.shapes):
            value = padding.parameter(name, self.read(name))
            yield (
                name,
                value.to(dtype) if dtype is not None and value.is_floating_point() else value,
            )


@dataclass(frozen=True, eq=False)
class Padding:
    """Zero-padding of inner widths of MLPs, that ``on_indivisible="pad"`` did.

    :param widths: New inner width by original name of block.
    :param shapes: Shapes of the padded model's parameters, by original name.
    """

    widths: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]

    def parameter(self, name: str, value: Tensor) -> Tensor:
        """Return a parameter of the model with the shape it has after padding."""
        module = name.rpartition(".")[0]
        value = self.rows(module, value)
        return self.columns(module, value) if value.dim() > 1 else value

    def rows(self, module: str, value: Tensor) -> Tensor:
        """Return ``value`` ``[out, …]`` with zero rows where the weight has new ones.

        A fused projection has them at the end of each of its slices.
        """
        width, full = self._sizes(module, 0)
        if width is None or value.shape[0] >= full or full % width:
            return value
        fused = full // width
        if value.shape[0] % fused:
            return value
        return pad_rows(value, fused, width - value.shape[0] // fused)

    def columns(self, module: str, value: Tensor) -> Tensor:
        """Return ``value`` ``[…, in]`` with zero columns where the weight has new ones."""
        width, full = self._sizes(module, 1)
        if width is None or value.shape[1] >= full or full != width:
            return value
        return nn.functional.pad(value, (0, full - value.shape[1]))

    def _sizes(self, module: str, dim: int) -> tuple[int | None, int]:
        """Return the inner width of a module's MLP, None outside, and the size of its weight."""
        width = next((w for name, w in self.widths.items() if module.startswith(f"{name}.")), None)
        shape = self.shapes.get(f"{module}.weight", ())
        return (width, shape[dim]) if len(shape) > dim else (None, 0)


@dataclass(frozen=True, eq=False)
class Target:
    """Facts about the transformed model that an adapter is to fit.

    :param checkpoint: Weights; None where there is a file of scales alone.
    """

    checkpoint: Checkpoint | None
    padding: Padding


def open_target(path: Path | None) -> Target:
    """Return what an export says of its model; nothing where scales lie alone.

    :param path: File of scales or folder that holds it, None for scales in memory.
    :raises CorruptFileError: the export's manifest is damaged.
    :raises FileNotFoundError: the export has lost it.
    """
    nothing = Target(None, Padding({}, {}))
    if path is None:
        return nothing
    folder = path if path.is_dir() else path.parent
    if not is_export(folder):
        return nothing
    manifest = read_manifest(folder, verify=False)
    if manifest.get("kind") != "export" or not (folder / WEIGHTS).is_file():
        return nothing
    tied = (manifest.get("model") or {}).get("tied") or {}
    checkpoint = _from_folder(folder, tied)
    widths = (manifest.get("settings") or {}).get("padded_mlp_widths") or {}
    named = {_known(name, checkpoint): width for name, width in widths.items()}
    return Target(checkpoint, Padding(named, checkpoint.shapes))


def open_checkpoint(base: Any) -> Checkpoint:
    """Return the weights of the original model.

    :param base: Module (prepared, wrapped by PEFT, or bare) or a folder that transformers reads.
    :raises FileNotFoundError: no weights in the folder.
    :raises TypeError: ``base`` is something else.
    """
    if isinstance(base, str | Path):
        return _from_folder(Path(base))
    if isinstance(base, nn.Module):
        return _from_module(base)
    raise TypeError(f"base must be the original model or its folder, got {type(base).__name__}")


def _from_folder(folder: Path, tied: Mapping[str, str] | None = None) -> Checkpoint:
    opened = {path: open_safetensors(path) for path in weight_files(folder)}
    place = {name: path for path in opened for name in opened[path].keys()}  # noqa: SIM118
    config = _config(folder)
    if tied is None:
        tied = _tied(place, config)
    place = {**place, **{name: place[other] for name, other in tied.items()}}

    def read(name: str) -> Tensor:
        value: Tensor = opened[place[name]].get_tensor(tied.get(name, name))
        return value

    shapes = {
        name: tuple(opened[path].get_slice(tied.get(name, name)).get_shape())
        for name, path in place.items()
    }
    classes = config.get("architectures") or ()
    return Checkpoint(shapes, read, _gain_offset(classes, config.get("model_type")), str(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def _tied(place: Mapping[str, Path], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of a shared weight that is not in the files, by which the other is."""
    both = ("lm_head.weight", "model.embed_tokens.weight")
    stored = [name for name in both if name in place]
    if len(stored) != 1 or not config.get("tie_word_embeddings", True):
        return {}
    absent = both[1 - both.index(stored[0])]
    return {absent: stored[0]}


def _from_module(module: nn.Module) -> Checkpoint:
    inner: Any = getattr(module, "get_base_model", lambda: module)()
    prefix = checkpoint_prefix(inner)
    state = {}
    for key, value in inner.state_dict(keep_vars=True).items():
        name = _AROUND.sub(".", key)
        if isinstance(value, Tensor) and not any(part in f".{name}" for part in _OF_PEFT):
            state[name.removeprefix(prefix)] = value.detach()
    language_model = causal_lm(inner)
    names = [] if language_model is None else [type(language_model).__name__]
    kind = getattr(getattr(language_model, "config", None), "model_type", None)
    return Checkpoint(
        {name: tuple(value.shape) for name, value in state.items()},
        state.__getitem__,
        _gain_offset(names, kind),
        f"the given {type(inner).__name__}",
    )


def _gain_offset(classes: Sequence[str], model_type: str | None) -> float | None:
    stems = {name.removesuffix("ForCausalLM").lower() for name in classes} | {model_type}
    return next((offset for offset, known in _GAIN_OFFSETS.items() if stems & known), None)


def _known(name: str, checkpoint: Checkpoint) -> str:
    """Return a module's original name; the simulation's has what its wrapper put before it."""
    names = checkpoint.shapes
    while name and not any(key.startswith(f"{name}.") for key in names):
        _, _, name = name.partition(".")
    return name
