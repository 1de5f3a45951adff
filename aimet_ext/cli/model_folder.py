"""Content of the folder of a Hugging Face model, and whether it can be quantized."""

from __future__ import annotations

import copy
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aimet_ext.drawing.page import size
from aimet_ext.errors import MissingExtraError, some

_TRIED = 2  # blocks that are built to try
_LENGTH = 8  # tokens that they are run on


def is_model(folder: Path) -> bool:
    """Return True for a folder that is no output of this program and has a configuration."""
    from aimet_ext.files.manifest import is_export

    return (folder / "config.json").is_file() and not is_export(folder)


def of_model(folder: Path) -> dict[str, Any]:
    """Return what a model's folder holds, as JSON values; its weights are not loaded.

    Whether it can be quantized is tried on its first blocks, with random weights.

    :returns: ``family``, ``class``, ``blocks`` with their number, ``layers`` of a block with their
        shapes ``[out, in]``, ``tied``, ``dtypes`` with tensors, numbers and bytes, ``taken`` by
        :func:`aimet_ext.create_sim` or ``refused`` with the reason, ``left_float``, and ``pairs``
        of all blocks by kind, each of which is proved once more on the weights when it is used.
    :raises ValueError: it holds no language model.
    :raises FileNotFoundError: it has no weights.
    :raises CorruptFileError: a file is damaged.
    """
    from aimet_ext.models.folders import empty_causal_lm, read_config, stored_tensors
    from aimet_ext.models.topology import is_linear, stack_of

    config = read_config(folder)
    stored = stored_tensors(folder)
    model = empty_causal_lm(folder, config)
    names = stack_of(model)
    linear = {
        name: list(module.weight.shape)
        for name, module in model.get_submodule(names[0]).named_modules()
        if is_linear(module)
    }
    dtypes: dict[str, dict[str, int]] = {}
    for dtype, count, length in stored.values():
        entry = dtypes.setdefault(dtype, {"tensors": 0, "numbers": 0, "bytes": 0})
        for key, value in (("tensors", 1), ("numbers", count), ("bytes", length)):
            entry[key] += value
    return {
        "kind": "model",
        "family": config.model_type,
        "class": type(model).__name__,
        "blocks": len(names),
        "first_block": names[0],
        "layers": linear,
        "tied": bool(config.get_text_config().tie_word_embeddings),
        "dtypes": dtypes,
        **_tried(folder, config, len(names)),
    }


def _tried(folder: Path, config: Any, blocks: int) -> dict[str, Any]:
    """Return whether a simulation can be made of the first blocks, and their scale pairs."""
    import torch

    import aimet_ext
    from aimet_ext.models.folders import empty_causal_lm
    from aimet_ext.models.topology import find_blocks

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = min(_TRIED, blocks)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    try:
        model = empty_causal_lm(folder, small, device="cpu")
        found = find_blocks(aimet_ext.prepare_model(model))
        pairs = Counter(pair.kind for block in found for pair in block.pairs)
        sim = aimet_ext.create_sim(model, torch.ones(1, _LENGTH, dtype=torch.long), in_place=True)
    except MissingExtraError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the answer)
        return {"taken": False, "refused": f"{type(error).__name__}: {error}", "pairs": {}}
    return {
        "taken": True,
        "left_float": list(sim.aimet_ext_settings["left_float"]),
        "tried_blocks": len(found),
        "pairs": {kind: count * blocks // len(found) for kind, count in pairs.items()},
    }


def as_text(folder: Path, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was found in lines."""
    from aimet_ext.cli.summary import laid_out

    yield from laid_out(list(_rows(found)))
    if found["taken"]:
        options = ("--recipe", "w4a16-fast", "--calibration", "text.txt", "--output", "out")
        yield f"Next:\n  {shlex.join(('aimet-ext', 'quantize', str(folder), *options))}"


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "kind", "Hugging Face model, not quantized by this program"
    yield "family", f"{found['family']} ({found['class']})"
    layers = [f"{name} {out} × {into}" for name, (out, into, *_) in found["layers"].items()]
    held = f"linear layers of {found['first_block']}, out × in: {some(layers, 16)}"
    yield "blocks", f"{found['blocks']}; {held}"
    head = "shares the weight of the embedding" if found["tied"] else "has a weight of its own"
    yield "output layer", head
    for dtype, entry in found["dtypes"].items():
        numbers = f"{entry['numbers'] / 1e6:.4g} million numbers, {size(entry['bytes'])}"
        yield "weights", f"{entry['tensors']} tensors of {dtype}: {numbers}"
    if not found["taken"]:
        yield "create_sim", f"refuses it: {found['refused']}"
        return
    left = f"; left float: {some(found['left_float'])}" if found["left_float"] else ""
    tried = f"takes it, tried on {found['tried_blocks']} blocks with random weights"
    yield "create_sim", f"{tried}{left}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["pairs"].items())
    proved = ", each to be proved on the weights before it is used" * bool(kinds)
    yield "scale pairs", f"{kinds or 'none'}, in all blocks{proved}"
