"""Layer-wise techniques on encoder-decoders and on models of images, against plain rounding."""

from functools import partial

import pytest
import torch
from encoder_decoders import batch_of, encoder_decoder
from torch import nn

import aimet_ext
from aimet_ext import QSpec, create_sim, prepare_model
from aimet_ext.data.batches import output_mask

pytest.importorskip("aimet_torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # AIMET uses what torch and AIMET deprecated


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


def image_model(name):
    torch.manual_seed(0)
    if name == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        parts = {"intermediate_size": 64, "image_size": 16, "patch_size": 4}
        config = ViTConfig(**sizes, **parts, num_labels=8, initializer_range=0.15)
        return Logits(ViTForImageClassification(config)).eval()
    models = pytest.importorskip("torchvision").models
    if name == "vit of torchvision":
        sizes = {"image_size": 16, "patch_size": 4, "hidden_dim": 32, "mlp_dim": 64}
        model = models.VisionTransformer(**sizes, num_layers=2, num_heads=4, num_classes=8)
        nn.init.normal_(model.heads.head.weight, std=0.2)
        return model.eval()
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    if name == "mobilenet":
        config = partial(models.mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1)
        parts = [config(8, 3, 8, 8, True, "RE", 2), config(8, 5, 24, 16, True, "HS", 2)]
        model = models.MobileNetV3(parts, last_channel=32, num_classes=8).train()
    else:
        config = models.efficientnet.MBConvConfig
        parts = [config(1, 3, 2, 8, 8, 1), config(4, 5, 2, 8, 16, 2)]
        model = models.EfficientNet(parts, dropout=0.0, num_classes=8, last_channel=32).train()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        model(images(0, side=32, count=16))  # norms of what they see, or nothing reaches the end
    fold_all_batch_norms(model.eval(), (1, 3, 32, 32))
    return model


def images(seed, side=16, count=8):
    """Smooth pictures ``[count, 3, side, side]``."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=(side, side), mode="bicubic")


def case(name):
    """A model, and a function from a seed to a batch."""
    if name in ("t5", "bart", "whisper"):
        return prepare_model(encoder_decoder(name)).eval(), lambda seed: batch_of(name, seed)
    side = 16 if "vit" in name else 32
    return image_model(name), lambda seed: (images(seed, side),)


def outputs(model, batch):
    rows = model(**batch) if isinstance(batch, dict) else model(*batch)
    mask = output_mask(batch, model)
    return rows if mask is None else rows[mask]


@torch.no_grad()
def held_out_error(sim, model, batches):
    pairs = [(outputs(sim.model, batch), outputs(model, batch)) for batch in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("rounding", ["gptq", "seq_mse"])
@pytest.mark.parametrize(
    "name", ["t5", "bart", "whisper", "vit", "vit of torchvision", "mobilenet", "efficientnet"]
)
def test_techniques_beat_rounding_on_other_inputs(name, rounding):
    model, batch = case(name)
    sample, held_out = batch(0), [batch(100 + seed) for seed in range(4)]
    sample = sample if isinstance(sample, dict) else sample[0]
    make = {"weights": QSpec(bitwidth=4), "lm_head": QSpec(bitwidth=8), "activations": None}
    sim = create_sim(model, sample, **make, allow_float=0.1)
    plain = held_out_error(sim, model, held_out)
    decide = getattr(aimet_ext, f"apply_{rounding}")
    report = decide(sim, [batch(seed) for seed in range(8)], progress=False)
    share = {"gptq": 0.7, "seq_mse": 0.9}[rounding]
    assert held_out_error(sim, model, held_out) < share * plain
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layers = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    tied = {n for n, why in report.skipped.items() if "shares its weight" in why}
    assert len(layers) <= len({layer.name for layer in report.layers} | tied)
    assert name in ("mobilenet", "efficientnet") or report.cost["walk"] == "blocks"


def test_a_simulation_in_one_call_of_a_model_of_transformers():
    model, batch = encoder_decoder("t5"), batch_of("t5", 0)
    sim = create_sim(model, batch)
    sim.compute_encodings(lambda quantized: quantized(**batch))
    assert sim.aimet_ext_settings["mask_value"] == -100
    real, expected = outputs(sim.model, batch), outputs(prepare_model(model), batch)
    assert (real - expected).square().mean() < 0.2 * expected.square().mean()
    with pytest.raises(TypeError, match=r"encoder-decoder.*missing a required argument.*input_ids"):
        create_sim(model, {"attention_mask": batch["attention_mask"]})
    with pytest.raises(TypeError, match=r"encoder-decoder.*no decoder_input_ids"):
        create_sim(model, batch["input_ids"])


def test_tokens_that_count_more_are_those_of_their_own_side():
    model, batches = prepare_model(encoder_decoder("bart")).eval(), [batch_of("bart", 0, target=12)]
    sim = create_sim(model, batches[0], activations=None)
    report = aimet_ext.apply_gptq(sim, batches, token_weights="loss", progress=False)
    counts = {layer.name: layer.tokens for layer in report.layers}
    of_source = int(batches[0]["attention_mask"].sum())
    of_target = int(batches[0]["decoder_attention_mask"].sum())
    block = "model.model.decoder.layers.1"
    assert counts[f"{block}.encoder_attn.k_proj"] == of_source != of_target
    assert counts[f"{block}.encoder_attn.q_proj"] == counts[f"{block}.fc1"] == of_target
    assert counts["model.model.encoder.layers.1.fc1"] == of_source


def test_sides_of_a_graph():
    """In an ONNX simulation what is computed of the decoder's ids is the target's."""
    pytest.importorskip("aimet_onnx")
    import io

    import onnx
    from aimet_onnx import QuantizationSimModel

    model = prepare_model(encoder_decoder("t5"), mask_value=-100.0).eval()
    batch = batch_of("t5", 0, target=12)
    names = ["input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"]
    file = io.BytesIO()
    arguments = tuple(batch[name] for name in names)
    torch.onnx.export(model, arguments, file, input_names=names, dynamo=False, opset_version=17)
    graph = onnx.load_from_string(file.getvalue())
    sim = QuantizationSimModel(graph, param_type="int4", activation_type="int16")
    feed = {name: value.numpy() for name, value in batch.items()}
    report = aimet_ext.apply_gptq(sim, [feed], progress=False)
    of_source, of_target = (int(batch[name].sum()) for name in (names[1], names[3]))
    assert of_source != of_target
    for layer in report.layers:
        crossed = "EncDecAttention/k" in layer.name or "EncDecAttention/v" in layer.name
        is_source = crossed or "/encoder/" in layer.name
        assert layer.tokens == (of_source if is_source else of_target), layer.name
