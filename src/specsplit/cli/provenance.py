"""specsplit provenance record | seal | archive | verify | diff | reproduce"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

WHERE = "a results folder, the project's folder, an unpacked archive or an archive.zip"


def add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser("provenance", help="the record of how results were made: check, compare, repeat")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")

    record = commands.add_parser("record", help="write the record (the workflow does)")
    record.add_argument("--config", type=Path, required=True, help="the resolved configuration, as JSON")
    record.add_argument("--runs", type=Path, nargs="+", required=True, help="run.json of every run")
    record.add_argument("--models", type=Path, nargs="+", required=True, help="model.json of every model")
    record.add_argument("--dataset", type=Path, required=True, help="manifest of the dataset")
    record.add_argument("--results", type=Path, nargs="+", required=True, help="files to record the hashes of")
    record.add_argument("--output", type=Path, required=True)
    record.add_argument("--patch", type=Path, help="write the uncommitted changes here, for `git apply`")
    record.set_defaults(run=run_record)

    seal = commands.add_parser("seal", help="write a SHA256SUMS of finished results (the workflow does)")
    seal.add_argument("--output", type=Path, required=True)
    seal.add_argument("files", type=Path, nargs="+")
    seal.set_defaults(run=run_seal)

    archive = commands.add_parser("archive", help="pack results into an RO-Crate (the workflow does)")
    archive.add_argument("--output", type=Path, required=True)
    archive.add_argument("files", type=Path, nargs="+", help="files of the results")
    archive.set_defaults(run=run_archive)

    text = "recompute every hash and name what differs; exit status 1 when something does"
    verify = commands.add_parser("verify", help=text, description=text)
    verify.add_argument("where", type=Path, metavar="DIR", help=WHERE)
    verify.set_defaults(run=run_verify)

    text = "what changed between two runs; exit status 1 when more than times did"
    diff = commands.add_parser("diff", help=text, description=text)
    diff.add_argument("a", type=Path, metavar="A", help=WHERE)
    diff.add_argument("b", type=Path, metavar="B", help="another one")
    diff.set_defaults(run=run_diff)

    text = "print the commands that repeat an experiment, as a shell script"
    reproduce = commands.add_parser("reproduce", help=text, description=text)
    reproduce.add_argument("where", type=Path, metavar="DIR", help=WHERE)
    reproduce.set_defaults(run=run_reproduce)


def run_record(args: argparse.Namespace) -> None:
    from specsplit.io import read_json_object, write_json
    from specsplit.provenance.record import build_record

    record = build_record(
        config=read_json_object(args.config),
        run_files=args.runs,
        model_files=args.models,
        dataset_manifest=args.dataset,
        result_files=args.results,
        root=Path.cwd(),
    )
    write_json(args.output, record)
    if args.patch:
        args.patch.parent.mkdir(parents=True, exist_ok=True)
        # As bytes: no system changes the ends of its lines.
        args.patch.write_bytes((record["git"]["changes"]["diff"] or "").encode())
    for item in record["checklist"]:
        print(f"[{'x' if item['ok'] else ' '}] {item['item']}: {item['detail']}")
    print(f"{args.output}: {'complete' if record['complete'] else 'NOT complete'}")


def run_seal(args: argparse.Namespace) -> None:
    from specsplit.errors import UserError
    from specsplit.io import sha256_file
    from specsplit.provenance.folder import write_sums

    missing = [str(path) for path in args.files if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; make it again with the workflow")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(write_sums({path.as_posix(): sha256_file(path) for path in args.files}), encoding="utf-8")
    print(f"{args.output}: {len(args.files)} files")


def run_archive(args: argparse.Namespace) -> None:
    from specsplit.io import sha256_file
    from specsplit.provenance.archive import write_archive

    count = write_archive(args.output, args.files, Path.cwd())
    print(f"{args.output}: {count} files, {args.output.stat().st_size / 1e6:.1f} MB, sha256 {sha256_file(args.output)}")


def run_verify(args: argparse.Namespace) -> None:
    from specsplit.provenance.folder import open_experiment
    from specsplit.provenance.verify import verify

    with open_experiment(args.where) as experiment:
        verdict = verify(experiment)
    for note in verdict.notes:
        print(f"note: {note}")
    for file, problem in sorted(verdict.differing.items()):
        print(f"DIFFERS {file}: {problem}")
    print(f"{args.where}: {len(verdict.checked)} files as recorded, {len(verdict.differing)} not")
    if verdict.differing:
        sys.exit(1)


def run_diff(args: argparse.Namespace) -> None:
    from specsplit.provenance.compare import compare
    from specsplit.provenance.folder import open_experiment

    with open_experiment(args.a) as a, open_experiment(args.b) as b:
        groups = compare(a, b)
    for group in groups:
        same = f"same{' but for times' if group.times else ''} ({group.same})"
        print(f"{group.name:8} {f'{len(group.differences)} difference(s)' if group.differences else same}")
        for line in (*group.differences, *group.times):
            print(f"  {line}")
    if any(group.differences for group in groups):
        sys.exit(1)
    print("Only times differ." if any(group.times for group in groups) else "Nothing differs.")


def run_reproduce(args: argparse.Namespace) -> None:
    from specsplit.provenance.folder import open_experiment
    from specsplit.provenance.reproduce import reproduction

    with open_experiment(args.where) as experiment:
        print(reproduction(experiment, args.where.resolve() if args.where.suffix == ".zip" else None), end="")
