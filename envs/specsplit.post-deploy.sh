#!/usr/bin/env bash
# Runs in the activated environment, from the workflow's folder.
set -euo pipefail
pip install --constraint envs/constraints.txt --editable .
