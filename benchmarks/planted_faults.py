"""Are faults in an export found and named, and are sound exports left in peace?

    python benchmarks/planted_faults.py [--places 20] [--kinds NAME ...] [--quick]

exports a PyTorch simulation and an ONNX one, both with scales, plants every kind of fault at
seeded places in copies of them, with the manifest written anew, and runs ``check_integrity``. Each
place is checked once as it is, and once with the record of single tensors taken away, so that the
files have nothing but each other. Then exports of many kinds are checked as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import pathlib
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import faults
import onnx
import torch
from common import quiet
from report import HERE, add_section, bar, machine, named, print_table

import aimet_ext
from aimet_ext import LPBQ, Blockwise, PerTensor, QSpec
from aimet_ext.errors import Finding
from aimet_ext.files.ledger import Ledger
from aimet_ext.files.manifest import relist_files
from aimet_ext.integrity.check import check_integrity
from aimet_ext.sim.protocol import adapt

IDS = torch.arange(64).reshape(4, 16) * 3 % 128
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def model(family: str, **changes: Any) -> Any:
    """A small random causal LM with gains and biases that are not trivial."""
    import transformers

    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **changes,
    }
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in built.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return aimet_ext.prepare_model(built.eval(), mask_value=-100.0)


def torch_sim(family: str = "llama", *, changes: Any = None, **settings: Any) -> Any:
    """A simulation with ranges everywhere."""
    sim = aimet_ext.create_sim(model(family, **(changes or {})), IDS, **settings)
    sim.compute_encodings(lambda module: module(IDS))
    return sim


def onnx_sim(float_model: pathlib.Path, bits: str = "int4", block: int | None = None) -> Any:
    """A simulation of the float model of an export, with ranges everywhere."""
    import aimet_onnx
    from aimet_onnx.quantsim import set_grouped_blockwise_quantization_for_weights

    sim = aimet_onnx.QuantizationSimModel(
        onnx.load(str(float_model)),
        param_type=bits,
        activation_type="int16",
        config_file="htp_v79",
        dummy_input=feed(),
    )
    if block:
        set_grouped_blockwise_quantization_for_weights(
            sim, ("MatMul", "Gemm"), 4, 8, block, strict=False
        )
    sim.compute_encodings([feed()])
    return sim


def feed() -> dict[str, Any]:
    """One batch by the names of the graph's inputs."""
    return {"input_ids": IDS.numpy()}


def rescaled(sim: Any, layers: int = 2) -> None:
    """Two techniques' worth of scales in a sim's ledger, for its files to hold."""
    ledger = Ledger("cd" * 32)
    draw = torch.Generator().manual_seed(0)
    for number, technique in itertools.product(range(layers), ("smooth", "omniquant")):
        block = f"model.layers.{number}"
        scale = torch.exp(torch.randn(64, generator=draw))
        sides = [(f"{block}.self_attn.{name}_proj", "in", scale) for name in "qkv"]
        sides.append((f"{block}.input_layernorm", "out", 1 / scale))
        ledger.record(technique, block, "norm->q,k,v", "norm_qkv", sides, size=64)
    adapt(sim).ledger = ledger


def put_aside(folder: pathlib.Path) -> None:
    """Move the weights of a float model into a file beside it."""
    path = next(p for p in folder.glob("*.onnx") if not p.name.endswith(".qdq.onnx"))
    whole = onnx.load(str(path))
    onnx.save_model(whole, str(path), save_as_external_data=True, location=f"{path.name}.data")
    relist_files(folder)


