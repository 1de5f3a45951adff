"""Our techniques on simulations of aimet_onnx: beside the torch side, AIMET's own and Olive's.

    python benchmarks/onnx.py [--only graphs,stime] [--quick] [--output FILE]

Sections, each alone if need be:

    graphs     what an exported graph computes against its torch module
    contract   every layer-wise technique on both kinds of simulation of the same weights
    omniquant  OmniQuant on both, 4 bits per channel
    w3         3 bits in encodings and in a QDQ graph, read back
    stime      SeqMSE against aimet_onnx's: random Llama, 512 wide, 8 blocks, 64 × 256 tokens
    stime16    the same with 16 × 256 tokens, where the search itself weighs more
    atime      AdaRound against aimet_onnx's; its 10,000 steps are extrapolated from two short runs
    aquality   AdaRound of both on two blocks of a trained model, AIMET's with 10,000 steps
    olive      Olive's documented examples with its shipped techniques and with ours
    memory     peak memory on graphs with external data, a process each
    big        a graph of more than 2 GiB, from its file over every technique to an export and back

Seconds are those of the processor; the process stays on as many cores as it has threads, because
onnxruntime's idle threads would count. graphs, contract, omniquant, w3 and aquality need the
folders of ``--assets``. Results are added to the output file section by section.
"""

from __future__ import annotations

import sys
from pathlib import Path

# This folder comes first on the path of its scripts, and `import onnx` in them means the package.
_HERE = Path(__file__).resolve().parent
_away = [each for each in sys.path if Path(each or ".").resolve() != _HERE]
sys.path[:] = [*_away, str(_HERE)]

if __name__ == "__main__":
    from onnx_bench import main

    sys.exit(main(__doc__ or ""))
else:
    del sys.modules["onnx"]
    import onnx  # noqa: F401 - takes this file's place
