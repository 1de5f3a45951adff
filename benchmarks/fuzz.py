"""What becomes of damaged files: an error that names them, or the result of the sound ones.

    python benchmarks/fuzz.py [--count 10000] [--seed 0] [--only KIND ...] [--at KIND:NUMBER]

writes exports, scales, adapters, model folders and checkpoints of tiny models, damages copies of
them as the seed says (see ``mutations.py``), some with their hashes made right again, and has each
read by one of its readers, in a process of its own with little memory and time. Anything else than
an error of ours that names the file, or the result of the undamaged files, is a failure: an error
of another library, a hang, a lot of memory, code that is run, a question, or another result that no
new hash explains. Each new kind of failure is printed once, with what repeats it.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import copy
import functools
import hashlib
import io
import json
import linecache
import logging
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import itertools

import mutations
import torch
from report import print_table

import aimet_ext
from aimet_ext import CorruptFileError, MissingExtraError, TransformRefused, examples

__all__ = ["FAILURES", "KINDS", "build", "run"]

IDS = torch.arange(32).reshape(2, 16) * 3 % 128
PACKAGE = str(pathlib.Path(aimet_ext.__file__).parent)
TECHNIQUES: dict[str, dict[str, Any]] = {
    "omniquant": {"num_iterations": 2, "search_sweeps": 0},
    "seq_mse": {"num_candidates": 3},
    "gptq": {},
    "adaround": {"num_iterations": 4},
    "lpbq": {"block_size": 16, "num_candidates": 3},
    "awq": {"num_grid": 4},
    "hqq": {"num_iterations": 4},
    "spinquant": {"num_iterations": 2},
}
REFUSED, SAME, OTHER = "refused", "same result", "other values"
FAILURES = (
    "unnamed",
    "raw error",
    "other result",
    "not finite",
    "hang",
    "memory",
    "died",
    "code run",
    "asked",
)
OURS = (CorruptFileError, MissingExtraError, TransformRefused, ValueError, OSError)
MEMORY, SECONDS, PER_PROCESS = 3 << 30, 30, 40


class Asked(Exception):
    """A reader asked a person something."""


class Unusable(Exception):
    """Files of a model that is another one, with hashes of its own, and fails when it is run."""


# ------------------------------------------------------------------------------------- samples


def tiny(layers: int = 1, **changes: Any) -> Any:
    """A causal LM of a few kilobytes, always the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        pad_token_id=2, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


def make_sim(layers: int = 1) -> Any:
    return aimet_ext.create_sim(tiny(layers), IDS, activations=None, lm_head=None, embedding=None)


def apply(sim: Any, technique: str, folder: Any, **more: Any) -> None:
    function = getattr(aimet_ext, f"apply_{technique}")
    function(sim, [*IDS.split(1)], checkpoint_dir=folder, **TECHNIQUES[technique], **more)


