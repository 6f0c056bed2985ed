"""Write the prompts of rule `calibration_prompts`."""

import sys
from pathlib import Path

from specsplit.errors import UserError
from specsplit.experiment.calibration import write_calibration_prompts

with open(snakemake.log[0], "w") as sys.stderr:  # noqa: F821, PTH123
    source, measured = Path(snakemake.input.prompts), Path(snakemake.input.measured)  # noqa: F821
    try:
        write_calibration_prompts(source, measured, Path(snakemake.output[0]), **snakemake.params.settings)  # noqa: F821
    except UserError as error:
        print(f"specsplit: {error}", file=sys.stderr)
        sys.exit(1)
