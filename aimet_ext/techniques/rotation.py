"""Rotations that leave the float model as it was and spread outliers over all channels.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456. The names
R1 and R2 are SpinQuant's, arXiv 2405.16406.
"""

from __future__ import annotations

from aimet_ext.config import RotationParams
from aimet_ext.models.description import TopologyDescription
from aimet_ext.sim.protocol import adapt
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.report import RotationReport
from aimet_ext.techniques.rotating.keys import fit_keys
from aimet_ext.techniques.rotating.run import Chosen, Plan, run_rotation


@technique("rotation", needs_data=False)
def apply_rotation(
    call: Call[RotationParams], *, topology: TopologyDescription | None = None
) -> RotationReport:
    r"""Rotate hidden states and values, which spreads outliers over all channels.

    Source: QuaRot, Ashkboos et al. 2024, arXiv 2404.00456.

    With orthogonal matrices ``R1 [hidden, hidden]`` and ``R2 [head, head]``, every layer that reads
    the hidden states takes ``W R1``, every one that writes them ``R1ᵀ W``; values become
    ``R2ᵀ W_v`` and the output projection ``W_o R2``, head by head.
    Gains of norms go into the layers behind them first, and a head that shares its weight with the
    embedding gets one of its own. The float function stays as it was; weights stay float and their
    ranges free, for a technique that decides them. Nothing is computed when the model runs.

    With ``r3`` queries and keys are rotated as well, behind the rotary embedding, where it cannot
    be folded into weights: scores stay as they are, and keys fit on a grid of 8 bits. The
    simulation computes as before; graphs that are exported, verified or given a cache have an
    operator more for queries and one for keys. With ``r3="fitted"`` each head has an invertible
    matrix of its own in its place, and its keys a shift, which a softmax does not see: those by
    which a grid of 8 bits for all keys of an attention costs the outputs least, see
    :mod:`aimet_ext.core.key_maps`.

    Each block is proved in float64 on the model itself, and the whole model in its own precision.
    A model of LayerNorms gets a rotation that keeps the mean of the channels, so that its norms
    stay as they are.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, of a language model of
        decoder blocks. Mutated. Encodings that no longer fit are reset and named in the report.
    :param dataloader: Batches of ids ``[batch, seq]`` to prove it on, and by which stale encodings
        are told; None for a few random ids. ``r3="fitted"`` is fitted to all of them, such as 16
        windows of text.
    :param modules_to_exclude: Must be left out: a rotation turns all layers at once.
    :param output_path: Folder for the rotations (``scales.safetensors``, see :func:`load_scales`)
        and the report. A folder that this package wrote is replaced, another one refused.
    :param topology: Names of the modules in a block, in place of what is found in a run of it.
    :returns: Kinds of the rotations, the proofs, and the encodings that were reset.
    :raises ValueError: Unusable data, a model without decoder blocks, frozen or rounded weights,
        weights that hold NaN, the same technique twice; ``r3`` for a model without a rotary
        embedding, or fitted without data.
    :raises TransformRefused: The model cannot have a rotation that was asked for; the reason is
        named, such as a norm between a layer and the hidden states.

    >>> report = apply_rotation(sim)
    >>> apply_gptq(sim, batches)
    """
    params = call.params
    if params.r3 == "fitted" and call.dataloader is None:
        raise ValueError(
            'r3="fitted": batches are required to fit the matrices to, got dataloader=None; pass a '
            "few windows of text, or r3=True"
        )
    if params.r3:
        adapt(call.sim).check_rotary()
    return run_rotation(
        call,
        _chosen,
        r1=params.r1,
        r2=params.r2,
        topology=topology,
    )


def _chosen(plan: Plan, call: Call[RotationParams]) -> Chosen:
    rotations = plan.rotations(call.params)
    if call.params.r3 != "fitted":
        return Chosen(rotations)
    maps, losses = fit_keys(plan, call)
    return Chosen(rotations, key_maps=maps, key_losses=losses)