def onnx_model() -> Any:
    """Three linear layers."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    draw, widths, nodes, constants = np.random.default_rng(0), (32, 32, 32, 16), [], []
    for number, (in_, out) in enumerate(itertools.pairwise(widths)):
        x = "x" if number == 0 else f"h{number - 1}"
        y = "y" if number == 2 else f"h{number}"
        weight = draw.standard_normal((out, in_)).astype(np.float32) / 6
        bias = draw.standard_normal(out).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"fc{number}.weight"))
        constants.append(numpy_helper.from_array(bias, f"fc{number}.bias"))
        names = [x, f"fc{number}.weight", f"fc{number}.bias"]
        nodes.append(helper.make_node("Gemm", names, [y], f"fc{number}", transB=1))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", 32), ("y", 16))
    ]
    graph = helper.make_graph(nodes, "mlp", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    return model


def onnx_feed() -> dict[str, Any]:
    return {"x": torch.linspace(-2, 2, 128).reshape(4, 32).numpy()}


def make_onnx_sim() -> Any:
    import aimet_onnx

    sim = aimet_onnx.QuantizationSimModel(
        onnx_model(), param_type="int4", activation_type="int16", config_file="default"
    )
    sim.compute_encodings([onnx_feed()])
    return sim


def build(place: pathlib.Path, kinds: Iterable[str] | None = None) -> None:
    """Write the sound files of some kinds below a folder, and what each reader makes of them."""
    kinds = list(KINDS) if kinds is None else list(kinds)
    wanted = {base for kind in kinds for base in (kind, *NEEDS.get(kind, ()))}
    with quiet():
        (place / "text.txt").write_text("The quick brown fox jumps over it.\n\n" * 20, "utf-8")
        for kind in [kind for kind in BUILDERS if kind in wanted]:
            BUILDERS[kind](place, place / kind)
        for kind in kinds:
            found = {}
            for name in KINDS[kind]:
                folder = shutil.copytree(place / kind, place / "work" / kind)
                found[name] = KINDS[kind][name](folder)
                shutil.rmtree(folder)
            (place / f"{kind}.expected").write_text(json.dumps(found))


def build_model(place: pathlib.Path, folder: pathlib.Path) -> None:
    tiny().save_pretrained(folder)
    for file in examples.model_dir().glob("tokenizer*"):
        shutil.copy(file, folder)


def build_shards(place: pathlib.Path, folder: pathlib.Path) -> None:
    build_model(place, folder)
    (folder / "model.safetensors").unlink()
    tiny().save_pretrained(folder, max_shard_size="50KB")


def build_torch(place: pathlib.Path, folder: pathlib.Path) -> None:
    from aimet_ext.cli import jobs
    from aimet_ext.recipes.recipe import CalibrationPlan

    recipe = aimet_ext.Recipe(
        calibration=CalibrationPlan(seq_length=16, num_batches=2, batch_size=2),
        techniques={"omniquant": {"num_iterations": 1, "search_sweeps": 0}},
    )
    jobs.quantize(place / "model", place / "text.txt", folder, recipe=recipe, hf_checkpoint=False)


def build_onnx(place: pathlib.Path, folder: pathlib.Path) -> None:
    from aimet_ext.files.ledger import Ledger
    from aimet_ext.sim.protocol import adapt

    sim = make_onnx_sim()
    adapt(sim).ledger = ledger = Ledger("cd" * 32)
    sides: Any = [("fc0", "out", torch.linspace(1, 2, 32)), ("fc1", "in", torch.linspace(2, 1, 32))]
    ledger.record("smooth", "", "fc0->fc1", "other", sides, size=32)
    aimet_ext.export(sim, folder, "m", onnx_feed(), external_data=True)


def build_scales(place: pathlib.Path, folder: pathlib.Path) -> None:
    folder.mkdir()
    shutil.copy(place / "torch" / "scales.safetensors", folder)


def build_rotation(place: pathlib.Path, folder: pathlib.Path) -> None:
    """Scales with matrices."""
    with tempfile.TemporaryDirectory() as home:
        aimet_ext.apply_rotation(make_sim(), output_path=f"{home}/out", progress=False)
        folder.mkdir()
        shutil.copy(f"{home}/out/scales.safetensors", folder)


def build_starts(place: pathlib.Path, folder: pathlib.Path) -> None:
    """Scales and clips of AWQ, from which OmniQuant starts."""
    with tempfile.TemporaryDirectory() as home:
        aimet_ext.apply_awq(make_sim(), [IDS], 4, output_path=f"{home}/out", progress=False)
        folder.mkdir()
        for name in ("scales.safetensors", "clips.safetensors"):
            shutil.copy(f"{home}/out/{name}", folder)


def build_llmc(place: pathlib.Path, folder: pathlib.Path) -> None:
    """The same in LLMC's files."""
    from aimet_ext.files.starts import load_starts

    starts = load_starts(place / "starts")
    clips: dict[int, dict[str, Any]] = {}
    for name, (_, high) in starts.shares.items():
        block, layer = name.removeprefix("model.layers.").split(".", 1)
        logits = torch.logit(high.clamp(0.01, 0.99))
        clips.setdefault(int(block), {})[f"{layer}.weight_quantizer.upbound_factor"] = logits
    folder.mkdir()
    torch.save(dict(starts.columns), folder / "scales.pth")
    torch.save(clips, folder / "clips.pth")


