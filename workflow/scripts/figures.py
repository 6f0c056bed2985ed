"""Draw the figures of rule `figures`."""

import sys
from pathlib import Path

from specsplit.analysis.figures import draw_figures
from specsplit.analysis.tables import read_tables

with open(snakemake.log[0], "w") as sys.stderr:  # noqa: F821, PTH123
    requests, rounds = read_tables(Path(snakemake.input.requests).parent)  # noqa: F821
    draw_figures(requests, rounds, Path(snakemake.output[0]).parent, **snakemake.params.settings)  # noqa: F821
