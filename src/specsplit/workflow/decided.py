"""What decides results, and how jobs are operated: the files below results/settings, and what they should hold.

Snakemake imports this while it parses, so it needs nothing that Snakemake does not bring along, and only reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specsplit.provenance.closure import code_sha256
from specsplit.provenance.redaction import redact
from specsplit.workflow.plan import Plan

Contents = dict[str, Callable[[], str]]  # file below results/ -> the text that it should hold


class Decided:
    """The files of a plan's settings. decides: what decides results. operates: how jobs are operated.

    package: the folder of the sources whose changes run jobs again.
    """

    def __init__(self, plan: Plan, package: Path) -> None:
        self._root, self._package = plan.root, package
        self._models = list(plan.config["models"])
        self.decides: Contents = {
            **{f"settings/{job}/settings.json": partial(plan.settings, job, operates=False) for job in plan.jobs},
            "provenance/config.json": partial(as_json, redact(plan.config)),
        }
        self.operates: Contents = {
            f"settings/{job}/operation.json": partial(plan.settings, job, operates=True) for job in plan.jobs
        }

    def by(self, rule: str, *what: Any, code: Sequence[str]) -> str:
        """Input of a job: the file with what decides its result beside its other inputs: flags, outside files, code.

        rule: with {model} where each model has a job of its own; functions in `what` are called with its name.
        code: the commands that the job runs; all that they import counts. As inputs these files would do the same, and
        every job would print a hundred names.
        """
        for model in self._models if "{model}" in rule else [""]:
            file = f"settings/rules/{rule}.json".replace("{model}", model)
            self.decides[file] = partial(self._rule_json, what, model, code)
        return f"results/settings/rules/{rule}.json"

    def content(self, file: str) -> str:
        """What a file should hold; it ends with a line break."""
        return (self.decides.get(file) or self.operates[file])()

    def make_again(self, workflow: Any, file: str) -> list[str]:
        """No inputs. Has Snakemake make a file again that says something else than it should, as --forcerun does; of
        those that decide one that is missing, too.

        By itself it knows of that by its notes in .snakemake alone, which results may be without: as a copy of them is.
        """
        path = f"{self._root}results/{file}"
        in_bucket = getattr(workflow.storage_settings, "default_storage_provider", None)  # where notes are all there is
        wanted = f"{self.content(file)}\n".encode()
        held = Path(path).read_bytes() == wanted if Path(path).is_file() else file in self.operates
        if workflow.is_main_process and not in_bucket and not held:
            workflow.dag.forcefiles.add(path)
        return []

    def _rule_json(self, what: Sequence[Any], model: str, code: Sequence[str]) -> str:
        decided = [item(model) if callable(item) else item for item in what]
        return as_json({"decided_by": decided, "code": code_sha256(*code, package=self._package)})


def as_json(what: Any) -> str:
    """What decides a result, as JSON."""
    return json.dumps(what, indent=2, ensure_ascii=False, allow_nan=False)
