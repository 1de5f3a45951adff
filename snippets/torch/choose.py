"""Compare recipes on your own model and text, and keep the best one that the target takes.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=4, batch_size=4
)
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
# End of [setup]

# [compare]
scores = {}
for name in ("w4a16-fast", "w4a16-lpbq-fast"):
    recipe = aimet_ext.read_recipe(name)
    sim = recipe.create_sim(model, dataloader[0])
    started = time.monotonic()
    recipe.apply(sim, dataloader, reference=model, progress=False)
    seconds = time.monotonic() - started
    sim.compute_encodings(lambda model: [model(batch) for batch in dataloader])
    scores[name] = aimet_ext.evaluate_perplexity(sim, held_out)
    print(f"{name:16} {scores[name]:.2f} {seconds:.0f} s")
# End of [compare]

print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {min(scores.values()):.2f}")
