"""Choose 8-bit ranges of activations by their effect on the outputs, and see what each one costs.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import QSpec, examples

MODEL = examples.model_dir()  # or the folder of your own model
model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
# End of [setup]

# [prepare-dataloader]
# A list of LongTensor [batch, tokens]. Take more text for a model that matters, about 16 windows.
dataloader = aimet_ext.calibration_batches(
    tokenizer, examples.documents("calibration"), seq_length=128, num_batches=1, batch_size=4
)
# End of [prepare-dataloader]

# [create-sim]
sim = aimet_ext.create_sim(
    model,
    dataloader[0],
    weights=QSpec(bitwidth=8),  # symmetric, one range for each output channel
    lm_head=QSpec(bitwidth=8),
    activations=8,
)
# End of [create-sim]

# [apply-activation_ranges]
# Whatever decides weights comes before this. The few tensors that matter most, so that this example
# is quick; the default searches more.
report = aimet_ext.apply_activation_ranges(sim, dataloader, least_share=0.04)
print(report)
# End of [apply-activation_ranges]

# [analyze]
analysis = aimet_ext.analyze(sim, dataloader, top_k=3)
print(analysis)
analysis.save("analysis.json")
analysis.plot("analysis.svg")
# End of [analyze]

# [evaluation]
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]
