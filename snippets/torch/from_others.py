"""Run the configuration of another package as a recipe.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import Recipe, examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
# End of [setup]

# [translate]
theirs = {  # the part of a configuration that counts: bits, groups, method, samples
    "bits": 4,
    "sym": False,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": True,
    "nsamples": 16,
    "seqlen": 128,
}
recipe = Recipe(
    weights={
        "width": f"{'' if theirs['sym'] else 'u'}int{theirs['bits']}",
        "block_size": theirs["group_size"],
    },
    lm_head="none",
    activations="none",
    calibration={"seq_length": theirs["seqlen"], "num_batches": theirs["nsamples"]},
    techniques=[{"gptq": {"damping": theirs["damp_percent"], "act_order": theirs["desc_act"]}}],
)
# End of [translate]

# [run]
plan = recipe.calibration
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), plan.seq_length, plan.num_batches, plan.batch_size
)
sim = recipe.create_sim(model, dataloader[0])
recipe.apply(sim, dataloader)
recipe.save("recipe.yaml")
# End of [run]

# [evaluate]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluate]
