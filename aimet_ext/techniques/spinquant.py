"""SpinQuant: rotations learnt by gradient descent over orthogonal matrices.

Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", arXiv 2405.16406.
"""

from __future__ import annotations

from aimet_ext.config import RotationParams, SpinQuantParams
from aimet_ext.models.description import TopologyDescription
from aimet_ext.techniques.call import Call, technique
from aimet_ext.techniques.report import RotationReport
from aimet_ext.techniques.rotating.learn import learn
from aimet_ext.techniques.rotating.run import Chosen, Plan, run_rotation


def _learnt(plan: Plan, call: Call[SpinQuantParams]) -> Chosen:
    params = call.params
    settings = RotationParams(mode=params.mode, r1=params.r1, r2=params.r2, seed=params.seed)
    return learn(plan, plan.rotations(settings), call)


@technique("spinquant")
def apply_spinquant(
    call: Call[SpinQuantParams], *, topology: TopologyDescription | None = None
) -> RotationReport:
    r"""Learn the rotations of hidden states and values with which the quantized model errs least.

    Source: SpinQuant, Liu et al. 2024, arXiv 2405.16406; its steps are those of Li et al. 2020,
    arXiv 2002.01113.

    The rotations are those of :func:`apply_rotation`, from whose matrices learning starts:

    .. math::
        \min_{R_1, R_2} \; \operatorname{mean}_t \;
        \operatorname{KL}\bigl(p(x_t) \,\|\, p_{Q(W_R)}(x_t)\bigr)

    over orthogonal matrices, where ``p`` are the float model's probabilities of the next token and
    ``p_Q`` those with the rotated weights of the blocks rounded to nearest on their grids, and
    with activations quantized where the simulation does. Gradients pass straight through
    rounding; steps are Cayley transforms with momentum, so that matrices stay orthogonal. The best
    rotations on the batches held out, a quarter of all, are kept: the start, if learning found none
    better.

    The float function stays as it was; weights stay float and their ranges free.

    :param sim: ``QuantizationSimModel`` of aimet_torch or aimet_onnx, of a language model of
        decoder blocks. Mutated. Encodings that no longer fit are reset and named in the report.
    :param modules_to_exclude: Must be left out: a rotation turns all layers at once.
    :param output_path: Folder for the rotations (``scales.safetensors``, see :func:`load_scales`)
        and the report. A folder that this package wrote is replaced, another one refused.
    :param checkpoint_dir: Folder for a checkpoint at each evaluation, which replaces the one
        before. The same call goes on from there after a crash and ends bit-identical on the same
        machine and versions.
    :param topology: Names of the modules in a block, in place of what is found in a run of it.
    :returns: Kinds of the rotations, what they are worth, the proofs, and the encodings that were
        reset.
    :raises ValueError: Unusable data, a model without decoder blocks, frozen or rounded weights,
        weights that hold NaN, nothing that is quantized, the same technique twice.
    :raises TransformRefused: The model cannot have a rotation that was asked for.

    >>> report = apply_spinquant(sim, batches, num_iterations=100)
    >>> apply_gptq(sim, batches)
    """
    params = call.params
    return run_rotation(call, _learnt, r1=params.r1, r2=params.r2, topology=topology)
