"""A script for AIMET's own functions, with the imports of the techniques changed.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
import torch
from aimet_torch import QuantizationSimModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext

# In place of from aimet_torch.seq_mse import apply_seq_mse:
from aimet_ext import apply_gptq, apply_seq_mse, examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
data_loader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=4, batch_size=4
)
model = aimet_ext.prepare_model(model, mask_value=-100.0)  # logits out, masks that fit 16 bits
# End of [setup]


# [aimet-script]
def forward_fn(model: torch.nn.Module, batch: torch.Tensor) -> None:
    model(batch)


def run_calibration(model: torch.nn.Module) -> None:
    for batch in data_loader:
        forward_fn(model, batch)


sim = QuantizationSimModel(model, data_loader[0], default_param_bw=4, default_output_bw=16)
for layer in (sim.model.model.model.embed_tokens, sim.model.model.lm_head):
    layer.param_quantizers["weight"].bitwidth = 8
apply_seq_mse(sim, data_loader, 20, forward_fn)  # AIMET's order of arguments
apply_gptq(quant_sim=sim, data_loader=data_loader)  # and AIMET's names
sim.compute_encodings(run_calibration)
# End of [aimet-script]

# [evaluation]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]
