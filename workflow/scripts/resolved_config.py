"""Write the configuration as the rules saw it: defaults filled in, strings coerced."""

import sys
from pathlib import Path

from specsplit.io import write_json
from specsplit.provenance.redaction import redact

with open(snakemake.log[0], "w") as sys.stderr:  # noqa: F821, PTH123
    write_json(Path(snakemake.output[0]), redact(snakemake.config))  # noqa: F821
