"""What all tests share: which aimet_ext is tested, offline mode and tiny models."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

import aimet_ext

# Before transformers is imported: no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = ROOT.parent / "shared" / "assets"


# copy.deepcopy walks AIMET's graph of a model op by op, each one deeper in the stack.
RECURSION_LIMIT = 10_000


def pytest_configure() -> None:
    """Refuse to test the checkout where the installed package was asked for (``make test``)."""
    sys.setrecursionlimit(max(RECURSION_LIMIT, sys.getrecursionlimit()))
    location = pathlib.Path(aimet_ext.__file__).resolve().parent
    if os.environ.get("AIMET_EXT_TEST_INSTALLED") and location == ROOT / "aimet_ext":
        raise pytest.UsageError(
            f"the installed package is to be tested, but aimet_ext was imported from {location}; "
            "run `make test`, or pytest without `python -m` and PYTHONPATH"
        )


def pytest_report_header() -> str:
    """Say in the header of the run which copy of the package is tested."""
    return f"aimet_ext {aimet_ext.__version__} from {pathlib.Path(aimet_ext.__file__).parent}"


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """Folder of the checkout: documents, snippets, project files."""
    return ROOT


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """Folder of models and texts beside the checkout; tests that need it are skipped without."""
    if not ASSETS.is_dir():
        pytest.skip(f"{ASSETS} is absent: its models and texts are no part of the project")
    return ASSETS


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Return a function that builds a small random causal LM of a family, always the same one.

    ``tiny_model("qwen2", num_hidden_layers=3)`` takes any field of the family's config. The model
    is in evaluation mode, float32, grouped-query attention with 4 heads over 2 key-value heads.
    """
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    def build(family: str = "llama", **changes: Any) -> Any:
        settings = {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
            **changes,
        }
        config = transformers.AutoConfig.for_model(family, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                # Away from their starts of 1 and 0, so that a forgotten gain or bias shows.
                if "norm" in name or name.endswith("bias"):
                    torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        return model.eval()

    return build


@pytest.fixture
def tiny_llama(tiny_model: Callable[..., Any]) -> Any:
    """A small random Llama with two blocks, a new one for each test."""
    return tiny_model("llama")
