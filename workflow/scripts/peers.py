"""Write the table and draw the figure of rule `peers`."""

import sys
from pathlib import Path

from specsplit.analysis.peers_table import write_peers

with open(snakemake.log[0], "w") as sys.stderr:  # noqa: F821, PTH123
    write_peers(Path(snakemake.output[0]).parent, **snakemake.params.settings)  # noqa: F821
