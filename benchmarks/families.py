"""Small random models of every family: one call, techniques, export; writes docs/models.rst.

    python benchmarks/families.py [--only gemma3_text,mixtral] [--again]

Each family is built from its config with random weights, in a process of its own: what fails says
why in the table. Errors are those of the logits on token ids held out, against plain rounding.
Families that are in the results already are not run again unless ``--again``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import quiet
from report import HERE, machine
from torch import Tensor, nn

import aimet_ext
from aimet_ext.models.huggingface import original_name
from aimet_ext.models.topology import find_blocks
from aimet_ext.sim.protocol import adapt

PAGE = HERE.parent / "docs" / "models.rst"
SECONDS = 400  # for each family
COMMON: dict[str, Any] = {
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
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 32}
GROUPED = {**EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
GROUPED = {**GROUPED, "first_k_dense_replace": 1}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128}
CONV = {"layer_types": ["conv", "full_attention"]}
SCAN = {"mamba_d_head": 16, "mamba_d_state": 16}

# Settings by type of model; None takes a setting out.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": MIXED,
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": SHARED,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**SHARED, **DELTA},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**SHARED, **DELTA},
    "gemma": {},
    "gemma2": {**MIXED, "query_pre_attn_scalar": 16},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **MIXED,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        **MIXED,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "codegen": {**GPT, "rotary_dim": 8},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": {**EXPERTS, **MIXED},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "falcon": {"num_kv_heads": 2, "head_dim": None},
    "falcon_h1": {
        **SCAN,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_n_groups": 1,
        "mamba_expand": 1,
    },
    "bamba": {**SCAN, "mamba_n_heads": 8, "attn_layer_indices": [1]},
    "mixtral": EXPERTS,
    "deepseek_v2": {**GROUPED, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {**GROUPED, **LATENT, "q_lora_rank": 32, "n_group": 2},
    "llama4_text": {
        **{key: value for key, value in EXPERTS.items() if key != "num_experts"},
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
    },
    "smollm3": {},
    "granite": {},
    "granitemoe": EXPERTS,
    "cohere": {},
    "cohere2": MIXED,
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "glm": {},
    "glm4": {},
    "glm4_moe": GROUPED,
    "exaone4": MIXED,
    "nemotron": {},
    "lfm2": {**CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**EXPERTS, **CONV, "num_dense_layers": 1},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4},
    "persimmon": {},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    "biogpt": {},
    "ernie4_5": {},
    "ernie4_5_moe": {
        **EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "seed_oss": {},
    "arcee": {},
    "apertus": {},
    "helium": {},
    "dots1": {**GROUPED, "layer_types": ["full_attention"] * 2},
    "bitnet": {},
    "nanochat": {},
    "diffllama": {},
    "doge": {},
    "openai-gpt": GPT,
    "modernbert-decoder": MIXED,
    "longcat_flash": {
        **GROUPED,
        **LATENT,
        "q_lora_rank": 32,
        "num_layers": 2,
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "recurrent_gemma": {
        "lru_width": 64,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "zamba2": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "tie_word_embeddings": True,  # or else its blocks would share nothing
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "adapter_rank": 8,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "chunk_size": 16,
    },
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 12},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 8, "conv_kernel": 4},
    "rwkv": {"attention_hidden_size": 64, "context_length": 128},
}

# Why less than 99 % of a family's matrices are quantized, by what is left of them.
KEPT = {
    "conv1d.weight": "convolutions of four taps, whose weight other code reads than the layer's, "
    "so that AIMET's quantizer is not asked. They weigh as much as a row for each tap: "
    "the wider a model, the smaller their share. Each tap multiplies its own channel, as a gain "
    "does, and they are counted here all the same",
}


def build(family: str) -> nn.Module:
    """A small causal LM of a family; gains away from 1, so that they show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**COMMON, **FAMILIES[family]}
    if settings["head_dim"] is None:
        del settings["head_dim"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


class Trial:
    """What becomes of one family, step by step; a step that fails leaves the others.

    :param family: Type of the model.
    """

    def __init__(self, family: str) -> None:
        self.row: dict[str, Any] = {"family": family}
        self.model = build(family)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 128, (20, 2, 32), generator=generator)
        self.batches, self.held_out = list(ids[:16]), list(ids[16:])
        with torch.no_grad():
            calls = [self.model(input_ids=batch, use_cache=False) for batch in self.held_out]
        self.wanted = [call.logits for call in calls]

    def run(self) -> dict[str, Any]:
        """Run all steps and return the row."""
        if self._step("share", self._share):
            self._step("gptq", self._gptq)
            self._step("omniquant", self._omniquant)
            self._step("export", self._export)
        return self.row

    def _step(self, key: str, step: Callable[[], Any]) -> bool:
        try:
            self.row[key] = step()
        except Exception as error:  # noqa: BLE001 - which ones come is the result
            self.row[key] = _said(error)
            return False
        return True

    def _sim(self, activations: int | None = None) -> Any:
        return aimet_ext.create_sim(self.model, self.batches[0], activations=activations)

    @torch.no_grad()
    def _error(self, model: nn.Module) -> float:
        pairs = zip(self.held_out, self.wanted, strict=True)
        return sum(float((model(batch) - wanted).square().sum()) for batch, wanted in pairs)

    def _share(self) -> float:
        sim = self._sim()
        self.rounding = self._error(sim.model)
        self.row["left_float"] = sim.aimet_ext_settings["left_float"]
        sizes = {name: value.numel() for name, value in sim.model.named_parameters()}
        by_name = {original_name(name, sim.model): size for name, size in sizes.items()}
        left = sum(by_name[name] for name in self.row["left_float"])
        every = {**adapt(sim).weight_quantizers(), **adapt(sim).other_quantizers()}
        taken = sum({id(q.weight): q.weight.numel() for q in every.values()}.values())
        products = [n for n in self.row["left_float"] if not _is_depthwise(sim.model, n)]
        self.row["share_of_products"] = taken / (taken + sum(by_name[name] for name in products))
        return taken / (taken + left)

    def _gptq(self) -> float:
        sim = self._sim()
        aimet_ext.apply_gptq(sim, self.batches, progress=False)
        return self._error(sim.model) / self.rounding

    def _omniquant(self) -> float:
        sim = self._sim()
        found = {pair.kind for block in find_blocks(sim.model) for pair in block.pairs}
        report = aimet_ext.apply_omniquant(sim, self.batches[:8], num_iterations=10, progress=False)
        self.row["pairs"] = sorted(found - set(report.refused_pairs))
        self.row["without"] = report.refused_pairs
        with adapt(sim).disabled_quantizers(), torch.no_grad():
            changes = [
                float((sim.model(batch) - wanted).abs().max() / wanted.abs().max())
                for batch, wanted in zip(self.held_out, self.wanted, strict=True)
            ]
        self.row["float_change"] = max(changes)
        return self._error(sim.model) / self.rounding

    def _export(self) -> bool:
        """Calibrate, export (compared in onnxruntime) and load."""
        sim = self._sim(16)
        aimet_ext.apply_gptq(sim, self.batches[:4], progress=False)
        sim.compute_encodings(lambda model: [model(batch) for batch in self.batches[:4]])
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            aimet_ext.export(sim, Path(folder) / "out", "model", self.batches[0])
            again: Tensor = aimet_ext.load(Path(folder) / "out").model(self.held_out[0])
            return torch.equal(again, sim.model(self.held_out[0]))


