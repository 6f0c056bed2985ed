"""What transformers loaded, compared with the weights: it goes on where they are not those of the configuration."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specsplit.errors import UserError

log = logging.getLogger(__name__)
# Tensors without which the others are not the model's weights: scales of quantised ones, matrices of an adapter.
CHANGED = re.compile(r"[._](scales?|scale_inv|zero_point|qzeros|absmax|SCB)$|\.lora_[AB]\.")


def check_loaded(
    source: Path, model: Any, report: Mapping[str, Any], described_by: str = "config.json", *, reduced: bool = False
) -> set[str]:
    """Raise UserError unless the weights are those of the model that was made of the configuration.

    source: of the weights. report: of transformers (output_loading_info). described_by: as `check_architecture` has it.
    reduced: the output head may have another shape. Returns the names of the tensors of another shape.
    """
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        named = [name for name in report["unexpected_keys"] if name.endswith(f".{missing[0]}")]
        prefix = f" They hold {named[0]}: take the prefix off all names." if named else ""
        raise UserError(
            f"{source}: the weights are incomplete, {len(missing)} missing and the first {missing[0]}."
            f"{prefix or without_biases(model.config, missing)} Fetch or convert the model again."
        )
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    if mismatched and not reduced:
        key, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{source}: {described_by} is not that of the weights: {key} has the shape {tuple(stored)} there, and "
            f"{tuple(wanted)} by {described_by} ({len(mismatched)} such). Fetch or convert the model again."
        )
    unused = sorted(report["unexpected_keys"])
    if missed := [name for name in unused if _left_out(model, name)]:
        raise UserError(
            f"{source}: {described_by} is not that of the weights: they hold {missed[0]}, which the model described "
            f"there leaves out ({len(missed)} such). Fetch or convert the model again."
        )
    if changed := [name for name in unused if CHANGED.search(name)]:
        raise UserError(
            f"{source}: the weights hold {changed[0]}: they are quantised, or an adapter lies beside them, and "
            f"{described_by} does not say so. Take the model as it was before, or merge the adapter into it."
        )
    if unused:
        log.warning(
            "%s: %d tensors of the weights belong to no part of the model that %s describes, and are not used: %s, ...",
            *(source, len(unused), described_by, unused[0]),
        )
    return mismatched


def without_biases(config: Any, missing: Sequence[str]) -> str:
    """What to do about weights that lack nothing but biases, which some tools leave out when they are zero; else
    empty. They are not taken for zero: nobody knows whether they were."""
    keys = [key for key, value in config.to_dict().items() if "bias" in key and value is True]
    if not keys or not all(name.endswith(".bias") for name in missing):
        return ""
    wanted = " and ".join(f"{key} to false" for key in keys)
    return f" Only biases are: if they were left out because they are all zero, set {wanted} in config.json."


def _left_out(model: Any, name: str) -> bool:
    """Whether a tensor of the weights is of a module of the model that has a place for it, which the configuration
    leaves empty: the bias of a linear layer, or a layer beyond the last. Layers for the prediction of several tokens
    stand there too, and are of no use here."""
    from torch import nn

    within: Any = model
    for part in name.split("."):
        if isinstance(within, nn.ModuleList) and part.isdigit() and int(part) >= len(within):
            more = getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0
            return int(part) >= len(within) + more
        if not hasattr(within, part):
            return False
        within = getattr(within, part)
    return within is None
