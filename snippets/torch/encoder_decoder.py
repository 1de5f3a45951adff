"""Round an encoder-decoder, a T5 here, to 4 bits with GPTQ and compare its outputs.

Runs offline, in seconds, on a small model of random weights.
"""

# [setup]
import torch
from transformers import T5Config, T5ForConditionalGeneration

import aimet_ext
from aimet_ext import QSpec

torch.manual_seed(0)
config = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
model = T5ForConditionalGeneration(config).eval()  # or one that you load


def batch() -> dict[str, torch.Tensor]:
    """Return what a tokenizer and model.prepare_decoder_input_ids_from_labels give."""
    mask = torch.ones(8, 24, dtype=torch.long)
    mask[:4, 18:] = 0  # padding
    ids, written = torch.randint(1, 128, (8, 24)), torch.randint(1, 128, (8, 12))
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}


# End of [setup]

# [create-sim]
dataloader = [batch() for _ in range(8)]
sim = aimet_ext.create_sim(
    model, dataloader[0], weights=QSpec(bitwidth=4), lm_head=QSpec(bitwidth=8), activations=16
)
print(aimet_ext.apply_gptq(sim, dataloader))
# End of [create-sim]


# [evaluation]
def run_calibration(quantized: torch.nn.Module) -> None:
    with torch.no_grad():
        for inputs in dataloader:
            quantized(**inputs)


sim.compute_encodings(run_calibration)
inputs = batch()
with torch.no_grad():
    expected, found = model(**inputs).logits, sim.model(**inputs)
for name, logits in (("float", expected), ("quantized", found)):
    # Perplexity of what the float model expects.
    surprise = -(expected.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    print(f"{name:<10} {surprise.exp():.4f}")
# End of [evaluation]
