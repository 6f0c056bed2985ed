"""Prompts to fit a draft on: those of the dataset that are not measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specsplit.errors import UserError
from specsplit.experiment.dataset import load_prompts, read_prompt_file, select_prompts, write_prompts
from specsplit.io import refuse_overwriting


def write_calibration_prompts(
    source: Path,
    measured: Path,
    output: Path,
    *,
    limit: int,
    on_bad_line: str,
    columns: Mapping[Any, str] | None = None,
) -> None:
    """Write a stratified slice of `limit` prompts of `source` to `output` as JSONL, without those in `measured`.

    A draft that was fitted to the prompts on which it is measured would look better than it is. A prompt counts as
    measured when its id or its text is. on_bad_line, columns: as `read_prompt_file`.
    Raises UserError when fewer than `limit` prompts are left.
    """
    taken, _ = load_prompts(measured)
    excluded = {prompt.id for prompt in taken} | {prompt.prompt for prompt in taken}
    refuse_overwriting({"the output": output}, {"the dataset": source, "the measured prompts": measured})
    every = read_prompt_file(source, on_bad_line, columns).prompts
    left = [prompt for prompt in every if not excluded & {prompt.id, prompt.prompt}]
    if len(left) < limit:
        raise UserError(
            f"{source} has {len(every)} prompts, {len(every) - len(left)} of them measured: {len(left)} are left, "
            f"but draft.calibration_prompts asks for {limit}. Lower it or dataset.limit, add prompts, or name the "
            "layers in draft.skip_layers"
        )
    write_prompts(select_prompts(left, limit), output)
