"""specsplit provenance record"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="the resolved configuration, as JSON")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run.json of every run")
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="model.json of every model")
    parser.add_argument("--dataset", type=Path, required=True, help="manifest of the dataset")
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="files to record the hashes of")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--patch", type=Path, help="write the uncommitted changes here, for `git apply`")


def run(args: argparse.Namespace) -> None:
    from specsplit.io import read_json_object, replace_file, write_json
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
        replace_file(args.patch, record["git"]["changes"]["diff"] or "")
    for item in record["checklist"]:
        print(f"[{'x' if item['ok'] else ' '}] {item['item']}: {item['detail']}")
    print(f"{args.output}: {'complete' if record['complete'] else 'NOT complete'}")
