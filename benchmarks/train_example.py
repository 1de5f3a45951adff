"""Train the packaged model, from scratch or further.

``python benchmarks/train_example.py --output DIR`` writes the config, the weights (safetensors),
the tokenizer and ``training.json`` (settings, loss curve, figures) to DIR; ``--start DIR`` trains
the model of a folder further. A run is seeded: on the same machine, with the same versions and
number of threads, it gives the same weights.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn import functional
from tqdm import tqdm

from aimet_ext import examples

LOGGER = logging.getLogger(__name__)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CURVE_WINDOWS = 40
"""Windows of the calibration split behind each held-out loss of the curve."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from the text.

    The defaults are those of the packaged model. It has no weight decay and a high learning rate
    because coarse quantization of its weights is meant to hurt visibly.
    """

    steps: int = 3100
    seed: int = 0
    threads: int = 1
    batch: int = 4
    window: int = 256
    learning_rate: float = 3e-3
    warmup: int = 100
    decay: int = 1200
    weight_decay: float = 0.0
    gradient_norm: float = 1.0
    vocabulary: int = 1024
    hidden: int = 192
    intermediate: int = 512
    blocks: int = 4
    heads: int = 6
    key_value_heads: int = 2
    positions: int = 512
    curve_every: int = 200
    evaluation_windows: int = 200


def train_tokenizer(
    documents: Sequence[str], vocabulary: int, positions: int
) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer which puts BOS in front and round-trips every text.

    :param documents: training text
    :param vocabulary: number of tokens, special ones included
    :param positions: longest sequence of the model
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase, documents: Sequence[str]
) -> list[torch.Tensor]:
    """Return each document's token ids, shape (tokens,), BOS first.

    :param tokenizer: one that puts BOS in front by default
    :param documents: the texts
    """
    # verbose=False: documents longer than the context are cut into windows later.
    return [torch.tensor(ids) for ids in tokenizer(list(documents), verbose=False)["input_ids"]]


def pack(documents: Sequence[torch.Tensor], window: int) -> torch.Tensor:
    """Join documents and cut them into windows, shape (windows, window); the rest is dropped.

    :param documents: token ids, each of shape (tokens,)
    :param window: tokens in a window
    """
    joined = torch.cat(list(documents))
    return joined[: len(joined) // window * window].view(-1, window)


def batches(
    documents: Sequence[torch.Tensor], batch: int, window: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield batches of shape (batch, window) for ever, each epoch in another order.

    The documents are shuffled before they are packed, so an epoch cuts them at other places.

    :param documents: token ids, each of shape (tokens,)
    :param batch: windows in a batch
    :param window: tokens in a window
    :param generator: source of the order
    """
    while True:
        order = torch.randperm(len(documents), generator=generator)
        windows = pack([documents[index] for index in order], window)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        yield from windows[: len(windows) // batch * batch].split(batch)


def new_model(settings: Settings) -> transformers.LlamaForCausalLM:
    """Return the untrained model; torch's global seed decides its weights.

    Linears that write to the residual stream start at zero and the embedding starts large: each
    block begins as the identity on a stream of tokens, not of noise. That saves a short run many
    steps over the default of one small deviation for all weights.

    :param settings: shapes of the model
    """
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.blocks,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.key_value_heads,
            max_position_embeddings=settings.positions,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            dtype="float32",
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 0.06)
        for name, weight in model.model.layers.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            elif name.endswith("_proj.weight"):
                weight.normal_(0.0, 0.5 / math.sqrt(settings.hidden))
    return model


