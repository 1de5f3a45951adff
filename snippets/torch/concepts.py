"""Look into a quantizer: its scale and offset, the integers of a weight, and LPBQ's integers.

Runs offline, in seconds, on the small model that comes with the package.
"""

# [setup]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aimet_ext
from aimet_ext import QSpec, examples

model = AutoModelForCausalLM.from_pretrained(examples.model_dir())
tokenizer = AutoTokenizer.from_pretrained(examples.model_dir())
held_out = aimet_ext.calibration_batches(
    tokenizer, examples.documents("evaluation"), seq_length=128, num_batches=4, batch_size=4
)
sim = aimet_ext.create_sim(
    model, held_out[0], weights=QSpec(bitwidth=4, symmetric=False), activations=None
)
sim.compute_encodings(lambda model: model(held_out[0]))
# End of [setup]

# [grid]
layer = sim.model.model.model.layers[0].mlp.up_proj
quantizer = layer.param_quantizers["weight"]
scale, offset = quantizer.get_scale(), quantizer.get_offset()  # [out, 1]: one for each row
codes = (torch.round(layer.weight / scale) - offset).clamp(0, 15)  # 4 bits, unsigned
by_hand = (codes + offset) * scale
assert torch.equal(by_hand, quantizer(layer.weight))
# End of [grid]

# [lpbq]
aimet_ext.set_lpbq(sim, block_size=32, layers="*.layers.0.mlp.up_proj")
scale = layer.param_quantizers["weight"].get_scale().squeeze()  # [out, in / 32]
channel = scale.amax(1, keepdim=True) / 16  # 4 bits of scale: the top integer is 16
integers = scale / channel
assert torch.allclose(integers, integers.round(), atol=1e-3)
# End of [lpbq]

print(f"float      {aimet_ext.evaluate_perplexity(model, held_out):.2f}")
print(f"quantized  {aimet_ext.evaluate_perplexity(sim, held_out):.2f}")
