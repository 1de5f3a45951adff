"""LoRA adapters as PEFT stores them: read, taken apart by module, and written again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, FiniteFloat, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from aimet_ext.errors import require, some
from aimet_ext.files.reading import naming, parse_json, read_json, read_safetensors
from aimet_ext.models.huggingface import checkpoint_prefix

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FOLDED = "aimet_ext.folded"

Kind = Literal[
    "A", "B", "B_bias", "embedding_A", "embedding_B", "magnitude", "tokens", "weight", "bias"
]

# What a tensor is, by the end of its name; the first one that fits counts.
_ENDINGS: tuple[tuple[str, Kind], ...] = (
    (".lora_A.weight", "A"),
    (".lora_B.weight", "B"),
    (".lora_B.bias", "B_bias"),
    (".lora_embedding_A", "embedding_A"),
    (".lora_embedding_B", "embedding_B"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
    (".token_adapter.trainable_tokens_delta", "tokens"),
    (".base_layer.weight", "weight"),
    (".base_layer.bias", "bias"),
    (".weight", "weight"),
    (".bias", "bias"),
)


# The dimension of a tensor that lies along the input or the output of its module's weight.
SIDES: dict[str, tuple[int, Literal["input", "output"]]] = {
    "A": (1, "input"),
    "B": (0, "output"),
    "B_bias": (0, "output"),
    "bias": (0, "output"),
    "embedding_A": (1, "output"),
    "embedding_B": (0, "input"),
    "tokens": (1, "input"),
}


# The fewest dimensions of a tensor.
_DIMENSIONS = {kind: 1 if kind.endswith("bias") else 2 for kind in SIDES}


@dataclass(frozen=True)
class Part:
    """Meaning of one tensor of an adapter.

    :param key: Name in the adapter's file.
    :param module: Module that it belongs to, as the original checkpoint names it.
    :param kind: One of ``"A"`` ``[rank, in]``, ``"B"`` ``[out, rank]`` and ``"B_bias"`` ``[out]``
        of a linear layer or convolution; ``"embedding_A"`` ``[rank, rows]`` and ``"embedding_B"``
        ``[width, rank]`` of a table; ``"magnitude"`` ``[out]`` of DoRA; ``"tokens"``, rows of a
        table that replace its own; ``"weight"`` and ``"bias"``, which replace the module's own.
    """

    key: str
    module: str
    kind: Kind


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The low-rank change of one module: ``ΔW = scaling · B A``.

    :param a: Matrix ``[rank, in]``, of a convolution ``[rank, in, …]``.
    :param b: Matrix ``[out, rank]``, of a convolution ``[out, rank, 1, …]``.
    :param bias: Bias ``[out]``, added with ``scaling`` as well, or None.
    :param magnitude: Magnitudes of DoRA, one for each output channel, or None.
    :param embedding: True if the module is a table ``[rows, width]`` and its change ``scaling · (B
        A)ᵀ``.
    """

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Number of rows of ``A``."""
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter: the content of a folder that PEFT reads.

    :param name: Name in a model of several adapters.
    :param config: Content of ``adapter_config.json``.
    :param tensors: Tensors by the names that PEFT writes.
    :param folded: Record of how it was folded (see :func:`fold_adapter`); None for one that
        fits the original checkpoint.
    :param parts: Meaning of each tensor, told from its name.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    folded: Mapping[str, Any] | None = None
    parts: tuple[Part, ...] = field(init=False)

    def __post_init__(self) -> None:
        _check_config(self.name, self.config)
        unknown = [key for key in self.tensors if _part(key) is None]
        if unknown:
            raise ValueError(
                f"adapter {self.name!r}: tensors of a LoRA adapter of PEFT are required, but "
                f"{some(unknown)} is unknown; save the adapter again with a recent peft"
            )
        if bad := [key for key, value in self.tensors.items() if not value.isfinite().all()]:
            raise ValueError(
                f"adapter {self.name!r}: finite numbers are required, but {some(bad)} holds NaN or "
                "infinity; train or save the adapter again"
            )
        parts = tuple(part for part in map(_part, self.tensors) if part is not None)
        if flat := [p.key for p in parts if self.tensors[p.key].dim() < _DIMENSIONS.get(p.kind, 0)]:
            raise ValueError(
                f"adapter {self.name!r}: matrices are required, but {some(flat)} has "
                f"{self.tensors[flat[0]].dim()} dimensions; save the adapter again"
            )
        object.__setattr__(self, "parts", parts)

    @property
    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by module and kind."""
        found: dict[str, dict[str, Tensor]] = {}
        for part in self.parts:
            found.setdefault(part.module, {})[part.kind] = self.tensors[part.key]
        return found

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """The low-rank changes, by module.

        :raises ValueError: a module has one of ``A`` and ``B`` only.
        """
        found = {}
        for module, kinds in self.modules.items():
            embedding = "embedding_A" in kinds or "embedding_B" in kinds
            prefix = "embedding_" if embedding else ""
            a, b = kinds.get(f"{prefix}A"), kinds.get(f"{prefix}B")
            if a is None and b is None:
                continue
            if a is None or b is None or b.shape[1] != a.shape[0]:
                shapes = [None if t is None else tuple(t.shape) for t in (a, b)]
                raise ValueError(
                    f"adapter {self.name!r}, {module}: A [rank, in] and B [out, rank] of one rank "
                    f"are required, got {shapes[0]} and {shapes[1]}; save the adapter again"
                )
            found[module] = LoraLayer(
                a,
                b,
                self.scaling(module, a.shape[0]),
                kinds.get("B_bias"),
                kinds.get("magnitude"),
                embedding,
            )
        return found

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of ``B A``: alpha over the rank, or over its root (rsLoRA)."""
        alpha = float(self.config.get("lora_alpha", 8))
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def save(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a folder.

        The folder is the caller's: it is made if it is absent, and files of these names are
        replaced. :func:`read_adapter` and ``PeftModel.from_pretrained`` read it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(self.config), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        metadata = {"format": "pt"}
        if self.folded is not None:
            metadata[_FOLDED] = json.dumps(dict(self.folded))
        copies = {key: t.detach().to("cpu", copy=True) for key, t in self.tensors.items()}
        contiguous = {key: tensor.contiguous() for key, tensor in copies.items()}
        save_file(contiguous, folder / ADAPTER_WEIGHTS, metadata=metadata)


def read_adapters(source: Any) -> dict[str, Adapter]:
    """Return all adapters of a folder or a model, by name.

    :param source: Folder as ``PeftModel.save_pretrained`` writes it, with an adapter, or a folder
        for each of several; a ``PeftModel``; or an :class:`Adapter`.
    :raises FileNotFoundError: there is no adapter in the folder.
    :raises CorruptFileError: a file is damaged.
    :raises TypeError: ``source`` is something else.
    :raises ValueError: no LoRA adapter, a pickle, or adapters that are merged into the model.
    """
    if isinstance(source, Adapter):
        return {source.name: source}
    if isinstance(source, str | Path):
        return _from_folder(Path(source))
    if hasattr(source, "peft_config") and hasattr(source, "get_base_model"):
        return _from_model(source)
    raise TypeError(
        "an adapter must be a folder written by PEFT, a PeftModel or an Adapter, got "
        f"{type(source).__name__}"
    )


def read_adapter(source: Any, name: str | None = None) -> Adapter:
    """Return one adapter of a folder or a model; see :func:`read_adapters`.

    :param source: Folder, ``PeftModel`` or :class:`Adapter`, as for :func:`read_adapters`.
    :param name: Name, needed where there are several.
    :raises ValueError: there are several and no name was given, or there is none of this name.
    """
    found = read_adapters(source)
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is None or name not in found:
        asked = "a name is required, as there are several" if name is None else f"got {name!r}"
        raise ValueError(f"the name of an adapter must be one of {sorted(found)}; {asked}")
    return found[name]


def attach_adapter(model: Any, adapter: Adapter, name: str | None = None) -> Any:
    """Return a ``PeftModel`` of a model with an adapter on it.

    :param model: Causal LM of transformers, whose layers PEFT wraps in place, or a ``PeftModel``,
        which gets one adapter more.
    :param adapter: Adapter that was trained on this model.
    :param name: Name of the adapter in the model; its own by default.
    :returns: the ``PeftModel``, in evaluation mode, with this adapter active.
    :raises ValueError: a tensor of the adapter found no place in the model.
    :raises MissingExtraError: peft is not installed.
    """
    peft = require("peft", "lora")
    name = name or adapter.name
    try:
        model, lost = _put_on(peft, model, adapter, name)
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"adapter {name!r}: peft cannot put it on the model ({type(error).__name__}: {said}); "
            "give the model that the adapter was made for"
        ) from error
    if lost:
        raise ValueError(
            f"adapter {name!r}: every tensor must have its place in the model, but {some(lost)} "
            "has none; give the model that the adapter was made for"
        )
    model.set_adapter(name)
    return model.eval()


def _put_on(peft: Any, model: Any, adapter: Adapter, name: str) -> tuple[Any, list[str]]:
    """Return the ``PeftModel``, and the tensors that found no place in it."""
    settings = {key: value for key, value in adapter.config.items() if value is not None}
    config = peft.LoraConfig.from_peft_type(**{**settings, "inference_mode": True})
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.PeftModel(model, config, adapter_name=name)
    tensors = dict(adapter.tensors)
    left = peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
    own = re.compile(rf"\.(lora_\w+|modules_to_save|token_adapter\.\w+)\.{re.escape(name)}(\.|$)")
    return model, [*left.unexpected_keys, *filter(own.search, left.missing_keys)]


def _from_folder(folder: Path) -> dict[str, Adapter]:
    candidates = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    found = {}
    for path in candidates:
        if (path / ADAPTER_CONFIG).is_file():
            name = "default" if path == folder else path.name
            with naming(path, ValueError):
                found[name] = _read(path, name)
    if not found:
        raise FileNotFoundError(
            f"{folder}: a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as "
            "PeftModel.save_pretrained writes it, is required"
        )
    return found


def _read(folder: Path, name: str) -> Adapter:
    config = read_json(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise ValueError(
            f"{folder / _PICKLE} is a pickle, which can run code when it is read, and is refused; "
            f"load the adapter with peft and save it as {ADAPTER_WEIGHTS} with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is required beside {ADAPTER_CONFIG} and is absent")
    tensors, metadata = read_safetensors(path)
    folded = None
    if _FOLDED in metadata:
        folded = parse_json(metadata[_FOLDED], f"{path}, {_FOLDED}", dict[str, Any])
    try:
        return Adapter(name, config, tensors, folded)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _from_model(model: Any) -> dict[str, Adapter]:
    peft = require("peft", "lora")
    merged = [name for name, module in model.named_modules() if getattr(module, "merged", False)]
    if merged:
        raise ValueError(
            f"adapters beside the base's weights are required, but those of {some(merged)} are "
            "merged into them; call unmerge_adapter() first"
        )
    prefix = checkpoint_prefix(model.get_base_model())
    found = {}
    for name, config in model.peft_config.items():
        saved = {**config.to_dict(), "inference_mode": True}  # as peft writes it
        plain = json.loads(json.dumps(saved, default=_to_json))
        _check_config(name, plain)
        # Its own state dict is given, as peft warns of biases in B where it takes it by itself.
        state = peft.get_peft_model_state_dict(
            model, model.state_dict(), adapter_name=name, save_embedding_layers=False
        )
        named = {_original(key, prefix): value.detach() for key, value in state.items()}
        found[name] = Adapter(name, plain, named)
    return found


def _original(key: str, prefix: str) -> str:
    """Name of a tensor without what a wrapper of the model put before the checkpoint's names."""
    return _PREFIX + key.removeprefix(_PREFIX).removeprefix(prefix)


def _part(key: str) -> Part | None:
    if not key.startswith(_PREFIX):
        return None
    for ending, kind in _ENDINGS:
        if key.endswith(ending):
            return Part(key, key.removeprefix(_PREFIX).removesuffix(ending), kind)
    return None


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"a regular expression is required ({error})") from error
    return pattern


class _Config(BaseModel):
    """Fields of ``adapter_config.json`` that are used; others are passed on as they are."""

    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[Annotated[str, AfterValidator(_regex)], FiniteFloat] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    bias: str = "none"
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter of another kind, or with fields of another form.

    :raises ValueError: The field is named.
    """
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise ValueError(
            f"adapter {name!r}: a LoRA adapter (peft_type LORA) is required, got {kind}; adapters "
            "of other kinds can be merged into the model before it is quantized"
        )
    try:
        _Config.model_validate(config, strict=True)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}"
            for fault in error.errors()
        )
        raise ValueError(f"adapter {name!r}: {ADAPTER_CONFIG}: {faults}") from error


def _to_json(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return value.value if isinstance(value, Enum) else str(value)


assert {kind for _, kind in _ENDINGS} == set(get_args(Kind))
