"""Post-training quantization techniques that work on AIMET's quantization simulation.

Every public name is imported on first use: ``import aimet_ext`` alone loads neither torch nor AIMET
nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aimet_ext.registry import public_homes

if TYPE_CHECKING:
    from aimet_ext import examples as examples
    from aimet_ext import lora as lora
    from aimet_ext.analysis.analyze import analyze as analyze
    from aimet_ext.analysis.report import AnalysisReport as AnalysisReport
    from aimet_ext.analysis.report import QuantizerReport as QuantizerReport
    from aimet_ext.analysis.widths import assign_widths as assign_widths
    from aimet_ext.analysis.widths_report import LayerWidths as LayerWidths
    from aimet_ext.analysis.widths_report import WidthsReport as WidthsReport
    from aimet_ext.artifact.check_export import check_export as check_export
    from aimet_ext.artifact.export import export as export
    from aimet_ext.artifact.export import load as load
    from aimet_ext.artifact.kv.export import export_with_cache as export_with_cache
    from aimet_ext.artifact.kv.run import CacheGraphs as CacheGraphs
    from aimet_ext.artifact.kv.run import load_cache_graphs as load_cache_graphs
    from aimet_ext.config import AdaRoundParams as AdaRoundParams
    from aimet_ext.config import AutoRoundParams as AutoRoundParams
    from aimet_ext.config import AWQParams as AWQParams
    from aimet_ext.config import DWQParams as DWQParams
    from aimet_ext.config import GPTQParams as GPTQParams
    from aimet_ext.config import HQQParams as HQQParams
    from aimet_ext.config import OmniQuantParams as OmniQuantParams
    from aimet_ext.config import RotationParams as RotationParams
    from aimet_ext.config import RTNParams as RTNParams
    from aimet_ext.config import SeqMSEParams as SeqMSEParams
    from aimet_ext.config import SmoothQuantParams as SmoothQuantParams
    from aimet_ext.config import SpinQuantParams as SpinQuantParams
    from aimet_ext.data.text import calibration_batches as calibration_batches
    from aimet_ext.errors import CorruptFileError as CorruptFileError
    from aimet_ext.errors import Finding as Finding
    from aimet_ext.errors import MissingExtraError as MissingExtraError
    from aimet_ext.errors import TransformRefused as TransformRefused
    from aimet_ext.evaluation.divergence import evaluate_divergence as evaluate_divergence
    from aimet_ext.evaluation.divergence import float_logits as float_logits
    from aimet_ext.evaluation.perplexity import evaluate_perplexity as evaluate_perplexity
    from aimet_ext.files.ledger import Ledger as Ledger
    from aimet_ext.files.scales import load_scales as load_scales
    from aimet_ext.grids.blockwise import GridReport as GridReport
    from aimet_ext.grids.blockwise import set_blockwise as set_blockwise
    from aimet_ext.grids.blockwise import set_lpbq as set_lpbq
    from aimet_ext.grids.create import create_sim as create_sim
    from aimet_ext.grids.widths import set_widths as set_widths
    from aimet_ext.linting.lint import lint as lint
    from aimet_ext.models.description import TopologyDescription as TopologyDescription
    from aimet_ext.models.huggingface import prepare_model as prepare_model
    from aimet_ext.models.kv_cache import TokenCache as TokenCache
    from aimet_ext.recipes.recipe import Recipe as Recipe
    from aimet_ext.recipes.recipe import read_recipe as read_recipe
    from aimet_ext.recipes.recipe import recipe_names as recipe_names
    from aimet_ext.reporting.comparison import RunComparison as RunComparison
    from aimet_ext.reporting.recorder import Recorder as Recorder
    from aimet_ext.reporting.run_report import RunReport as RunReport
    from aimet_ext.specs import LPBQ as LPBQ
    from aimet_ext.specs import Blockwise as Blockwise
    from aimet_ext.specs import PerChannel as PerChannel
    from aimet_ext.specs import PerTensor as PerTensor
    from aimet_ext.specs import QSpec as QSpec
    from aimet_ext.techniques.adaround import apply_adaround as apply_adaround
    from aimet_ext.techniques.autoround import apply_autoround as apply_autoround
    from aimet_ext.techniques.awq import apply_awq as apply_awq
    from aimet_ext.techniques.dwq import apply_dwq as apply_dwq
    from aimet_ext.techniques.gptq import apply_gptq as apply_gptq
    from aimet_ext.techniques.hqq import apply_hqq as apply_hqq
    from aimet_ext.techniques.layer_report import LayerReport as LayerReport
    from aimet_ext.techniques.layer_report import LayerwiseReport as LayerwiseReport
    from aimet_ext.techniques.layer_report import WeightReport as WeightReport
    from aimet_ext.techniques.layer_report import WeightsReport as WeightsReport
    from aimet_ext.techniques.lpbq import apply_lpbq as apply_lpbq
    from aimet_ext.techniques.omniquant import OmniQuantReport as OmniQuantReport
    from aimet_ext.techniques.omniquant import apply_omniquant as apply_omniquant
    from aimet_ext.techniques.report import RotationReport as RotationReport
    from aimet_ext.techniques.rotation import apply_rotation as apply_rotation
    from aimet_ext.techniques.rtn import apply_rtn as apply_rtn
    from aimet_ext.techniques.seq_mse import apply_seq_mse as apply_seq_mse
    from aimet_ext.techniques.smoothquant import apply_smoothquant as apply_smoothquant
    from aimet_ext.techniques.spinquant import apply_spinquant as apply_spinquant
    from aimet_ext.verification.report import Thresholds as Thresholds
    from aimet_ext.verification.report import VerifyReport as VerifyReport
    from aimet_ext.verification.verify import verify as verify

__version__ = "0.1.0"

# The same pairs as above, for the import on first use; a test compares them. The registry adds the
# names of techniques: for these a line above only tells type checkers the signature.
_HOMES = {
    name: f"{__name__}.{home}"
    for home, names in {
        "analysis.analyze": ("analyze",),
        "analysis.report": ("AnalysisReport", "QuantizerReport"),
        "analysis.widths": ("assign_widths",),
        "analysis.widths_report": ("LayerWidths", "WidthsReport"),
        "artifact.check_export": ("check_export",),
        "artifact.export": ("export", "load"),
        "artifact.kv.export": ("export_with_cache",),
        "artifact.kv.run": ("CacheGraphs", "load_cache_graphs"),
        "specs": ("Blockwise", "LPBQ", "PerChannel", "PerTensor", "QSpec"),
        "data.text": ("calibration_batches",),
        "errors": ("CorruptFileError", "Finding", "MissingExtraError", "TransformRefused"),
        "evaluation.divergence": ("evaluate_divergence", "float_logits"),
        "evaluation.perplexity": ("evaluate_perplexity",),
        "files.ledger": ("Ledger",),
        "files.scales": ("load_scales",),
        "grids.blockwise": ("GridReport", "set_blockwise", "set_lpbq"),
        "grids.widths": ("set_widths",),
        "grids.create": ("create_sim",),
        "linting.lint": ("lint",),
        "models.huggingface": ("prepare_model",),
        "models.kv_cache": ("TokenCache",),
        "models.description": ("TopologyDescription",),
        "recipes.recipe": ("Recipe", "read_recipe", "recipe_names"),
        "reporting.comparison": ("RunComparison",),
        "reporting.recorder": ("Recorder",),
        "reporting.run_report": ("RunReport",),
        "techniques.omniquant": ("OmniQuantReport",),
        "techniques.layer_report": (
            *("LayerReport", "LayerwiseReport"),
            *("WeightReport", "WeightsReport"),
        ),
        "techniques.report": ("RotationReport",),
        "verification.report": ("Thresholds", "VerifyReport"),
        "verification.verify": ("verify",),
    }.items()
    for name in names
} | dict.fromkeys(("examples", "lora"), __name__)

# Which extra installs an optional package.
_EXTRAS = {
    "aimet_onnx": "onnx",
    "aimet_torch": "torch",
    "onnx": "onnx",
    "peft": "lora",
    "transformers": "torch",
}

__all__ = sorted({*_HOMES, *public_homes(), "__version__"})


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once.

    :raises MissingExtraError: an optional package that the name needs is not installed.
    """
    home = _HOMES.get(name) or public_homes().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
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
    """Return the public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
