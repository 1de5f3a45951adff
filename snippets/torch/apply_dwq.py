"""Round weights to 4 bits with GPTQ, polish their scales with DWQ, and evaluate the model.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import QSpec, examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
# End of [setup]

# [prepare-dataloader]
# A list of LongTensor [batch, tokens]. Take more text for a model that matters, about 64 windows.
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=4, batch_size=2
)
# End of [prepare-dataloader]

# [create-sim]
sim = aimet_ext.create_sim(
    model,
    dataloader[0],
    weights=QSpec(bitwidth=4),  # symmetric, one range for each output channel
    lm_head=QSpec(bitwidth=8),
    activations=16,
)
# End of [create-sim]

# [apply-gptq]
# Any technique that decides integers. Few multiples of each range, so that this example is quick.
aimet_ext.apply_gptq(sim, dataloader, scale_candidates=3)
# End of [apply-gptq]

# [apply-dwq]
# The integers stay. A step takes one batch; 100 steps and more windows for a model that matters.
report = aimet_ext.apply_dwq(sim, dataloader, num_iterations=12, reference=model)
print(report)
# End of [apply-dwq]


# [compute_encodings]
def run_calibration(quantized: torch.nn.Module) -> None:
    with torch.no_grad():
        for input_ids in dataloader:
            quantized(input_ids)


sim.compute_encodings(run_calibration)  # what is still open: activations, embedding
# End of [compute_encodings]

# [evaluation]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
reference = aimet_ext.float_logits(model, held_out)
print(aimet_ext.evaluate_divergence(sim, held_out, reference))
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]
