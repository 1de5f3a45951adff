"""Post-training quantization techniques that work on AIMET's quantization simulation.

Every public name is imported on first use: ``import aimet_ext`` alone loads neither torch nor AIMET
nor transformers.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimet_ext import examples, lora
    from aimet_ext.artifact.export import export
    from aimet_ext.artifact.kv.export import export_with_cache
    from aimet_ext.artifact.kv.run import CacheGraphs, load_cache_graphs
    from aimet_ext.artifact.load import load
    from aimet_ext.config import (
        LPBQ,
        AdaRoundParams,
        Blockwise,
        GPTQParams,
        OmniQuantParams,
        PerChannel,
        PerTensor,
        QSpec,
        SeqMSEParams,
    )
    from aimet_ext.data.text import calibration_batches
    from aimet_ext.errors import CorruptFileError, MissingExtraError, TransformRefused
    from aimet_ext.evaluation.perplexity import evaluate_perplexity
    from aimet_ext.files.ledger import Ledger
    from aimet_ext.files.scales import load_scales
    from aimet_ext.findings import Finding
    from aimet_ext.grids.blockwise import GridReport, set_blockwise, set_lpbq
    from aimet_ext.grids.create import create_sim
    from aimet_ext.linting.lint import lint
    from aimet_ext.models.huggingface import prepare_model
    from aimet_ext.models.kv_cache import TokenCache
    from aimet_ext.models.topology import TopologyDescription
    from aimet_ext.techniques.adaround import apply_adaround
    from aimet_ext.techniques.gptq import apply_gptq
    from aimet_ext.techniques.layerwise.report import LayerReport, LayerwiseReport
    from aimet_ext.techniques.lpbq import apply_lpbq
    from aimet_ext.techniques.omniquant import OmniQuantReport, apply_omniquant
    from aimet_ext.techniques.seq_mse import apply_seq_mse
    from aimet_ext.verification.report import Thresholds, VerifyReport
    from aimet_ext.verification.verify import verify

__version__ = "0.1.0"

# The same pairs as above, for the import on first use; a test compares them.
_HOMES = {
    "AdaRoundParams": "aimet_ext.config",
    "Blockwise": "aimet_ext.config",
    "CacheGraphs": "aimet_ext.artifact.kv.run",
    "CorruptFileError": "aimet_ext.errors",
    "Finding": "aimet_ext.findings",
    "GPTQParams": "aimet_ext.config",
    "GridReport": "aimet_ext.grids.blockwise",
    "LPBQ": "aimet_ext.config",
    "LayerReport": "aimet_ext.techniques.layerwise.report",
    "LayerwiseReport": "aimet_ext.techniques.layerwise.report",
    "Ledger": "aimet_ext.files.ledger",
    "MissingExtraError": "aimet_ext.errors",
    "OmniQuantParams": "aimet_ext.config",
    "OmniQuantReport": "aimet_ext.techniques.omniquant",
    "PerChannel": "aimet_ext.config",
    "PerTensor": "aimet_ext.config",
    "QSpec": "aimet_ext.config",
    "SeqMSEParams": "aimet_ext.config",
    "Thresholds": "aimet_ext.verification.report",
    "TokenCache": "aimet_ext.models.kv_cache",
    "TopologyDescription": "aimet_ext.models.topology",
    "TransformRefused": "aimet_ext.errors",
    "VerifyReport": "aimet_ext.verification.report",
    "apply_adaround": "aimet_ext.techniques.adaround",
    "apply_gptq": "aimet_ext.techniques.gptq",
    "apply_lpbq": "aimet_ext.techniques.lpbq",
    "apply_omniquant": "aimet_ext.techniques.omniquant",
    "apply_seq_mse": "aimet_ext.techniques.seq_mse",
    "calibration_batches": "aimet_ext.data.text",
    "create_sim": "aimet_ext.grids.create",
    "evaluate_perplexity": "aimet_ext.evaluation.perplexity",
    "examples": "aimet_ext",
    "export": "aimet_ext.artifact.export",
    "export_with_cache": "aimet_ext.artifact.kv.export",
    "lint": "aimet_ext.linting.lint",
    "load": "aimet_ext.artifact.load",
    "load_cache_graphs": "aimet_ext.artifact.kv.run",
    "load_scales": "aimet_ext.files.scales",
    "lora": "aimet_ext",
    "prepare_model": "aimet_ext.models.huggingface",
    "set_blockwise": "aimet_ext.grids.blockwise",
    "set_lpbq": "aimet_ext.grids.blockwise",
    "verify": "aimet_ext.verification.verify",
}

# Which extra installs an optional package.
_EXTRAS = {
    "aimet_onnx": "onnx",
    "aimet_torch": "torch",
    "onnx": "onnx",
    "peft": "lora",
    "transformers": "torch",
}

__all__ = [
    "AdaRoundParams",
    "Blockwise",
    "CacheGraphs",
    "CorruptFileError",
    "Finding",
    "GPTQParams",
    "GridReport",
    "LPBQ",
    "LayerReport",
    "LayerwiseReport",
    "Ledger",
    "MissingExtraError",
    "OmniQuantParams",
    "OmniQuantReport",
    "PerChannel",
    "PerTensor",
    "QSpec",
    "SeqMSEParams",
    "Thresholds",
    "TokenCache",
    "TopologyDescription",
    "TransformRefused",
    "VerifyReport",
    "__version__",
    "apply_adaround",
    "apply_gptq",
    "apply_lpbq",
    "apply_omniquant",
    "apply_seq_mse",
    "calibration_batches",
    "create_sim",
    "evaluate_perplexity",
    "examples",
    "export",
    "export_with_cache",
    "lint",
    "load",
    "load_cache_graphs",
    "load_scales",
    "lora",
    "prepare_model",
    "set_blockwise",
    "set_lpbq",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once.

    :raises MissingExtraError: an optional package that the name needs is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    try:
        if home == __name__:
            return importlib.import_module(f"{home}.{name}")
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        from aimet_ext.errors import require

        missing = (error.name or "").partition(".")[0]
        if missing in _EXTRAS:
            require(missing, _EXTRAS[missing])
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))


class _Package(types.ModuleType):
    """The package as a module that keeps ``aimet_ext.export`` the function.

    Importing the subpackage of that name would otherwise put the subpackage in its place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name != "export" or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