def build_adapter(place: pathlib.Path, folder: pathlib.Path) -> None:
    import peft

    settings = {"init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    config = peft.LoraConfig(r=2, lora_alpha=4, alpha_pattern={"v_proj": 3}, **settings)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(), config, adapter_name="default")
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def build_lora(place: pathlib.Path, folder: pathlib.Path) -> None:
    from aimet_ext import lora

    sim = lora.create_sim(place / "adapter", place / "torch")
    lora.quantize(sim, None, [IDS])
    lora.export(sim, folder, "m", IDS[:1])


def build_cache(place: pathlib.Path, folder: pathlib.Path) -> None:
    prepared = aimet_ext.prepare_model(tiny(), mask_value=-100)
    sim = aimet_ext.create_sim(prepared, IDS[:1])
    sim.compute_encodings(lambda module: module(IDS))
    aimet_ext.export_with_cache(sim, folder, prefill_length=8, context_length=24)


def build_checkpoints(place: pathlib.Path, folder: pathlib.Path) -> None:
    for technique in TECHNIQUES:
        apply(
            make_sim(2 if technique == "omniquant" else 1),
            technique,
            folder / technique,
            progress=False,
        )


def build_onnx_checkpoints(place: pathlib.Path, folder: pathlib.Path) -> None:
    for technique in ("gptq", "seq_mse"):
        function = getattr(aimet_ext, f"apply_{technique}")
        function(make_onnx_sim(), [onnx_feed()], checkpoint_dir=folder / technique, progress=False)


BUILDERS = {
    "model": build_model,
    "shards": build_shards,
    "torch": build_torch,
    "onnx": build_onnx,
    "scales": build_scales,
    "rotation": build_rotation,
    "starts": build_starts,
    "llmc": build_llmc,
    "adapter": build_adapter,
    "lora": build_lora,
    "cache": build_cache,
    "checkpoints": build_checkpoints,
    "onnx checkpoints": build_onnx_checkpoints,
}
NEEDS = {
    "torch": ("model",),
    "scales": ("model", "torch", "adapter"),
    "rotation": ("model", "torch", "adapter"),
    "llmc": ("starts",),
    "adapter": ("model", "torch"),
    "lora": ("model", "torch", "adapter"),
}


# ------------------------------------------------------------------------------------- readers


def outcome_of(run: Callable[[], Any]) -> str:
    """Hash the outputs of a model that was read; large weights may make them infinite."""
    try:
        with torch.no_grad():
            outputs = run()
    except Exception as error:
        raise Unusable from error
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return digest(*(torch.as_tensor(output).nan_to_num() for output in outputs))


def digest(*values: Any) -> str:
    """Hash tensors, arrays and JSON values; ``not finite`` if a number is none."""
    found = hashlib.sha256()
    for value in values:
        array = value.detach() if isinstance(value, torch.Tensor) else value
        if isinstance(array, torch.Tensor) or hasattr(array, "tobytes"):
            tensor = torch.as_tensor(array)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return "not finite"
            found.update(
                tensor.contiguous().view(torch.uint8).numpy().tobytes()
                if tensor.numel() and tensor.dim()
                else b""
            )
            found.update(str(tuple(tensor.shape)).encode())
        else:
            found.update(json.dumps(value, sort_keys=True, default=str).encode())
    return found.hexdigest()


def place_of(folder: pathlib.Path) -> pathlib.Path:
    return folder.parent.parent


def load_torch(folder: pathlib.Path) -> str:
    sim = aimet_ext.load(folder)
    return outcome_of(lambda: sim.model(IDS))


def load_onnx(folder: pathlib.Path) -> str:
    sim = aimet_ext.load(folder)  # must outlive its session
    return outcome_of(lambda: sim.session.run(None, onnx_feed()))


def check(folder: pathlib.Path) -> str | None:
    """What is found counts as an error that names the file."""
    from aimet_ext.integrity.check import check_integrity

    found = check_integrity(folder)
    return None if found else "sound"


def inspect(folder: pathlib.Path) -> str:
    from aimet_ext.artifact.inspect import inspect_export

    found = inspect_export(folder)
    found.pop("unlisted")
    return digest(found)


def command(*words: Any) -> str:
    from typer.testing import CliRunner

    from aimet_ext.cli import app

    ended = CliRunner().invoke(app, [str(word) for word in words])
    if ended.exit_code in (3, 4):
        raise CorruptFileError(ended.stderr)
    if ended.exit_code:
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        raise RuntimeError(f"exit code {ended.exit_code}: {ended.stderr}")
    return digest(ended.stdout)


def cli_inspect(folder: pathlib.Path) -> str:
    return command("inspect", folder)


def cli_evaluate(folder: pathlib.Path) -> str:
    text = place_of(folder) / "text.txt"
    return command("evaluate", folder, "--text", text, "--seq-length", 16, "--num-windows", 2)


def cli_quantize(folder: pathlib.Path) -> str:
    with tempfile.TemporaryDirectory() as home:
        command(
            "quantize", folder, "--technique", "nearest", "--seq-length", 16, "--num-batches", 1,
            "--calibration", place_of(folder) / "text.txt", "--output", f"{home}/out",
        )  # fmt: skip
        sim = aimet_ext.load(f"{home}/out")
        return outcome_of(lambda: sim.model(IDS))


def read_scales(folder: pathlib.Path) -> str:
    scales = aimet_ext.load_scales(
        folder / "scales.safetensors" if folder.name == "scales" else folder
    )
    return digest(
        *scales.to_tensors()[0].values(),
        list(scales),
        scales.pairs,
        scales.origin,
        scales.techniques,
    )


def read_starts(folder: pathlib.Path) -> str:
    from aimet_ext.files.starts import load_starts

    starts = load_starts(folder)
    shares = [each for pair in starts.shares.values() for each in pair]
    return digest(*starts.columns.values(), *shares, [*starts.columns, *starts.shares])


def start_with(folder: pathlib.Path) -> str:
    sim = copy.deepcopy(_sound(1))
    settings = {"num_iterations": 1, "search_sweeps": 0, "progress": False}
    aimet_ext.apply_omniquant(sim, [IDS], init=folder, **settings)
    return digest(sim.model(IDS), *sim.model.state_dict().values())


def fold_with(folder: pathlib.Path) -> str:
    from aimet_ext import lora

    adapter, scales = (place_of(folder) / "adapter", folder / "scales.safetensors")
    if folder.name == "adapter":
        adapter, scales = folder, place_of(folder) / "torch"
    with tempfile.TemporaryDirectory() as home:
        folded = lora.fold_adapter(adapter, scales, f"{home}/out", base=place_of(folder) / "model")
    return digest(*folded.tensors.values(), folded.config, folded.folded)


def cli_fold(folder: pathlib.Path) -> str:
    with tempfile.TemporaryDirectory() as home:
        return command(
            "lora",
            "fold",
            folder,
            "--scales",
            place_of(folder) / "torch",
            "--output",
            f"{home}/out",
        )


def read_adapters(folder: pathlib.Path) -> str:
    from aimet_ext import lora

    adapter = lora.read_adapter(folder)
    layers = adapter.layers
    tensors = [tensor for layer in layers.values() for tensor in (layer.a, layer.b)]
    return digest(*tensors, list(layers), [layer.scaling for layer in layers.values()])


def put_on(folder: pathlib.Path) -> str:
    from aimet_ext import lora

    sim = lora.create_sim(folder, place_of(folder) / "torch")
    return outcome_of(lambda: sim.model(IDS))


def attach(folder: pathlib.Path) -> str:
    from aimet_ext import lora

    model = lora.attach_adapter(tiny(), lora.read_adapter(folder))
    return outcome_of(lambda: model(IDS).logits)


def load_lora(folder: pathlib.Path) -> str:
    from aimet_ext import lora

    sim = lora.load(folder)
    return outcome_of(lambda: sim.model(IDS))


def load_cache(folder: pathlib.Path) -> str:
    graphs = aimet_ext.load_cache_graphs(folder)
    return outcome_of(lambda: graphs.logits(IDS[:1], prompt=8))


def read_model(folder: pathlib.Path) -> str:
    from aimet_ext.models.folders import read_causal_lm

    model = read_causal_lm(folder, dtype="float32")
    return outcome_of(lambda: model(IDS).logits)


def read_tokenizer(folder: pathlib.Path) -> str:
    from aimet_ext.models.folders import read_tokenizer

    return digest(read_tokenizer(folder)("The quick brown fox").input_ids)


@functools.cache
def _sound(layers: int) -> Any:
    return make_sim(layers)


def resume(technique: str, folder: pathlib.Path) -> str:
    sim = copy.deepcopy(_sound(2 if technique == "omniquant" else 1))
    before = [*sim.model.state_dict().values()]
    held = digest(*before)
    try:
        apply(sim, technique, folder / technique, progress=False)
    except BaseException:
        assert digest(*sim.model.state_dict().values()) == held, "the sim was changed"
        raise
    return digest(sim.model(IDS), *sim.model.state_dict().values())


def resume_onnx(technique: str, folder: pathlib.Path) -> str:
    sim = make_onnx_sim()
    function = getattr(aimet_ext, f"apply_{technique}")
    function(sim, [onnx_feed()], checkpoint_dir=folder / technique, progress=False)
    return digest(*sim.session.run(None, onnx_feed()))


EXPORT: dict[str, Any] = {"check_integrity": check, "inspect": inspect, "cli inspect": cli_inspect}
KINDS: dict[str, dict[str, Callable[[pathlib.Path], str | None]]] = {
    "torch": {"load": load_torch, **EXPORT, "scales": read_scales, "cli evaluate": cli_evaluate},
    "onnx": {"load": load_onnx, **EXPORT, "scales": read_scales},
    "cache": {"load": load_cache, "inspect": inspect},
    "scales": {"load_scales": read_scales, "fold": fold_with},
    "rotation": {"load_scales": read_scales, "fold": fold_with},
    "starts": {"load_starts": read_starts, "omniquant": start_with},
    "llmc": {"load_starts": read_starts, "omniquant": start_with},
    "adapter": {
        "read": read_adapters,
        "fold": fold_with,
        "cli fold": cli_fold,
        "attach": attach,
        "create_sim": put_on,
    },
    "lora": {"load": load_lora, "inspect": inspect},
    "model": {
        "read": read_model,
        "tokenizer": read_tokenizer,
        "cli evaluate": cli_evaluate,
        "cli quantize": cli_quantize,
    },
    "shards": {"read": read_model, "cli evaluate": cli_evaluate},
    "checkpoints": {name: functools.partial(resume, name) for name in TECHNIQUES},
    "onnx checkpoints": {n: functools.partial(resume_onnx, n) for n in ("gptq", "seq_mse")},
}
HASHED = (
    *("torch", "onnx", "cache", "scales", "rotation", "starts", "lora", "checkpoints"),
    "onnx checkpoints",
)
SLOW = ("cli quantize", "create_sim")  # a tenth as often


# ---------------------------------------------------------------------------------- one mutation


def attempt(
    place: pathlib.Path, seed: int, kind: str, number: int, *, slow: bool = True
) -> dict[str, Any]:
    """Damage a copy of the files of a kind, have it read, and say what became of it.

    :param slow: False to leave out the readers that take longest.
    """
    draw = random.Random(f"{seed} {kind} {number}")
    readers = list(KINDS[kind])
    reader = draw.choices(readers, [slow if name in SLOW else 10 for name in readers])[0]
    folder = pathlib.Path(shutil.copytree(place / kind, place / "work" / str(os.getpid()) / kind))
    # As deep as the samples, so that readers find what lies beside them.
    home = place / "work" / str(os.getpid())
    try:
        for link in ("model", "torch", "adapter", "text.txt"):
            with contextlib.suppress(FileExistsError):
                (place / "work" / link).symlink_to(place / link)
        what, resealed = damage(place, folder, kind, reader, draw)
        before = {*folder.iterdir()}
        outcome, detail = judge(place, folder, kind, reader, resealed, what)
        if {*folder.iterdir()} != before:
            outcome, detail = "other result", "the folder has other files than before"
    finally:
        shutil.rmtree(home, ignore_errors=True)
    again = f"--seed {seed} --at '{kind}:{number}'"
    return {"kind": kind, "reader": reader, "what": what, "resealed": resealed,
            "outcome": outcome, "detail": detail, "again": again}  # fmt: skip


def damage(
    place: pathlib.Path, folder: pathlib.Path, kind: str, reader: str, draw: random.Random
) -> tuple[str, bool]:
    names = None
    if kind.endswith("checkpoints"):
        files = sorted((folder / reader).rglob("*"))
        names = [file.relative_to(folder).as_posix() for file in files]
    if kind in ("model", "shards", "adapter") and draw.random() < 0.08:
        return mutations.of_code(folder, place / "work" / "marker", draw), False
    what = [mutations.mutate(folder, draw, names)]
    while draw.random() < 0.1:
        what.append(mutations.mutate(folder, draw, names))
    resealed = kind in HASHED and draw.random() < 0.65
    if resealed:
        mutations.reseal(folder)
    return "; ".join(what), resealed


def judge(
    place: pathlib.Path, folder: pathlib.Path, kind: str, reader: str, resealed: bool, what: str
) -> tuple[str, str]:
    expected = json.loads((place / f"{kind}.expected").read_text())[reader]
    marker = place / "work" / "marker"
    try:
        with quiet():
            found = KINDS[kind][reader](folder)
    except Unusable as error:
        outcome, detail = OTHER, ""
        if kind in HASHED and not resealed:
            outcome, detail = classify(error.__cause__ or error, folder, what)
    except BaseException as error:  # noqa: BLE001  (anything that a reader lets through)
        outcome, detail = classify(error, folder, what)
    else:
        outcome, detail = REFUSED, ""
        if found == expected:
            outcome = SAME
        elif found == "not finite":
            outcome = found
        elif found is not None:
            outcome = OTHER if resealed or kind not in HASHED else "other result"
    if marker.exists():
        marker.unlink()
        outcome = "code run"
    return outcome, detail


def classify(error: BaseException, folder: pathlib.Path, what: str) -> tuple[str, str]:
    """Return what kind of end an exception is, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    inner = next((f for f in reversed(frames) if f.filename.startswith(PACKAGE)), last)
    where = f"{pathlib.Path(inner.filename).name}:{inner.lineno}"
    detail = f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, Asked):
        return "asked", detail
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "memory", detail
    by_command = last.filename == __file__ and isinstance(error, CorruptFileError)
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    raised = last.filename.startswith(PACKAGE) and line.startswith("raise ")
    of_system = isinstance(error, OSError) and str(folder) in str(error)  # with the file's name
    if not isinstance(error, OURS) or not (raised or by_command or of_system):
        return "raw error", detail
    files = {part.partition(":")[0].rpartition("/")[2] for part in what.split("; ")}
    # Of two folders that do not go together, an error may name either.
    known = (str(folder.parent.parent), "adapter 'default'", *filter(None, files))
    if not any(name in str(error) for name in known):
        return "unnamed", detail
    return REFUSED, detail


# ----------------------------------------------------------------------------------- processes


def worker(place: pathlib.Path, seed: int, tasks: list[tuple[str, int]], pipe: int) -> None:
    """Run tasks in this process, which is a child with little memory, and report each."""
    here = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY, here + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    builtins.input = _ask
    for task in tasks:
        os.write(pipe, b"\n")
        result = attempt(place, seed, *task)
        os.write(pipe, json.dumps(result).encode() + b"\n")


def _ask(*_: Any) -> str:
    raise Asked


def run(
    place: pathlib.Path, tasks: list[tuple[str, int]], seed: int = 0, processes: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield what became of each task ``(kind, number)``, in forks of this process."""
    (place / "work").mkdir(exist_ok=True)
    waiting = collections.deque(tasks)
    children: dict[int, _Child] = {}
    while waiting or children:
        while waiting and len(children) < processes:
            batch = [waiting.popleft() for _ in range(min(PER_PROCESS, len(waiting)))]
            child = _Child(place, seed, batch)
            children[child.pipe] = child
        for pipe in select.select(list(children), [], [], 1)[0]:
            yield from children[pipe].read()
        for pipe, child in list(children.items()):
            if failure := child.ended():
                yield failure
            if child.done:
                waiting.extendleft(reversed(child.tasks))
                del children[pipe]


class _Child:
    """A process that works on tasks, and what it said so far."""

    def __init__(self, place: pathlib.Path, seed: int, tasks: list[tuple[str, int]]) -> None:
        self.place, self.seed, self.tasks, self.done = place, seed, tasks, False
        self.rest, self.closed, self.since = b"", False, time.monotonic()
        self.pipe, end = os.pipe()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                os.close(self.pipe)
                worker(place, seed, tasks, end)
                code = 0
            except BaseException:  # noqa: BLE001  (a mistake of this program)
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(code)
        os.close(end)

    def read(self) -> Iterator[dict[str, Any]]:
        content = os.read(self.pipe, 1 << 16)
        self.closed = not content
        *lines, self.rest = (self.rest + content).split(b"\n")
        for line in lines:
            self.since = time.monotonic()
            if line:
                self.tasks.pop(0)
                yield json.loads(line)

    def ended(self) -> dict[str, Any] | None:
        """Return the failure of the task at hand if the process was killed or takes too long."""
        hangs = time.monotonic() - self.since > SECONDS
        if not (hangs or self.closed):
            return None
        if hangs:
            os.kill(self.process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        os.close(self.pipe)
        shutil.rmtree(self.place / "work" / str(self.process), ignore_errors=True)
        self.done = True
        if not self.tasks:
            return None
        kind, number = self.tasks.pop(0)
        return {"kind": kind, "reader": "?", "what": "", "resealed": False,
                "outcome": "hang" if hangs else "died", "detail": f"wait status {status}",
                "again": f"--seed {self.seed} --at '{kind}:{number}'"}  # fmt: skip


def tasks_of(kinds: list[str], count: int) -> list[tuple[str, int]]:
    return [(kinds[n % len(kinds)], n // len(kinds)) for n in range(count)]


def prepare(place: pathlib.Path, kinds: list[str]) -> None:
    """Write the sound files in a child: what onnxruntime starts there is not in later forks."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            build(place, kinds)
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError("the sound files could not be written")


def main() -> None:
    """Damage, read, count; print each new kind of failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--at", help="one mutation again, with its traceback: KIND:NUMBER")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    sys.setrecursionlimit(10_000)
    import aimet_onnx  # noqa: F401
    import aimet_torch  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as home:
        place = pathlib.Path(home)
        kind, _, number = (options.at or "").partition(":")
        prepare(place, [kind] if kind else options.only)
        if kind:
            again(place, options.seed, kind, int(number))
            return
        start, counts, seen = time.perf_counter(), collections.Counter(), set()
        for result in run(
            place, tasks_of(options.only, options.count), options.seed, options.processes
        ):
            counts[result["kind"], result["outcome"]] += 1
            key = (
                result["outcome"],
                result["detail"].partition(": ")[0],
                result["kind"] if not result["detail"] else "",
            )
            if result["outcome"] in FAILURES and key not in seen:
                seen.add(key)
                sealed = ", hashes made right" if result["resealed"] else ""
                what = f"{result['kind']}, {result['reader']}{sealed}: {result['what']}"
                print(
                    f"{result['outcome']}: {what}\n    {result['detail']}\n    {result['again']}",
                    flush=True,
                )
        outcomes = (REFUSED, SAME, OTHER, *FAILURES)
        rows = [[kind, *(counts[kind, outcome] for outcome in outcomes)] for kind in options.only]
        rows.append(["all", *(sum(row[n] for row in rows) for n in range(1, len(outcomes) + 1))])
        print_table("Damaged files", ["files", *outcomes], rows)
        seconds = time.perf_counter() - start
        print(f"{sum(counts.values())} mutations in {seconds:.0f} s, {len(seen)} kinds of failure")


def again(place: pathlib.Path, seed: int, kind: str, number: int) -> None:
    """Show one mutation with its traceback."""
    plain = classify

    def shown(error: BaseException, *rest: Any) -> tuple[str, str]:
        traceback.print_exception(error)
        return plain(error, *rest)

    globals()["classify"] = shown
    (place / "work").mkdir(exist_ok=True)
    for key, value in attempt(place, seed, kind, number).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
