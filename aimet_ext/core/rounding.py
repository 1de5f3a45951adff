"""Rounding a weight on a given grid so that the layer's output changes least.

All methods return integers ``q [out, in]`` with ``Ŵ = (q + offset + shift) · scale``:

- :func:`~aimet_ext.core.gptq.gptq`: column after column, milliseconds; with beams a far better one.
- :func:`~aimet_ext.core.gptq.coordinate_descent`: improves any integers, never makes them worse.
- :func:`~aimet_ext.core.adaround.adaround`: a relaxation that decides all columns together.
- :func:`~aimet_ext.core.adaround.adaround_samples`: the same through an activation function.
"""

from aimet_ext.core.adaround import adaround, adaround_samples
from aimet_ext.core.gptq import coordinate_descent, gptq

__all__ = ["adaround", "adaround_samples", "coordinate_descent", "gptq"]
