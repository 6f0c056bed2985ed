"""specsplit distill train"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.distill import add_target_flag
from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.measuring import add_terminal_flag
from specsplit.errors import UserError, counted
from specsplit.settings.distill import TrainingSettings

SHOWN_STEPS = 20  # lines of a log between two evaluations, at most


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_target_flag(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="manifest.json of write-data")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the draft, a model folder")
    parser.add_argument("--losses", type=Path, required=True, metavar="FILE.csv", help="the loss curve")
    parser.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="what was done, for the card")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="where training goes on from; removed at its end"
    )
    parser.add_argument("--name", help="of the draft (default: the output folder's)")
    add_terminal_flag(parser)
    add_setting_flags(parser, TrainingSettings)


def run(args: argparse.Namespace) -> None:
    from specsplit.distill.process import describe_hardware, find_target, fits_memory, prepare_process

    settings = load_settings(TrainingSettings, args)
    prepare_process(settings.seed, settings.threads)
    import pandas as pd

    from specsplit.distill.draft import make_draft
    from specsplit.distill.head_training import make_head
    from specsplit.distill.shards import read_texts
    from specsplit.distill.training import Row, Trainer, hash_recipe
    from specsplit.engines.transformers import CausalLM, pick_device
    from specsplit.experiment.progress import Bar
    from specsplit.io import write_csv, write_json
    from specsplit.models.fingerprint import fingerprint_model
    from specsplit.provenance.closure import code_sha256

    folder, identity = find_target(args.target)
    manifest, texts = read_texts(args.data)
    wrote = manifest["target"]
    if wrote["weights_sha256"] != identity["weights_sha256"]:
        raise UserError(
            f"{args.data}: the text of {wrote['model']} (weights {wrote['weights_sha256'][:12]}), not of {args.target} "
            f"({identity['weights_sha256'][:12]}): write it again"
        )
    target = CausalLM.load(folder, device="cpu")
    device = pick_device(settings.device)
    made = hash_recipe(
        settings, manifest["data_sha256"], identity, describe_hardware(device), code_sha256("distill train")
    )
    maker = make_head if settings.kind == "hidden_states" else make_draft
    learner, layers, tokens = maker(target, texts, manifest, settings, device)
    trainer = Trainer(learner, texts, settings, recipe_sha256=made, checkpoint=args.checkpoint)
    vocab_size = len(tokens) if tokens else target.vocab_size
    print(
        f"{settings.kind}: layers {layers}, {vocab_size} of {target.vocab_size} tokens, "
        f"{trainer.parameters / 1e6:.2f}M parameters; {counted(len(trainer.train_texts), 'text')}, "
        f"{counted(trainer.steps, 'step')}",
        flush=True,
    )
    every = max(1, min(settings.evaluate_every, trainer.steps) // SHOWN_STEPS)
    with Bar(trainer.steps, "step", args.terminal_fd) as bar:

        def show(row: Row) -> None:
            said = [f"loss {row['loss']:.3f}"] if "loss" in row else []
            if "validation_loss" in row:
                said.append(f"validation {row['validation_loss']:.3f}, agreement {row['validation_agreement']:.3f}")
            bar.to(row["step"], ", ".join(said), show="validation_loss" in row or row["step"] % every == 0)

        with fits_memory("batch_size", settings.batch_size):
            trainer.run(show)
    learner.save(settings.draft_dtype, folder, args.output)
    write_csv(pd.DataFrame(trainer.rows, columns=list(trainer.columns)), args.losses)
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
        "learnt": trainer.learnt,
        "tokens_per_second": speed,
        "train_texts": len(trainer.train_texts),
        "validation_texts": len(trainer.validation_texts),
        "untrained_agreement": trainer.rows[0]["validation_agreement"],
        "validation_loss": trainer.rows[-1]["validation_loss"],
        "validation_agreement": trainer.rows[-1]["validation_agreement"],
        "further_agreement": [trainer.rows[-1][column] for column in learner.columns],
        "hardware": describe_hardware(device),
        "data": {key: value for key, value in manifest.items() if key != "shards"},
    }
    write_json(args.report, report)
    if args.checkpoint:
        args.checkpoint.unlink(missing_ok=True)
    print(
        f"{args.output}: weights {fingerprint['weights_sha256'][:12]}; {trainer.seconds:.0f} s, {speed:.0f} tokens/s"
        + (f", from step {trainer.resumed_at} on" if trainer.resumed_at else "")
    )
