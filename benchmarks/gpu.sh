#!/bin/sh
# Check and time the engine for GPUs on one of them, with random weights of real shapes: no download, under 8 minutes.
#
#     benchmarks/gpu.sh [--output FOLDER] [--device cuda] [--seconds 450]        # gpu.json and gpu.md in FOLDER
#     benchmarks/gpu.sh --device cpu --tiny                                      # a rehearsal, its times mean nothing
#
# WHEELS: a folder of wheels of what the Python of this machine lacks beside torch and transformers (numba, llvmlite,
# pydantic, ...), for a machine without a network.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$PYTHON" "$root/benchmarks/gpu.py" "$@"
