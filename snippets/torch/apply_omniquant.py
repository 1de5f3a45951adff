"""Quantize a language model to 4-bit weights with OmniQuant, evaluate and export it.

Runs offline, in less than a minute, on the small model that comes with the package.
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
# A list of LongTensor [batch, tokens]; a DataLoader of Hugging Face dicts would do as well.
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=4, batch_size=4
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

# [apply-omniquant]
# One sweep and a few steps, so that this example is quick. Leave the sweeps at their default and
# take 800 steps or more for a model that matters.
report = aimet_ext.apply_omniquant(
    sim, dataloader, num_iterations=20, search_sweeps=1, output_path="scales"
)
print(report)
# End of [apply-omniquant]


# [compute_encodings]
def run_calibration(quantized: torch.nn.Module) -> None:
    with torch.no_grad():
        for input_ids in dataloader:
            quantized(input_ids)


sim.compute_encodings(run_calibration)
# End of [compute_encodings]

# [evaluation]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=8, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]

# [export]
aimet_ext.export(sim, "exported", filename_prefix="model", dummy_input=dataloader[0][:1])
# End of [export]
