"""4-bit weights and 16-bit activations, exported, and checked on the simulator of the NPU.

Runs offline, in seconds, on the small model that comes with the package. Where onnxruntime-qnn is
not installed, the check runs on the CPU and says so.
"""

# [setup]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import LPBQ, QSpec, examples

TARGET = "htp_v75"  # the NPU's architecture
MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=4, batch_size=1
)
# End of [setup]

# [create-sim]
sim = aimet_ext.create_sim(
    model, dataloader[0], weights=QSpec(bitwidth=4, granularity=LPBQ(64)), activations=16
)
aimet_ext.apply_seq_mse(sim, dataloader)
aimet_ext.apply_gptq(sim, dataloader)
# End of [create-sim]


# [compute_encodings]
def run_calibration(quantized: torch.nn.Module) -> None:
    with torch.no_grad():
        for input_ids in dataloader:
            quantized(input_ids)


sim.compute_encodings(run_calibration)
# End of [compute_encodings]

# [lint]
for finding in aimet_ext.lint(sim, target=TARGET):
    print(finding)
# End of [lint]

# [export]
aimet_ext.export(sim, "exported", filename_prefix="model", dummy_input=dataloader[0])
# End of [export]

# [verify]
report = aimet_ext.verify("exported", dataloader, target=TARGET, output="snapdragon")
print(report)
# End of [verify]

# [prefill-and-decode]
aimet_ext.export_with_cache(
    sim,
    "cached",
    prefill_length=32,
    context_length=128,
    dataloader=dataloader,
    kv_bitwidth=8,
)
# End of [prefill-and-decode]

# [evaluation]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=16, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]
