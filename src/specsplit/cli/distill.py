"""specsplit distill write-data | train | measure | card"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specsplit.cli.flags import add_interval_flags, add_setting_flags, interval_settings, load_settings
from specsplit.distill.recipe import TrainingSettings, WritingSettings
from specsplit.errors import UserError

SHOWN_STEPS = 20  # lines of a log between two evaluations, at most


def add_commands(subparsers: Any) -> None:
    distill = subparsers.add_parser("distill", help="make a small draft from a target: its own text, trained on")
    steps = distill.add_subparsers(dest="step", required=True, metavar="STEP")

    data = steps.add_parser("write-data", help="1: the target writes the training text; goes on where it was")
    _add_target(data)
    data.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for manifest.json and its shards")
    data.add_argument(
        "--held-out", type=Path, nargs="*", default=[], metavar="FILE", help="JSONL of prompts that must not be used"
    )
    data.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop", help="of these files")
    _add_terminal(data)
    add_setting_flags(data, WritingSettings)
    data.set_defaults(run=run_write_data)

    train = steps.add_parser("train", help="2: train the draft; goes on from the last checkpoint")
    _add_target(train)
    train.add_argument("--data", type=Path, required=True, metavar="FILE", help="manifest.json of write-data")
    train.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the draft, a model folder")
    train.add_argument("--losses", type=Path, required=True, metavar="FILE.csv", help="the loss curve")
    train.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="what was done, for the card")
    train.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="where training goes on from; removed at its end"
    )
    train.add_argument("--name", help="of the draft (default: the output folder's)")
    _add_terminal(train)
    add_setting_flags(train, TrainingSettings)
    train.set_defaults(run=run_train)

    measure = steps.add_parser("measure", help="3: acceptance by position, on prompts, with the workers' own code")
    _add_target(measure)
    measure.add_argument("--draft", type=Path, required=True, metavar="FOLDER", help="the draft")
    measure.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL of prompts")
    measure.add_argument("--output", type=Path, required=True, metavar="FILE.csv", help="acceptance by position")
    measure.add_argument("--rounds", type=Path, required=True, metavar="FILE.csv", help="a row for each round")
    measure.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="on what, for the card")
    measure.add_argument("--gamma", type=int, default=8, metavar="N", help="positions of a draft (default: 8)")
    measure.add_argument("--max-output-tokens", type=int, default=64, metavar="N", help="a text (default: 64)")
    measure.add_argument("--limit", type=int, metavar="N", help="take a slice of this many prompts (default: all)")
    measure.add_argument("--use-chat-template", action=argparse.BooleanOptionalAction, default=True)
    measure.add_argument("--target-dtype", default="float32", help="as in the sweep (default: float32)")
    measure.add_argument("--draft-dtype", default="bfloat16", help="as in the sweep (default: bfloat16)")
    measure.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N (default: auto)")
    measure.add_argument("--engine", default="auto", help="auto | fused | transformers (default: auto)")
    measure.add_argument("--threads", type=int, metavar="N", help="compute threads (default: every core it may use)")
    add_interval_flags(measure)
    _add_terminal(measure)
    measure.set_defaults(run=run_measure)

    card = steps.add_parser("card", help="4: the model card, the hashes and the figure of the three steps")
    card.add_argument("--draft", type=Path, required=True, metavar="FOLDER", help="gets MODEL_CARD.md and SHA256SUMS")
    card.add_argument("--training", type=Path, required=True, metavar="FILE.json", help="report of train")
    card.add_argument("--losses", type=Path, required=True, metavar="FILE.csv", help="loss curve of train")
    card.add_argument("--acceptance", type=Path, required=True, metavar="FILE.csv", help="table of measure")
    card.add_argument("--measured", type=Path, required=True, metavar="FILE.json", help="report of measure")
    card.add_argument("--figure", type=Path, required=True, metavar="FILE.png", help="and .svg beside it")
    card.set_defaults(run=run_card)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=Path, required=True, metavar="FOLDER", help="the target, prepared or local")


def _add_terminal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--terminal-fd", type=int, metavar="N", help="a bar on the terminal behind this descriptor")


def run_write_data(args: argparse.Namespace) -> None:
    settings = load_settings(WritingSettings, args)
    _prepare_process(settings.seed, settings.threads)
    from specsplit.distill.hardware import describe_hardware
    from specsplit.distill.writing import Writer, Written, write_texts
    from specsplit.engines.transformers import CausalLM, pick_device
    from specsplit.experiment.dataset import load_prompts
    from specsplit.experiment.progress import Bar
    from specsplit.io import sha256_file
    from specsplit.models.tokenizer import TextCodec

    folder, identity = _find_target(args.target)
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

        with _fits_memory("write_batch", settings.write_batch):
            manifest = write_texts(writer, args.output, about, show)
    print(
        f"{args.output / 'manifest.json'}: {manifest['texts']} texts, {manifest['answer_tokens']} tokens of answers, "
        f"sha256 {manifest['data_sha256'][:12]}, written in {manifest['seconds']:.0f} s"
    )


def run_train(args: argparse.Namespace) -> None:
    settings = load_settings(TrainingSettings, args)
    _prepare_process(settings.seed, settings.threads)
    import pandas as pd

    from specsplit.analysis.tables import write_csv
    from specsplit.distill.draft import build_draft, pick_layers, pick_vocabulary, save_draft
    from specsplit.distill.hardware import describe_hardware
    from specsplit.distill.shards import read_texts
    from specsplit.distill.training import LOSS_COLUMNS, Row, Trainer
    from specsplit.engines.transformers import CausalLM, pick_device
    from specsplit.experiment.progress import Bar
    from specsplit.io import json_sha256, write_json
    from specsplit.models.fingerprint import fingerprint_model

    folder, identity = _find_target(args.target)
    manifest, texts = read_texts(args.data)
    wrote = manifest["target"]
    if wrote["weights_sha256"] != identity["weights_sha256"]:
        raise UserError(
            f"{args.data}: the text of {wrote['model']} (weights {wrote['weights_sha256'][:12]}), not of {args.target} "
            f"({identity['weights_sha256'][:12]}): write it again"
        )
    target = CausalLM.load(folder, device="cpu")
    layers = pick_layers(settings, target.num_layers)
    tokens = pick_vocabulary(settings, texts, target, manifest["settings"]["top_k"])
    model = build_draft(target, layers, tokens).to(pick_device(settings.device))
    decides = settings.model_dump(exclude={"device", "draft_dtype", "checkpoint_every"})
    recipe = {"settings": decides, "data": manifest["data_sha256"], "target": identity}
    trainer = Trainer(model, texts, tokens, settings, recipe_sha256=json_sha256(recipe), checkpoint=args.checkpoint)
    vocab_size = len(tokens) if tokens else target.vocab_size
    print(
        f"layers {layers}, {vocab_size} of {target.vocab_size} tokens, {trainer.parameters / 1e6:.2f}M parameters; "
        f"{len(trainer.train_texts)} texts, {trainer.steps} steps",
        flush=True,
    )
    every = max(1, min(settings.evaluate_every, trainer.steps) // SHOWN_STEPS)
    with Bar(trainer.steps, "step", args.terminal_fd) as bar:

        def show(row: Row) -> None:
            said = [f"loss {row['loss']:.3f}"] if "loss" in row else []
            if "validation_loss" in row:
                said.append(f"validation {row['validation_loss']:.3f}, agreement {row['validation_agreement']:.3f}")
            bar.to(row["step"], ", ".join(said), show="validation_loss" in row or row["step"] % every == 0)

        with _fits_memory("batch_size", settings.batch_size):
            trainer.run(show)
    save_draft(model, tokens, settings.draft_dtype, folder, args.output)
    write_csv(pd.DataFrame(trainer.rows, columns=list(LOSS_COLUMNS)), args.losses)
    fingerprint = fingerprint_model(args.output)
    speed = trainer.learnt / trainer.seconds if trainer.seconds else 0.0
    report = {
        "name": args.name or args.output.name,
        "target": identity,
        "settings": settings.model_dump(),
        "layers": layers,
        "vocab_size": vocab_size,
        **{key: fingerprint[key] for key in ("architecture", "parameters", "weights_sha256")},
        "steps": trainer.steps,
        "resumed_at": trainer.resumed_at,
        "seconds": trainer.seconds,
        "tokens_per_second": speed,
        "train_texts": len(trainer.train_texts),
        "validation_texts": len(trainer.validation_texts),
        "untrained_agreement": trainer.rows[0]["validation_agreement"],
        "validation_loss": trainer.rows[-1]["validation_loss"],
        "validation_agreement": trainer.rows[-1]["validation_agreement"],
        "hardware": describe_hardware(trainer.device),
        "data": {key: value for key, value in manifest.items() if key != "shards"},
    }
    write_json(args.report, report)
    if args.checkpoint:
        args.checkpoint.unlink(missing_ok=True)
    print(
        f"{args.output}: weights {fingerprint['weights_sha256'][:12]}; {trainer.seconds:.0f} s, {speed:.0f} tokens/s"
        + (f", from step {trainer.resumed_at} on" if trainer.resumed_at else "")
    )


def run_measure(args: argparse.Namespace) -> None:
    for flag in ("gamma", "max_output_tokens"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: wanted a whole number >= 1")
    intervals = interval_settings(args)
    _prepare_process(args.seed, args.threads)
    from specsplit.analysis.tables import write_csv
    from specsplit.distill.acceptance import Round, acceptance, measure
    from specsplit.engines.loading import load_model
    from specsplit.experiment.dataset import load_prompts, select_prompts
    from specsplit.experiment.progress import Bar
    from specsplit.io import sha256_file, write_json
    from specsplit.launch.environment import usable_cores
    from specsplit.models.sources import resolve_model
    from specsplit.models.tokenizer import TextCodec
    from specsplit.models.vocabulary import load_vocabulary
    from specsplit.settings.processes import DraftWorkerConfig, TargetWorkerConfig

    prompts = select_prompts(load_prompts(args.prompts)[0], args.limit)
    common = {"device": args.device, "engine": args.engine, "threads": args.threads}
    threads = args.threads or usable_cores()
    target_config = TargetWorkerConfig.load({"model": args.target, "dtype": args.target_dtype, **common})
    draft_config = DraftWorkerConfig.load({"model": args.draft, "dtype": args.draft_dtype, **common})
    target_folder, target_manifest = resolve_model(args.target)
    draft_folder, draft_manifest = resolve_model(args.draft)
    target, target_is = load_model(target_folder, target_manifest, target_config, threads)
    draft, draft_is = load_model(draft_folder, draft_manifest, draft_config, threads)
    vocabulary = load_vocabulary(draft_folder, target_folder, draft.vocab_size)
    codec = TextCodec.load(target_folder)
    requests = [
        (prompt.id, prompt.category, codec.encode(prompt.prompt, use_chat_template=args.use_chat_template))
        for prompt in prompts
    ]
    with Bar(len(requests), "req", args.terminal_fd) as bar:
        done = 0

        def show(request_id: str, rounds: Sequence[Round]) -> None:
            nonlocal done
            done += 1
            accepted, drafted = sum(r.accepted for r in rounds), sum(r.drafted for r in rounds)
            bar.to(done, f"{request_id}: {accepted} of {drafted} drafted tokens accepted")

        rounds = measure(
            target, draft, vocabulary, requests, gamma=args.gamma, max_tokens=args.max_output_tokens, on_request=show
        )
    table = acceptance(rounds, **intervals)
    write_csv(rounds, args.rounds)
    write_csv(table, args.output)
    write_json(
        args.report,
        {
            "prompts": len(prompts),
            "prompts_sha256": sha256_file(args.prompts),
            "gamma": args.gamma,
            "max_output_tokens": args.max_output_tokens,
            "target": {**target_is, "dtype": args.target_dtype},
            "draft": {**draft_is, "dtype": args.draft_dtype},
            "tokens_per_round": (int(rounds["accepted"].sum()) + len(rounds)) / len(rounds),
        },
    )
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(args.output)


def run_card(args: argparse.Namespace) -> None:
    from specsplit.distill.card import CARD, write_card
    from specsplit.distill.distill_figure import draw_distillation
    from specsplit.io import read_json_object

    training, measured = read_json_object(args.training), read_json_object(args.measured)
    if training["weights_sha256"] != measured["draft"]["weights_sha256"]:
        raise UserError(f"{args.measured} is of another draft than {args.training}: measure this one")
    losses, acceptance = _read_table(args.losses), _read_table(args.acceptance)
    write_card(args.draft, training, acceptance, measured)
    for path in (args.draft / CARD, *draw_distillation(losses, acceptance, args.figure)):
        print(path)


def _read_table(path: Path) -> Any:
    import pandas as pd

    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a table that can be read: {error}") from None


def _find_target(path: Path) -> tuple[Path, dict[str, Any]]:
    """The target's folder, and what identifies it. UserError when it has no weights to learn from."""
    from specsplit.models.sources import resolve_model
    from specsplit.models.weightless import is_weightless

    folder, manifest = resolve_model(path)
    if is_weightless(manifest["source"]):
        raise UserError(f"--target {path} is a {manifest['source']['source']} model; a draft is made of weights")
    known = ("weights_sha256", "tokenizer_sha256", "vocab_size")
    return folder, {"model": manifest["name"], **{key: manifest["fingerprint"][key] for key in known}}


@contextmanager
def _fits_memory(field: str, value: int) -> Iterator[None]:
    """What is too much for the memory of a GPU is a setting to mend."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"--{field.replace('_', '-')} {value} is too much for this GPU, take less: {reason}") from None


def _prepare_process(seed: int, threads: int | None) -> None:
    """What every step needs of its process: the same numbers every time."""
    from specsplit.launch.environment import ensure_deterministic_environment, usable_cores

    ensure_deterministic_environment()
    import torch
    import transformers

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(threads or usable_cores())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
