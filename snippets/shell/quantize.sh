#!/bin/sh
# From a model folder and a text to an export that is checked and scored.
#
# Runs offline, in a minute, on the small model that comes with the package.
set -e

# [setup]
MODEL=$(python -c "from aimet_ext import examples; print(examples.model_dir())") # or your own folder
write() { python -c "from aimet_ext import examples; print('\n'.join(examples.documents('$1')))"; }
write calibration > text.txt
write evaluation > held_out.txt
# End of [setup]

# [quantize]
aimet-ext quantize "$MODEL" --recipe w4a16-fast --calibration text.txt \
    --seq-length 128 --num-batches 8 --output out
# End of [quantize]

# [check]
aimet-ext inspect out
aimet-ext report out
aimet-ext evaluate out --text held_out.txt --seq-length 128 --num-windows 16 \
    --reference "$MODEL" --json > score.json
# End of [check]
