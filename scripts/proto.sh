#!/usr/bin/env bash
# Generate the stubs beside src/specsplit/rpc/v1/specsplit.proto; with --check, only compare them.
set -euo pipefail
cd "$(dirname "$0")/.."
proto=specsplit/rpc/v1/specsplit.proto
out=src
if [[ "${1:-}" == "--check" ]]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
python -m grpc_tools.protoc -I src --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" "src/$proto"
if [[ "$out" != src ]]; then
    for file in specsplit_pb2.py specsplit_pb2.pyi specsplit_pb2_grpc.py; do
        cmp "$out/specsplit/rpc/v1/$file" "src/specsplit/rpc/v1/$file" || {
            echo "the stubs are not those of $proto: run 'make proto' and commit them" >&2
            exit 1
        }
    done
    echo "gRPC stubs are current"
fi
