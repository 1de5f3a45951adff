"""LPBQ grids, ranges by SeqMSE, rounding by AdaRound or GPTQ, evaluation and export.

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
ROUNDING = "gptq"  # or "adaround"
# End of [setup]

# [prepare-dataloader]
# A list of LongTensor [batch, tokens]. Take more text for a model that matters, about 64 windows.
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=2, batch_size=4
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

# [set-lpbq]
# Which grid: blocks of 64 input channels with integer scales, in all linears of the blocks.
print(aimet_ext.set_lpbq(sim, block_size=64))
# End of [set-lpbq]

# [choose-ranges]
# Which range: on the grid that is there now. Ranges are frozen, weights stay float.
print(aimet_ext.apply_seq_mse(sim, dataloader))
# End of [choose-ranges]

# [round]
# Which integer: with the ranges as they are. Weights are on their grids, so this comes last.
if ROUNDING == "adaround":
    report = aimet_ext.apply_adaround(sim, dataloader, num_iterations=50)
else:
    report = aimet_ext.apply_gptq(sim, dataloader)
print(report)
# End of [round]


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
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]

# [export]
aimet_ext.export(sim, "exported", filename_prefix="model", dummy_input=dataloader[0][:1])
# End of [export]
