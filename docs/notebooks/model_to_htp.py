# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Notebook: from a model to the NPU
#
# A language model of Hugging Face becomes a simulation with weights of 4 bits and activations of
# 16, its weights are decided from data, and the export is checked on the simulator of the
# Snapdragon's processor for neural networks (HTP). The model is the small one that comes with the
# package: no download, and a few minutes on one core. For your own model, set `MODEL` to its
# folder and give your own text.
#
# Needed are the extras `torch` and `onnx`; the last step also takes `qnn`, and says so where it
# is not installed.

# %%
import importlib.util

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import LPBQ, QSpec, examples

MODEL = examples.model_dir()  # or the folder of your own model
TARGET = "htp_v75"  # Snapdragon 8 Gen 3

# %% [markdown]
# ## Model and text
#
# Two sets of text: one to calibrate on, another one to measure. Each batch holds ids `[batch,
# seq]`.

# %%
model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)

calibration = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=4, batch_size=1
)
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=16, batch_size=4
)
float_perplexity = aimet_ext.evaluate_perplexity(model, held_out)
print(f"float      {float_perplexity:.2f}")

# %% [markdown]
# ## Simulation
#
# `create_sim` builds AIMET's own `QuantizationSimModel`. LPBQ gives each block of 64 weights an
# integer scale, which the HTP computes with.

# %%
sim = aimet_ext.create_sim(
    model, calibration[0], weights=QSpec(bitwidth=4, granularity=LPBQ(64)), activations=16
)

# %% [markdown]
# ## Weights
#
# SeqMSE chooses the range of each weight, GPTQ then rounds on these ranges. Both judge by the
# outputs of the layers. The report says what each layer gained over plain rounding.

# %%
aimet_ext.apply_seq_mse(sim, calibration)
report = aimet_ext.apply_gptq(sim, calibration)
print(report)


# %% [markdown]
# ## Activations
#
# What is left, the ranges of activations, is AIMET's calibration as always. Weights that were
# decided stay as they are.


# %%
def run_calibration(quantized: torch.nn.Module) -> None:
    """Run all batches."""
    with torch.no_grad():
        for input_ids in calibration:
            quantized(input_ids)


sim.compute_encodings(run_calibration)
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")

# %% [markdown]
# ## Checks before the export
#
# `lint` compares each quantizer with what the target computes as simulated. No line means that
# nothing was found.

# %%
for finding in aimet_ext.lint(sim, target=TARGET):
    print(finding)

# %% [markdown]
# ## Export
#
# The folder holds the ONNX model, encodings, and all that is needed to build the same simulation
# again with `aimet_ext.load`.

# %%
aimet_ext.export(sim, "exported", filename_prefix="model", dummy_input=calibration[0])

# %% [markdown]
# ## On the HTP
#
# `verify` rebuilds the simulation from the files, compiles the model for the target and compares
# what its simulator computes, layer by layer. Without onnxruntime-qnn the quantized graph runs on
# the CPU: that checks the files, not the device.

# %%
if importlib.util.find_spec("onnxruntime_qnn") is None:
    print(
        "onnxruntime-qnn is not installed, so the check runs on the CPU and says nothing about "
        f'{TARGET}. Install it with: pip install "aimet-ext[qnn]"'
    )
verified = aimet_ext.verify("exported", calibration, target=TARGET, output="snapdragon")
print(verified)

# %% [markdown]
# `snapdragon` now holds the graph that a compiler takes, and where QNN is installed the compiled
# context. [From simulation to Snapdragon](../snapdragon.rst) goes on from here: caches of keys
# and values, chips, and what to do where a layer deviates.
