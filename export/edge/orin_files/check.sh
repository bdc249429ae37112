#!/bin/sh
# Run the recorded samples through @ENGINE@ and compare them with PyTorch's; exit 3 if they differ.
set -eu
cd "$(dirname "$0")"
TRTEXEC=${TRTEXEC:-/usr/src/tensorrt/bin/trtexec}
"$TRTEXEC" --loadEngine=@ENGINE@ --noTF32 --warmUp=0 --duration=0 --iterations=1 \
  --shapes=@SHAPES@ \
  --loadInputs=@INPUTS@ \
  --exportOutput=outputs.json
exec python3 check.py outputs.json
