"""Assign widths to a PyTorch model, set them in a simulation of its ONNX graph, round with GPTQ.

Runs offline, in seconds, on the small model that comes with the package.
"""

import onnx
import torch
from aimet_onnx import QuantizationSimModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
torch.onnx.export(
    aimet_ext.prepare_model(model, mask_value=-100.0),
    (torch.zeros(1, 8, dtype=torch.long),),
    "float.onnx",
    input_names=["input_ids"],
    output_names=["logits"],
    dynamic_axes={"input_ids": {0: "batch", 1: "seq"}, "logits": {0: "batch", 1: "seq"}},
    dynamo=False,
)
windows = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=2, batch_size=4
)
dataloader = [{"input_ids": window.numpy()} for window in windows]

# [widths]
sim = QuantizationSimModel(
    onnx.load("float.onnx"), param_type="int8", activation_type="int16", config_file="htp_v81"
)
# Of the model, or of the simulation itself: assign_widths(sim, dataloader, ...).
report = aimet_ext.assign_widths(model, windows, "4.5 bits", ["int4", "int8"])
print(report)
print(aimet_ext.set_widths(sim, report))
aimet_ext.apply_gptq(sim, dataloader, scale_candidates=3)
sim.compute_encodings(dataloader)
# End of [widths]

held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=64, num_batches=4, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
