#!/bin/sh
# Build @ENGINE@ from @GRAPH@ on this Jetson. TRTEXEC is trtexec of TensorRT 10 (JetPack 6) or 11 (JetPack 7.2.2).
set -eu
cd "$(dirname "$0")"
TRTEXEC=${TRTEXEC:-/usr/src/tensorrt/bin/trtexec}
sha256sum --check --quiet SHA256SUMS
# Strong typing is an option of TensorRT 10 and the only way of 11.
typed=
if "$TRTEXEC" --help 2>&1 | grep -q -e --stronglyTyped; then typed=--stronglyTyped; fi
exec "$TRTEXEC" --onnx=@GRAPH@ --saveEngine=@ENGINE@ $typed --noTF32 --skipInference \
  --minShapes=@MIN@ \
  --optShapes=@OPT@ \
  --maxShapes=@MAX@ "$@"
