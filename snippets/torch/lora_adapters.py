"""Fit a LoRA adapter to a quantized, transformed model, quantize it and export both.

Runs offline, in about a minute, on the small model that comes with the package.
"""

# [setup]
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import QSpec, examples

MODEL = examples.model_dir()  # or the folder of your own model
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def batches(split: str, number: int, loud: bool = False) -> list[torch.Tensor]:
    documents = [text.upper() if loud else text for text in examples.documents(split)]
    return aimet_ext.calibration_batches(
        tokenizer, documents, seq_length=64, num_batches=number, batch_size=4
    )


# End of [setup]

# [train-adapter]
# Any adapter that PEFT trained will do. This one learns to write in capitals.
model = AutoModelForCausalLM.from_pretrained(MODEL)
peft_model = peft.get_peft_model(
    model,
    peft.LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"]
    ),
)
optimizer = torch.optim.AdamW(peft_model.parameters(), lr=5e-3)
for input_ids in batches("calibration", 20, loud=True):
    optimizer.zero_grad()
    peft_model(input_ids=input_ids, labels=input_ids).loss.backward()
    optimizer.step()
peft_model.eval().save_pretrained("adapter")
# End of [train-adapter]

# [export-base]
# The base is quantized once, without the adapter. OmniQuant rescales its weights; leave its
# settings at their defaults for a model that matters.
dataloader = batches("calibration", 2)
sim = aimet_ext.create_sim(
    AutoModelForCausalLM.from_pretrained(MODEL), dataloader[0], weights=QSpec(bitwidth=4)
)
aimet_ext.apply_omniquant(sim, dataloader, num_iterations=5, search_sweeps=1)


def run_calibration(quantized: torch.nn.Module) -> None:
    with torch.no_grad():
        for input_ids in dataloader:
            quantized(input_ids)


sim.compute_encodings(run_calibration)
aimet_ext.export(sim, "exported", filename_prefix="model", dummy_input=dataloader[0][:1])
# End of [export-base]

# [fold-adapter]
# The adapter as a folder for PEFT, for a float base with the weights of "exported".
folded = aimet_ext.lora.fold_adapter("adapter", "exported", output="folded")
print(f"scaled {len(folded.folded['modules'])} modules")
# End of [fold-adapter]

# [create-lora-sim]
# Folds the adapters by itself. The base's weights and encodings are those of "exported", frozen.
sim = aimet_ext.lora.create_sim("adapter", "exported")
# End of [create-lora-sim]

# [quantize-adapter]
report = aimet_ext.lora.quantize(
    sim, None, batches("calibration", 4, loud=True), weights=QSpec(bitwidth=8)
)
print(report)
# End of [quantize-adapter]

# [switch]
held_out = batches("evaluation", 4, loud=True)
aimet_ext.lora.switch(sim, None)  # the base alone
print(f"base alone {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
aimet_ext.lora.switch(sim, "default")
# End of [switch]

# [evaluation]
print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")  # PEFT's layers are in it
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
# End of [evaluation]

# [export]
aimet_ext.lora.export(sim, "exported_lora", "model", dataloader[0][:1])
again = aimet_ext.lora.load("exported_lora")  # in another process, perhaps
# End of [export]
