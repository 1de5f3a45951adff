"""Quantize a language model, and keep what it cost and what came of it as one page.

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
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=2, batch_size=4
)
recipe = aimet_ext.Recipe(activations="none", techniques={"gptq": {}})
# End of [setup]

# [report]
recorder = aimet_ext.Recorder()
with recorder.phase("simulation"):
    sim = recipe.create_sim(model, dataloader[0])
reports = recipe.apply(sim, dataloader, watch=recorder.phase)
run = aimet_ext.RunReport.of(
    sim,
    reports,
    model="packaged model",
    recipe=recipe,
    perplexity={
        "float": aimet_ext.evaluate_perplexity(model, held_out),
        "quantized": aimet_ext.evaluate_perplexity(sim, held_out),
    },
    divergence={"quantized": aimet_ext.evaluate_divergence(sim, held_out, model)},
    windows=8,
    recorder=recorder,
)
print(run)
run.save("report.json")
run.save_html("report.html")
# End of [report]

# [compare]
again = aimet_ext.RunReport.read("report.json")
print(run.compare(again))
run.compare(again).save_html("both.html")
# End of [compare]

print(f"float      {run.quality.states['float'].perplexity:.2f}")
print(f"quantized  {run.quality.states['quantized'].perplexity:.2f}")
