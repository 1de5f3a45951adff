"""Choose an ONNX graph's 8-bit ranges of activations by their effect, and see what each one costs.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
import onnx
import torch
from aimet_onnx import QuantizationSimModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
# Any graph will do; this is one way to make it. Integer activations have to hold the mask's value.
torch.onnx.export(
    aimet_ext.prepare_model(model, mask_value=-100.0),
    (torch.zeros(1, 8, dtype=torch.long),),
    "float.onnx",
    input_names=["input_ids"],
    output_names=["logits"],
    dynamic_axes={"input_ids": {0: "batch", 1: "seq"}, "logits": {0: "batch", 1: "seq"}},
    dynamo=False,
)
# End of [setup]

# [prepare-dataloader]
# Inputs by name. Take more text for a model that matters, about 16 windows.
windows = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=1, batch_size=4
)
dataloader = [{"input_ids": window.numpy()} for window in windows]
# End of [prepare-dataloader]

# [create-sim]
sim = QuantizationSimModel(
    onnx.load("float.onnx"), param_type="int8", activation_type="int8", config_file="htp_v81"
)
# End of [create-sim]

# [apply-activation_ranges]
# Whatever decides weights comes before this. The few tensors that matter most, so that this example
# is quick; the default searches more.
report = aimet_ext.apply_activation_ranges(sim, dataloader, least_share=0.04)
print(report)
# End of [apply-activation_ranges]

# [analyze]
analysis = aimet_ext.analyze(sim, dataloader, top_k=3)
print(analysis)
analysis.save("analysis.json")
analysis.plot("analysis.svg")
# End of [analyze]

# [evaluation]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]