def subjects(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The exports that faults are planted in: biases, scales and weights in a file of their own."""
    settings = {"weights": QSpec(granularity=LPBQ(32))}
    sim = aimet_ext.create_sim(model("qwen2"), IDS, **settings)
    aimet_ext.apply_omniquant(sim, list(IDS.split(2)), 2, progress=False)
    sim.compute_encodings(lambda module: module(IDS))
    aimet_ext.export(sim, folder / "torch", "m", IDS, aimet_keys=True)
    aimet_ext.export(torch_sim("qwen2"), folder / "float", "m", IDS)
    put_aside(folder / "torch")
    sim = onnx_sim(folder / "float" / "m.onnx", block=32)
    rescaled(sim)
    aimet_ext.export(sim, folder / "onnx", "m", feed(), external_data=True)
    return {"torch": folder / "torch", "onnx": folder / "onnx"}


def clean(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Sound exports of twenty kinds."""
    grids: dict[str, Any] = {
        "W4": {},
        "W4 LPBQ 16": {"weights": QSpec(granularity=LPBQ(16))},
        "W4 blocks of 16": {"weights": QSpec(granularity=Blockwise(16))},
        "W3 asymmetric": {"weights": QSpec(bitwidth=3, symmetric=False)},
        "W2 blocks of 16": {"weights": QSpec(bitwidth=2, granularity=Blockwise(16))},
        "W8A8": {"weights": QSpec(bitwidth=8), "activations": 8},
        "W8 per tensor": {"weights": QSpec(bitwidth=8, granularity=PerTensor())},
        "weights only": {"activations": None},
        "blocks only": {"lm_head": None, "embedding": None},
    }
    kinds = [(f"llama {name}", "llama", {}, grid) for name, grid in grids.items()]
    kinds += [(f"{family} W4", family, {}, {}) for family in FAMILIES[1:]]
    kinds.append(("tied W4", "llama", {"tie_word_embeddings": True}, {}))
    for number, (name, family, changes, settings) in enumerate(kinds):
        sim = torch_sim(family, changes=changes, **settings)
        options = {"hf_checkpoint": number % 3 == 0, "aimet_keys": number % 2 == 0}
        aimet_ext.export(sim, folder / name, "m", IDS, **options)
        yield name, folder / name
    for technique in ("omniquant", "seq_mse", "gptq", "adaround"):
        sim = aimet_ext.create_sim(model("qwen2"), IDS)
        few = {"omniquant": [3], "adaround": [20]}.get(technique, [])
        apply = getattr(aimet_ext, f"apply_{technique}")
        apply(sim, list(IDS.split(2)), *few, progress=False)
        sim.compute_encodings(lambda module: module(IDS))
        aimet_ext.export(sim, folder / technique, "m", IDS)
        yield f"qwen2 {technique}", folder / technique
    source = folder / "qwen2 W4" / "m.onnx"
    for name, bits, block, options in (
        ("onnx W4", "int4", None, {"bias": "int32"}),
        ("onnx W4 LPBQ 16", "int4", 16, {"external_data": True}),
        ("onnx W8", "int8", None, {"qdq": False}),
    ):
        aimet_ext.export(onnx_sim(source, bits, block), folder / name, "m", feed(), **options)
        yield name, folder / name


def names_it(findings: list[Finding], expected: set[str]) -> bool:
    """Whether a finding, not one of the manifest alone, has one of the names in it."""
    return any(
        name in f"{finding.name} {finding.message}"
        for finding in findings
        if finding.check not in ("manifest", "record")
        for name in expected
    )


def measure(kind: str, sources: dict[str, pathlib.Path], places: int) -> dict[str, Any]:
    """Plant one kind of fault at many places and count what is found and named."""
    counts = {"found": 0, "named": 0, "alone_found": 0, "alone_named": 0}
    missed, checks = [], set()
    every = list(sources.items())
    for seed in range(places):
        origin, sound = every[seed % len(every)]
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place) / "out"
            expected = faults.plant(kind, sound, folder, seed)
            for record in (False, True):
                faults.cover_up(folder, record=record)
                findings = check_integrity(folder)
                prefix = "alone_" if record else ""
                counts[f"{prefix}found"] += bool(findings)
                counts[f"{prefix}named"] += names_it(findings, expected)
                if not record:
                    checks |= {finding.check for finding in findings}
                if not names_it(findings, expected):
                    missed.append([origin, seed, "alone" if record else "", sorted(expected)[:2]])
    return {**counts, "places": places, "checks": sorted(checks), "missed": missed}


def planted(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of faults."""
    head = ["fault", "places", "found", "named", "files alone: found", "named ", "by the checks"]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        with silence():
            sources = subjects(pathlib.Path(place))
        for name, folder in sources.items():
            bar(f"{name}: no finding before faults are planted", not check_integrity(folder))
        for kind in options.kinds:
            result = measure(kind, sources, options.places)
            for origin, seed, alone, expected in result["missed"]:
                print(f"  not named: {kind}, {origin} {seed} {alone}: {', '.join(expected)}")
            counts = [result[k] for k in ("found", "named", "alone_found", "alone_named")]
            rows.append([kind, options.places, *counts, ", ".join(result["checks"])])
    print_table("Planted faults, the manifest written anew", head, rows)
    return named(head, rows)


def alarms(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of sound exports."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        made = clean(pathlib.Path(place))
        while True:
            with silence():
                name, folder = next(made, (None, None))
            if name is None:
                break
            started = time.perf_counter()
            findings = check_integrity(folder)
            rows.append([name, len(findings), time.perf_counter() - started])
            for finding in findings[:3]:
                print(f"  {name}: {finding}")
            if options.quick and len(rows) == 3:
                break
    print_table("Sound exports", ["export", "findings", "seconds"], rows)
    return named(["export", "findings", "seconds"], rows)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without AIMET's lines and warnings."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Both tables, and the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--places", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=list(faults.FAULTS), choices=faults.FAULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--output", type=pathlib.Path, default=HERE / "results" / "planted_faults.json"
    )
    options = parser.parse_args()
    if options.quick:
        options.places = min(options.places, 4)
    found = planted(options)
    sound = alarms(options)
    bars = [
        bar(
            f"{row['fault']}: {row['named']} of {row['places']} named",
            row["named"] == row["places"],
        )
        for row in found
    ]
    quiet_ones = sum(row["findings"] == 0 for row in sound)
    bars.append(bar(f"{quiet_ones} of {len(sound)} sound exports pass", quiet_ones == len(sound)))
    if not options.quick:
        result = {"faults": found, "sound": sound, "bars": bars, "machine": machine("onnx")}
        add_section(options.output, "planted_faults", result)


if __name__ == "__main__":
    main()