def _is_depthwise(model: nn.Module, weight: str) -> bool:
    """Whether a weight, by its name in the checkpoint, is a kernel for each channel alone."""
    names = {original_name(f"{n}.weight", model): m for n, m in model.named_modules()}
    return isinstance(layer := names.get(weight), nn.Conv1d) and layer.weight.shape[1] == 1


def _said(error: BaseException) -> str:
    """The first line of an error, and the last one that names another: no tracebacks."""
    first, *more = str(error).splitlines() or [""]
    causes = [line.strip() for line in more if "Error: " in line]
    return " ".join([f"{type(error).__name__}: {first}", *causes[-1:]])[:400]


def _in_own_process(family: str) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        try:
            with quiet():
                row = Trial(family).run()
        except BaseException as error:  # noqa: BLE001 - reported
            row = {"family": family, "share": _said(error)}
        os.write(writer, json.dumps(row).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text or json.dumps({"family": family, "share": f"over {SECONDS} s"}))


def page(rows: list[dict[str, Any]], made: dict[str, Any]) -> str:
    """The page of the documentation."""
    head = "Supported models"
    lines = [
        "..",
        "    Written by benchmarks/families.py.",
        "",
        "#" * len(head),
        head,
        "#" * len(head),
        "",
        "Families of transformers, each built small from its config with random weights: whether",
        ":func:`~aimet_ext.create_sim` takes it in one call, the share of its matrices that is",
        "quantized, the error of its logits on tokens held out as a share of rounding's, the",
        "scale pairs that were found and proved, the largest change of the float model by them,",
        "and whether it was calibrated, exported (compared in onnxruntime) and loaded bit by bit.",
        "Ten steps of OmniQuant and 1,024 random tokens say that it works, not how well.",
        f"Measured with transformers {made['transformers']}, {made['date']}.",
        "",
        ".. list-table::",
        "    :header-rows: 1",
        "",
        "    * - Family",
        "      - Quantized",
        "      - GPTQ",
        "      - OmniQuant",
        "      - Pairs",
        "      - Float change",
        "      - Export and load",
    ]
    notes, left = [], dict[str, list[str]]()
    for row in rows:
        if isinstance(row.get("share"), float) and row["share"] < 0.99:
            kind = next(kind for kind in KEPT if any(n.endswith(kind) for n in row["left_float"]))
            left.setdefault(kind, []).append(row["family"])
        cells = [
            _cell(row.get("share"), lambda share: f"{100 * share:.1f} %"),
            _cell(row.get("gptq"), lambda ratio: f"{ratio:.2f}"),
            _cell(row.get("omniquant"), lambda ratio: f"{ratio:.2f}"),
            ", ".join(f"``{kind}``" for kind in row.get("pairs", ())) or "none",
            _cell(row.get("float_change"), lambda change: f"{change:.0e}"),
            _cell(row.get("export"), lambda equal: "yes" if equal else "differs"),
        ]
        lines += [f"    * - {row['family']}", *(f"      - {cell}" for cell in cells)]
        for key in ("share", "gptq", "omniquant", "export"):
            if isinstance(row.get(key), str):
                notes.append(f"* {row['family']}, {key}: ``{' '.join(row[key].split())[:240]}``")
                break
    if left:
        said = [
            f"* {', '.join(own)}: {KEPT[kind]}.{_rest(own, rows)}" for kind, own in left.items()
        ]
        lines += [
            "",
            "What stays float where that is more than 1 % of such a small model:",
            "",
            *said,
        ]
    if notes:
        lines += ["", "What fails, and how it says so:", "", *notes]
    return "\n".join(lines) + "\n"


