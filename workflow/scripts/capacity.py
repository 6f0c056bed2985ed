"""Write the table and draw the figure of rule `capacity`."""

import sys
from pathlib import Path

from specsplit.analysis.capacity_table import write_capacity

with open(snakemake.log[0], "w") as sys.stderr:  # noqa: F821, PTH123
    write_capacity(Path(snakemake.output[0]).parent, **snakemake.params.settings)  # noqa: F821
