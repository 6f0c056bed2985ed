"""specsplit analyze"""

from __future__ import annotations

import argparse
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.errors import RunError, counted
from specsplit.settings.measure import IntervalSettings, PriceSettings


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results-dir", type=Path, required=True)
    add_setting_flags(parser, IntervalSettings, PriceSettings)
    parser.add_argument("--no-figures", action="store_true", help="write the summary alone")


def run(args: argparse.Namespace) -> None:
    from specsplit.analysis.by_category import summarize_by_category
    from specsplit.analysis.captions import BY_CATEGORY
    from specsplit.analysis.conclusions import conclusions
    from specsplit.analysis.costs import with_price
    from specsplit.analysis.findings import find_best
    from specsplit.analysis.merging import read_tables
    from specsplit.analysis.summary_text import summary_table, text_table
    from specsplit.analysis.tables import summarize
    from specsplit.io import write_csv

    settings = load_settings(IntervalSettings, args).model_dump()
    requests, rounds = read_tables(args.results_dir)
    summary = with_price(summarize(requests, rounds, **settings), load_settings(PriceSettings, args))
    tables = {"summary": summary, BY_CATEGORY: summarize_by_category(requests, rounds, **settings)}
    for name, table in tables.items():
        write_csv(table, args.results_dir / f"{name}.csv")
    if not args.no_figures:
        from specsplit.analysis.figures import draw_figures

        print(*draw_figures(requests, rounds, args.results_dir / "figures", **settings), sep="\n")
    print(*(args.results_dir / f"{name}.csv" for name in tables), sep="\n")
    count = requests["request_id"].nunique()
    prompts = counted(count, "prompt")
    print(f"\n{prompts}; [{100 * settings['confidence']:g} % interval]; γ = 0 is the target alone\n")
    print(text_table(*summary_table(summary)))
    print()
    for finding in find_best(requests, rounds, summary, **settings):
        print(f"{finding.where or 'Best'}:", *finding.sentences())
    said = conclusions(summary, settings["confidence"])
    for topic, sentences in said.items():
        for sentence in sentences:
            print(f"{topic}: {sentence}")
    if (summary["lossless"] < 1).any():
        raise RunError(f"texts differ. Lossless: {said['Lossless'][0]}")