def _rest(families: list[str], rows: list[dict[str, Any]]) -> str:
    """What is quantized of the matrices beside such kernels, of the family with the least."""
    shares = [
        row.get("share_of_products", row["share"]) for row in rows if row["family"] in families
    ]
    every = [row["share"] for row in rows if row["family"] in families]
    return (
        ""
        if shares == every
        else f" Of all other matrices {100 * min(shares):.1f} % are quantized."
    )


def _cell(value: Any, text: Callable[[Any], str]) -> str:
    if value is None:
        return "-"
    return "no" if isinstance(value, str) else text(value)


def main() -> None:
    """Run the families and write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families, for example gemma,mixtral")
    parser.add_argument("--again", action="store_true", help="run those that are there, too")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "families.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.output.read_text()) if options.output.exists() else {"rows": {}}
    for family in options.only.split(",") if options.only else FAMILIES:
        if family in known["rows"] and not options.again:
            continue
        row = _in_own_process(family)
        print({key: str(value)[:60] for key, value in row.items()}, flush=True)
        known["rows"][family] = row
        known["machine"] = machine("transformers")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    rows = [known["rows"][family] for family in FAMILIES if family in known["rows"]]
    options.page.write_text(page(rows, known["machine"]), encoding="utf-8")


if __name__ == "__main__":
    main()
