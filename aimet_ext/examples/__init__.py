"""A small trained language model and its text, for examples and tests without a download.

The model is a Llama of 1.8 million parameters with grouped-query attention, trained by
``benchmarks/train_example.py`` on the documentation that comes with Python. Importing this package
imports neither torch nor transformers::

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from aimet_ext import examples

    model = AutoModelForCausalLM.from_pretrained(examples.model_dir())
    tokenizer = AutoTokenizer.from_pretrained(examples.model_dir())
    calibration = examples.documents("calibration")
"""

import pathlib

from aimet_ext.examples import corpus

__all__ = ["documents", "model_dir", "text"]


def model_dir() -> pathlib.Path:
    """Return the folder of the packaged model: config, weights, tokenizer, model card."""
    return pathlib.Path(__file__).resolve().parent / "pydoc_llama"


def documents(split: str) -> list[str]:
    """Return the documents of one split, in a fixed order.

    The first call reads the whole standard library, which takes a few seconds; later ones answer
    from memory.

    :param split: "train", "calibration" or "evaluation"
    :raises ValueError: for any other ``split``
    """
    if split not in corpus.SPLITS:
        allowed = ", ".join(repr(name) for name in corpus.SPLITS)
        raise ValueError(f"split must be one of {allowed}; got {split!r}")
    return list(corpus.all_documents()[split])


def text(split: str) -> str:
    """Return the documents of one split as one string, parted by blank lines.

    For a quick look. Measurements take :func:`documents`, for each of them starts with the
    tokenizer's BOS token.

    :param split: "train", "calibration" or "evaluation"
    :raises ValueError: for any other ``split``
    """
    return "\n\n".join(documents(split))
