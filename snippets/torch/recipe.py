"""Follow a recipe on a model, and write what it became.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=2, batch_size=4
)
# End of [setup]

# [recipe]
recipe = aimet_ext.read_recipe("w4a16-lpbq-fast")  # or the path of a file
sim = recipe.create_sim(model, dataloader[0])
for report in recipe.apply(sim, dataloader).values():
    print(report)
sim.compute_encodings(lambda model: [model(batch) for batch in dataloader])  # activations
recipe.save("recipe.yaml")
# End of [recipe]

# [evaluate]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=2, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluate]