def mean_loss(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of positions 1 and later of each window.

    :param model: a causal language model
    :param windows: token ids, shape (windows, window)
    """
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor, batch: int = 8) -> float:
    """Return the perplexity of a model on windows, every predicted token weighing the same.

    :param model: a causal language model
    :param windows: token ids, shape (windows, window)
    :param batch: windows per forward pass
    """
    total = 0.0
    for part in windows.split(batch):
        total += mean_loss(model, part).item() * len(part)
    return math.exp(total / len(windows))


@torch.no_grad()
def rounded(model: transformers.LlamaForCausalLM, bits: int) -> transformers.LlamaForCausalLM:
    """Return a copy whose block linears hold weights rounded to nearest on a symmetric grid.

    Each output row has its own scale; embedding and head stay as they are.

    :param model: the model, left as it is
    :param bits: width of the integer grid
    """
    model = copy.deepcopy(model)
    top = 2 ** (bits - 1) - 1
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            largest = module.weight.abs().amax(dim=1, keepdim=True)
            scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / top
            integers = (module.weight / scale).round().clamp(-top - 1, top)
            module.weight.copy_(integers * scale)
    return model


def rate(step: int, settings: Settings) -> float:
    """Return the learning rate as a fraction of its peak: warm-up, plateau, decay to zero.

    A run that is made longer repeats the shorter one up to the start of the decay.

    :param step: number of the step, from 0
    :param settings: length of the run, of its warm-up and of its decay
    """
    warmup = min(settings.warmup, max(1, settings.steps // 10))
    decay = min(settings.decay, max(1, settings.steps // 2))
    return max(0.0, min(1.0, (step + 1) / warmup, (settings.steps - step) / decay))


def fit(
    model: transformers.LlamaForCausalLM,
    documents: Sequence[torch.Tensor],
    held_out: torch.Tensor,
    settings: Settings,
) -> list[dict[str, float]]:
    """Train a model in place and return its loss curve.

    :param model: the untrained model
    :param documents: token ids of the training documents, each of shape (tokens,)
    :param held_out: windows for the second loss of the curve, shape (windows, window)
    :param settings: the run
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    generator = torch.Generator().manual_seed(settings.seed)
    source = batches(documents, settings.batch, settings.window, generator)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    progress = tqdm(total=settings.steps, desc="train", mininterval=5.0)
    step = 0
    while step < settings.steps:
        step += 1
        loss = mean_loss(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        progress.update()
        if step == 1 or step % settings.curve_every == 0 or step == settings.steps:
            point = {
                "step": step,
                "train_loss": round(sum(losses) / len(losses), 4),
                "held_out_loss": round(math.log(perplexity(model, held_out)), 4),
            }
            curve.append(point)
            losses.clear()
            progress.set_postfix(train=point["train_loss"], held_out=point["held_out_loss"])
    progress.close()
    return curve


@contextlib.contextmanager
def repeatable(settings: Settings) -> Iterator[None]:
    """Seed torch and fix its number of threads; both are put back afterwards.

    :param settings: seed and number of threads
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def figures(
    model: transformers.LlamaForCausalLM, windows: torch.Tensor, untrained: float
) -> dict[str, float]:
    """Return perplexities of the model, as it is and with rounded weights.

    :param model: the trained model
    :param windows: evaluation windows, shape (windows, window)
    :param untrained: perplexity on the same windows before training
    """
    found = {"untrained": untrained, "float": perplexity(model, windows)}
    for bits in (8, 4, 3):
        found[f"w{bits}"] = perplexity(rounded(model, bits), windows)
    return {name: round(value, 4) for name, value in found.items()}


def run(
    settings: Settings, output: pathlib.Path, start: pathlib.Path | None = None
) -> dict[str, Any]:
    """Train tokenizer and model, write them to a folder and return the content of training.json.

    :param settings: the run
    :param output: folder of the model; files of the same names are replaced
    :param start: folder of an earlier run, whose model is trained further with its tokenizer
    """
    started = time.perf_counter()
    documents = {name: examples.documents(name) for name in examples.corpus.SPLITS}
    if start is None:
        tokenizer = train_tokenizer(documents["train"], settings.vocabulary, settings.positions)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(start, local_files_only=True)
        for name in ("is_local", "local_files_only"):  # how it was loaded, which it would write
            tokenizer.init_kwargs.pop(name, None)
        earlier = json.loads((start / "training.json").read_text("utf-8"))
    tokens = {name: encode(tokenizer, texts) for name, texts in documents.items()}
    held_out = pack(tokens["calibration"], settings.window)[:CURVE_WINDOWS]
    evaluation = pack(tokens["evaluation"], settings.window)[: settings.evaluation_windows]
    with repeatable(settings):
        if start is None:
            model = new_model(settings)
            untrained = perplexity(model, evaluation)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(start, local_files_only=True)
            untrained = earlier["evaluation_perplexity"]["untrained"]
        begun = time.perf_counter()
        curve = fit(model, tokens["train"], held_out, settings)
        fitted = time.perf_counter()
        report = {
            "settings": dataclasses.asdict(settings),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "corpus": {
                name: {
                    "documents": len(texts),
                    "characters": sum(map(len, texts)),
                    "tokens": sum(map(len, tokens[name])),
                }
                for name, texts in documents.items()
            },
            "evaluation_windows": len(evaluation),
            "evaluation_perplexity": figures(model, evaluation, untrained),
            "curve": curve,
            "training_seconds": round(fitted - begun, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }
        if start is not None:
            report["earlier"] = earlier
    save(model, tokenizer, report, output)
    return report


def save(
    model: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerBase,
    report: dict[str, Any],
    output: pathlib.Path,
) -> None:
    """Write a model to a folder; a reader never sees half a file.

    :param model: the trained model
    :param tokenizer: its tokenizer
    :param report: content of training.json
    :param output: the folder, made when it is missing
    """
    output.mkdir(parents=True, exist_ok=True)
    # Inside the folder itself: os.replace cannot move a file to another file system.
    with tempfile.TemporaryDirectory(dir=output) as folder:
        draft = pathlib.Path(folder)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "training.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        for path in sorted(draft.iterdir()):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(path, output / path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param arguments: the command line without the program's name; None takes the process's own
    """
    parser = argparse.ArgumentParser(prog="python benchmarks/train_example.py", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the model")
    parser.add_argument("--start", type=pathlib.Path, help="folder of a model to train further")
    defaults = Settings()
    for name, text in (
        ("steps", "optimizer steps"),
        ("seed", "seed of weights and order"),
        ("threads", "threads of torch; the weights depend on it"),
        ("batch", "windows in a batch"),
        ("evaluation_windows", "windows behind the perplexities at the end"),
    ):
        option = "--" + name.replace("_", "-")
        default = getattr(defaults, name)
        parser.add_argument(option, type=int, default=default, help=f"{text} (default {default})")
    chosen = vars(parser.parse_args(arguments))
    output, start = chosen.pop("output"), chosen.pop("start")
    for name, value in chosen.items():
        if value < (0 if name == "seed" else 1):
            parser.error(f"{name} must be positive; got {value}")
    report = run(Settings(**chosen), output, start)
    LOGGER.info("wrote %s: perplexity %s", output, report["evaluation_perplexity"])
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise SystemExit(main())
