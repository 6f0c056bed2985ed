"""Flags of prompts and points that bench, capacity and context-curve share."""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.experiment.sweep import AUTO, SHARED_DEFAULTS
from specsplit.settings.processes import MAX_GAMMA, AccessSettings

SWEEP_SETTINGS = (
    "draft_address",
    "target_address",
    "tokenizer",
    "draft_name",
    *SHARED_DEFAULTS,
    "max_output_tokens",
    "max_rounds",
    "use_chat_template",
    "ignore_eos",
    *AccessSettings.model_fields,
    "tls_name",
    "connect_timeout_s",
    "rpc_timeout_s",
    "recovery_timeout_s",
    "on_draft_failure",
    "seed",
)
# Greedy, as far as the workers let it: what a client may still say.
NOT_OURS = {"top_k", "top_p", "sampling", "jitter_ms", "max_output_tokens", "max_rounds"}
CLIENT_SETTINGS = ["tree", *(name for name in SWEEP_SETTINGS if name not in NOT_OURS)]


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Which prompts are measured with."""
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file of prompts")
    parser.add_argument("--limit", type=int, help="take a stratified slice of this many prompts (default: all)")
    parser.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop", help="what a bad prompt line does")


def add_workers_dir_flag(parser: argparse.ArgumentParser) -> None:
    """Where the workers of each point are."""
    text = "endpoint files DIR/POINT/ROLE.json, for points with workers of their own, not the two addresses"
    parser.add_argument("--workers-dir", type=Path, metavar="DIR", help=text)


def parse_gamma(text: str) -> int | str:
    """A draft length of the command line: a number or auto."""
    if text == AUTO:
        return text
    if not text.isdigit() or int(text) > MAX_GAMMA:
        raise argparse.ArgumentTypeError(f"{text!r} is not a draft length from 0 to {MAX_GAMMA}, nor auto")
    return int(text)
