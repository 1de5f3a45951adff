"""Round an ONNX graph's weights to 4 bits with GPTQ, polish their scales with DWQ, evaluate it.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
import onnx
import torch
from aimet_onnx import QuantizationSimModel, int8
from aimet_onnx.quantsim import set_param_type
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
# Inputs by name. Take more text for a model that matters, about 64 windows.
windows = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=4, batch_size=2
)
dataloader = [{"input_ids": window.numpy()} for window in windows]
# End of [prepare-dataloader]

# [create-sim]
sim = QuantizationSimModel(
    onnx.load("float.onnx"), param_type="int4", activation_type="int16", config_file="htp_v81"
)
set_param_type(sim, int8, nodes_to_include={"/model/lm_head/MatMul"})
# End of [create-sim]

# [apply-gptq]
# The float graph's outputs are kept before weights are rounded.
reference = aimet_ext.float_logits(sim, dataloader)
# Any technique that decides integers. Few multiples of each range, so that this example is quick.
aimet_ext.apply_gptq(sim, dataloader, scale_candidates=3)
# End of [apply-gptq]

# [apply-dwq]
# The integers stay. A step takes one batch; 100 steps and more windows for a model that matters.
report = aimet_ext.apply_dwq(sim, dataloader, num_iterations=12, reference=reference)
print(report)
# End of [apply-dwq]

# [compute_encodings]
sim.compute_encodings(dataloader)  # what is still open: activations, embedding
# End of [compute_encodings]

# [evaluation]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
print(aimet_ext.evaluate_divergence(sim, held_out, aimet_ext.float_logits(model, held_out)))
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]
