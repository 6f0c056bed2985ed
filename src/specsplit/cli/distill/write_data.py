"""specsplit distill write-data"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.distill import add_target_flag, add_terminal_flag
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.settings.distill import WritingSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flag(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for manifest.json and its shards")
    parser.add_argument(
        "--held-out", type=Path, nargs="*", default=[], metavar="FILE", help="JSONL of prompts that must not be used"
    )
    parser.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop", help="of these files")
    add_terminal_flag(parser)
    add_setting_flags(parser, WritingSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.distill.process import find_target, fits_memory, prepare_process

    settings = load_settings(WritingSettings, args)
    prepare_process(settings.seed, settings.threads)
    from specsplit.distill.hardware import describe_hardware
    from specsplit.distill.writing import Writer, Written, write_texts
    from specsplit.engines.transformers import CausalLM, pick_device
    from specsplit.experiment.dataset import load_prompts
    from specsplit.experiment.progress import Bar
    from specsplit.io import sha256_file
    from specsplit.models.tokenizer import TextCodec
    from specsplit.provenance.closure import code_sha256

    folder, identity = find_target(args.target)
    held_out = [prompt.prompt for path in args.held_out for prompt in load_prompts(path, args.on_bad_line)[0]]
    device = pick_device(settings.device)
    dtype = settings.target_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = CausalLM.load(folder, dtype=dtype, device=settings.device)
    writer = Writer(model, TextCodec.load(folder), settings, held_out)
    about = {
        "target": {**identity, "dtype": dtype, "device": device.type},
        "held_out": {path.name: sha256_file(path) for path in args.held_out},
        "hardware": describe_hardware(model.device),
        "code": code_sha256("distill write-data"),
    }
    with Bar(settings.tokens, "tok", args.terminal_fd) as bar:
        fresh, fresh_s, before = 0, 0.0, 0

        def show(written: Written, tokens: int, seconds: float) -> None:
            nonlocal fresh, fresh_s, before
            if seconds:
                fresh, fresh_s = fresh + tokens - before, fresh_s + seconds
            before = tokens
            said = [f"{len(written.texts)} texts"]
            said += [f"{count} {name.replace('_', ' ')}" for name, count in written.counts().items() if count]
            bar.to(tokens, ", ".join([*said, f"{fresh / fresh_s:.0f} tokens/s" if seconds else "was there"]))

        with fits_memory("write_batch", settings.write_batch):
            manifest = write_texts(writer, args.output, about, show)
    print(
        f"{args.output / 'manifest.json'}: {manifest['texts']} texts, {manifest['answer_tokens']} tokens of answers, "
        f"sha256 {manifest['data_sha256'][:12]}, written in {manifest['seconds']:.0f} s"
    )
