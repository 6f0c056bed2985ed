"""specsplit distill write-data"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.distill import add_target_flag
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import add_terminal_flag
from specsplit.errors import counted
from specsplit.settings.distill import WritingSettings
from specsplit.settings.measure import PromptSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flag(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for manifest.json and its shards")
    parser.add_argument(
        "--held-out", type=Path, nargs="*", default=[], metavar="FILE", help="files of prompts that must not be used"
    )
    add_terminal_flag(parser)
    add_setting_flags(parser, WritingSettings, PromptSettings, without=("limit",))


def run(args: argparse.Namespace) -> None:
    from specsplit.distill.process import describe_hardware, find_target, fits_memory, prepare_process

    settings = load_settings(WritingSettings, args)
    prepare_process(settings.seed, settings.threads)
    from specsplit.distill.writing import Writer, Written, write_texts
    from specsplit.engines.transformers import CausalLM, pick_device
    from specsplit.experiment.dataset import read_prompt_file
    from specsplit.experiment.progress import Bar
    from specsplit.models.tokenizer import TextCodec
    from specsplit.provenance.closure import code_sha256

    folder, identity = find_target(args.target)
    reading = load_settings(PromptSettings, args)
    files = {path.name: read_prompt_file(path, reading.on_bad_line, reading.columns) for path in args.held_out}
    held_out = [prompt.prompt for file in files.values() for prompt in file.prompts]
    device = pick_device(settings.device)
    dtype = settings.target_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = CausalLM.load(folder, dtype=dtype, device=settings.device)
    writer = Writer(model, TextCodec.load(folder), settings, held_out)
    about = {
        "target": {**identity, "dtype": dtype, "device": device.type},
        "held_out": {name: file.source_sha256 for name, file in files.items()},
        "hardware": describe_hardware(model.device),
        "code": code_sha256("distill write-data"),
    }
    if writer.state_bytes:
        print(
            f"hidden states of layers {list(writer.layers)}: {writer.state_bytes:,} bytes a token, at least "
            f"{settings.tokens * writer.state_bytes / 1e9:.2f} GB of the answers, and as many a token of "
            f"the prompts; a file has at most {writer.largest_shard / 1e9:.2f} GB",
            flush=True,
        )
    with Bar(settings.tokens, "tok", args.terminal_fd) as bar:
        fresh, fresh_s, before = 0, 0.0, 0

        def show(written: Written, tokens: int, seconds: float) -> None:
            nonlocal fresh, fresh_s, before
            if seconds:
                fresh, fresh_s = fresh + tokens - before, fresh_s + seconds
            before = tokens
            said = [counted(len(written.texts), "text")]
            said += [f"{count} {name.replace('_', ' ')}" for name, count in written.counts().items() if count]
            bar.to(tokens, ", ".join([*said, f"{fresh / fresh_s:.0f} tokens/s" if seconds else "was there"]))

        with fits_memory("write_batch", settings.write_batch):
            manifest = write_texts(writer, args.output, about, show)
    print(
        f"{args.output / 'manifest.json'}: {counted(manifest['texts'], 'text')}, "
        f"{manifest['answer_tokens']} tokens of answers, "
        f"sha256 {manifest['data_sha256'][:12]}, written in {manifest['seconds']:.0f} s"
    )
