"""Keys and values of 8 bits on the HTP, by what queries and keys are turned by.

    python benchmarks/keys.py [--windows 8] [--target htp_v79]

stories260K with weights of 8 bits, activations of 16 bits and R2, calibrated on 32 windows of 256
tokens, compared with its simulation by ``aimet_ext.verify`` on windows of other documents.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import load, quiet, quiet_warnings
from edge_models import held_out, windows_of
from report import ASSETS, HERE, add_section, machine, named, print_table

import aimet_ext

HEAD = ("keys", "bits", "HTP against sim dB", "top-1", "perplexity", "of the sim", "rotation s")
ROWS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("plain", {}, 16),
    ("plain", {}, 8),
    ("Hadamard matrix", {"r3": True}, 8),
    ("fitted maps", {"r3": "fitted"}, 8),
)


def row(name: str, settings: dict[str, Any], bits: int, options: argparse.Namespace) -> list[Any]:
    """Measure one setting."""
    data = windows_of("stories260K", options.assets, "calib", options.calibration)
    compared = held_out("stories260K", options.assets, options.windows)
    source, _ = load(options.assets / "stories260K-hf")
    model = aimet_ext.prepare_model(copy.deepcopy(source), mask_value=-100.0)
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        sim = aimet_ext.create_sim(model, data[0], weights=aimet_ext.QSpec(bitwidth=8))
        started = time.process_time()
        aimet_ext.apply_rotation(sim, data, r1=False, progress=False, **settings)
        seconds = time.process_time() - started
        sim.compute_encodings(lambda module: [module(batch) for batch in data])
        aimet_ext.export(sim, Path(scratch) / "out", "net", data[0])
        found = aimet_ext.verify(
            Path(scratch) / "out",
            [*compared, *data],
            target=options.target,
            windows=options.windows,
            kv_bitwidth=bits,
            progress=False,
        ).measures
    figures = (found.device_sim_db, found.top1, found.perplexity_device, found.perplexity_sim)
    print(f"  {name}, {bits} bits: {figures}", flush=True)
    return [name, bits, *figures, seconds]


def main() -> None:
    """Measure all settings and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=32, help="windows")
    parser.add_argument("--target", default="htp_v79")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "edge.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet_warnings(), torch.no_grad():
        rows = [row(*each, options) for each in ROWS]
    print_table(f"Keys on {options.target}, {options.windows} windows", HEAD, rows)
    settings = {name: getattr(options, name) for name in ("windows", "calibration", "target")}
    made_on = machine("aimet-onnx", "onnxruntime")
    add_section(
        options.output,
        "keys",
        {"machine": made_on, "settings": settings, "rows": named(HEAD, rows)},
    )


if __name__ == "__main__":
    main()
