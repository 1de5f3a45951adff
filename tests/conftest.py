"""What all tests share: which aimet_ext is tested, offline mode and tiny models."""

from __future__ import annotations

import collections
import gc
import importlib.util
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from warm_python import WarmPython

import aimet_ext

# Before transformers is imported: no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = ROOT.parent / "shared" / "assets"


# copy.deepcopy walks AIMET's graph of a model op by op, each one deeper in the stack.
RECURSION_LIMIT = 10_000


def one_thread_for_onnxruntime() -> None:
    """Give a session one thread, unless a number was asked for, as OMP_NUM_THREADS does for torch.

    Its threads wait for work by spinning: they would take the processors of the other workers.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    start = onnxruntime.InferenceSession.__init__

    def with_one_thread(
        session: Any, path_or_bytes: Any, sess_options: Any = None, *args: Any, **settings: Any
    ) -> None:
        options = onnxruntime.SessionOptions() if sess_options is None else sess_options
        options.intra_op_num_threads = options.intra_op_num_threads or 1
        start(session, path_or_bytes, options, *args, **settings)

    onnxruntime.InferenceSession.__init__ = with_one_thread


def pytest_configure() -> None:
    """Refuse to test the checkout where the installed package was asked for (``make test``)."""
    sys.setrecursionlimit(max(RECURSION_LIMIT, sys.getrecursionlimit()))
    one_thread_for_onnxruntime()
    location = pathlib.Path(aimet_ext.__file__).resolve().parent
    if os.environ.get("AIMET_EXT_TEST_INSTALLED") and location == ROOT / "aimet_ext":
        raise pytest.UsageError(
            f"the installed package is to be tested, but aimet_ext was imported from {location}; "
            "run `make test`, or pytest without `python -m` and PYTHONPATH"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules with slow tests first, then those with many tests.

    So that at the end of a run in several processes none waits long for another one.
    """
    weights: collections.Counter[pathlib.Path] = collections.Counter()
    for item in items:
        weights[item.path] += 1 if item.get_closest_marker("slow") is None else 1000
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """Leave what was imported, which stays, out of every garbage collection of the run.

    AIMET's graphs and copies of them are so many objects that collections took a tenth of it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Seed each fixture and each test by its name, so that both are the same in any company."""
    seed(fixturedef.argname)


def pytest_runtest_call(item: pytest.Item) -> None:
    """Seed each test, see :func:`pytest_fixture_setup`."""
    seed(item.nodeid)


def seed(name: str) -> None:
    """Seed torch, if it is imported, by a name."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(name.encode()))


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
def warm_python() -> Iterator[WarmPython]:
    """Return what runs scripts in new processes that have the frameworks imported already."""
    pytest.importorskip("aimet_torch")
    warm = WarmPython(pathlib.Path(aimet_ext.__file__).parent.parent)
    yield warm
    warm.close()


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
