"""Give each layer of a language model its width under a budget, and round with GPTQ.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import LPBQ, QSpec, examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=2, batch_size=4
)
# End of [setup]

# [assign]
report = aimet_ext.assign_widths(
    model,
    dataloader,
    budget="4.5 bits",  # or "300 MB"
    choices=["int3", QSpec(bitwidth=4, granularity=LPBQ(32)), "int8"],
    groups=[("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
)
print(report)
sim = aimet_ext.create_sim(model, dataloader[0], activations=None, overrides=report.overrides)
aimet_ext.apply_gptq(sim, dataloader)
report.recipe.save("recipe.yaml")
report.plot("curve.svg")
# End of [assign]

# [evaluate]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=2, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
print(aimet_ext.evaluate_divergence(sim, held_out, model))
# End of [evaluate]
