#!/usr/bin/env bash
# Runs in the activated environment, where snakemake was called: installs the package of this checkout.
set -euo pipefail
if ! grep -qs '^name = "specsplit"' pyproject.toml; then
    echo "specsplit is not in this folder: call snakemake in its checkout, or install it yourself and leave out --sdm conda" >&2
    exit 1
fi
pip install --constraint envs/constraints.txt --editable .
