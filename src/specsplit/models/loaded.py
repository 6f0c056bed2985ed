"""Stored tensors compared with the model of the configuration: transformers goes on where they are not its weights."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from specsplit.errors import UserError, told
from specsplit.io import read_json, refuse_stand_in

log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
# Tensors without which the others are not the model's weights: scales of quantised ones, matrices of an adapter.
CHANGED = re.compile(
    r"[._](scales?|scale_inv|zero_point|qzeros|qweight|g_idx|absmax|quant_map|weight_packed|SCB)$|\.lora_[AB]\."
)


class Stored(NamedTuple):
    """A tensor of a safetensors file. dtype: as its header calls it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and advice; errors still raise."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # some bars cannot be turned off
            yield
    finally:
        logging.set_verbosity(verbosity)


def stored_tensors(weights: Sequence[Path]) -> dict[str, Stored]:
    """The tensors of safetensors files by name, from the headers alone.

    Raises UserError for a file that cannot be read, and for a tensor that stands in two.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for path in weights:
        try:
            with safe_open(path, framework="numpy") as tensors:
                headers = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
                own = {
                    name: Stored(path.name, header.get_dtype(), tuple(header.get_shape()))
                    for name, header in headers.items()
                }
        except (SafetensorError, OSError) as error:
            refuse_stand_in(path)
            raise UserError(f"{path}: not a readable safetensors file: {error}; fetch it again") from None
        if twice := sorted(found.keys() & own.keys()):
            raise UserError(
                f"{path}: {twice[0]} stands here and in {found[twice[0]].file}: the shards are not those of one model; "
                "fetch all of them again"
            )
        found |= own
    return found


def check_stored(folder: Path, model: Any, stored: Mapping[str, Stored], *, reduced: bool) -> None:
    """As `check_loaded`, before anything is loaded.

    transformers loads tensors of the stored shapes without their numbers, so that whatever it renames, joins, ties and
    leaves out is treated as it will be. model: made of the configuration. stored: `stored_tensors`.
    """
    import torch

    try:
        with quietly():
            _, report = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict={name: torch.empty(each.shape, device="meta") for name, each in stored.items()},
                device_map="meta",
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # transformers raises any class of error for unusual tensors
        raise UserError(
            f"{folder}: transformers cannot make the model of these weights: {told(error)}. Fetch the model again"
        ) from error
    indexed = read_json(folder / INDEX)["weight_map"] if (folder / INDEX).is_file() else {}
    files = {**indexed, **{name: each.file for name, each in stored.items()}}
    check_loaded(folder, model, report, reduced=reduced, files=files)


def check_loaded(
    source: Path,
    model: Any,
    report: Mapping[str, Any],
    described_by: str = "config.json",
    *,
    reduced: bool = False,
    files: Mapping[str, str] | None = None,
) -> set[str]:
    """Raise UserError unless the weights are those of the model that was made of the configuration.

    source: of the weights. report: of transformers (output_loading_info). described_by: as `check_architecture` has it.
    reduced: the output head may have another shape. files: where a tensor is, or should be by the index.
    Returns the names of the tensors of another shape.
    """

    def at(name: str) -> str:
        file = (files or {}).get(name)
        return f" (in {file})" if file else ""

    unused = sorted(report["unexpected_keys"])
    if changed := [name for name in unused if CHANGED.search(name)]:
        raise UserError(
            f"{source}: the weights hold {changed[0]}{at(changed[0])}: they are quantised, or an adapter lies beside "
            f"them, and {described_by} does not say so. Take the model as it was before, or merge the adapter into it."
        )
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        named = [name for name in unused if name.endswith(f".{missing[0]}")]
        prefix = f" They hold {named[0]}: take the prefix off all names." if named else ""
        where = f", which {INDEX} places in {files[missing[0]]}" if files and missing[0] in files else ""
        raise UserError(
            f"{source}: the weights are incomplete, {len(missing)} missing and the first {missing[0]}{where}."
            f"{prefix or without_biases(model.config, missing)} Fetch or convert the model again."
        )
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    if mismatched and not reduced:
        key, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{source}: {described_by} is not that of the weights: {key}{at(key)} has the shape {tuple(stored)} there, "
            f"and {tuple(wanted)} by {described_by} ({len(mismatched)} such). Fetch or convert the model again."
        )
    if missed := [name for name in unused if _left_out(model, name)]:
        raise UserError(
            f"{source}: {described_by} is not that of the weights: they hold {missed[0]}{at(missed[0])}, which the "
            f"model described there leaves out ({len(missed)} such). Fetch or convert the model again."
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
