"""Hidden states of the target as they cross the network: float32, bfloat16, or int8 with a scale for each row."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch

from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import StatesForm

FORMS: tuple[StatesForm, ...] = get_args(StatesForm)
_TYPES = {"float32": (torch.float32, "<f4"), "bfloat16": (torch.bfloat16, "<i2"), "int8": (torch.int8, "i1")}
_SCALE = "<f4"


class StatesError(ValueError):
    """A message is not that of hidden states; says which field is wrong."""


def row_bytes(form: str, width: int) -> int:
    """Bytes of a row of `width` numbers."""
    return width * _TYPES[form][0].itemsize + (4 if form == "int8" else 0)


def pack_states(rows: torch.Tensor, first: int, form: str, *, projected: bool = False) -> pb.HiddenStates:
    """rows: [positions, width], of the positions from `first` on, on any device.

    float32 keeps float32 and narrower rows to the last bit. bfloat16 rounds each number by at most 2^-8 of it, int8 by
    at most 1/254 of the largest one of its row. Rows that are not finite are not finite when they are read either.
    """
    type_, layout = _TYPES[form]
    scales = b""
    if form == "int8":
        rows = rows.float()
        factors = rows.abs().amax(1, keepdim=True) / 127
        rows = (rows / factors.where(factors > 0, 1.0)).round().nan_to_num()
        scales = factors.cpu().numpy().astype(_SCALE).tobytes()
    packed = rows.to(type_).cpu().contiguous()
    numbers = (packed.view(torch.int16) if form == "bfloat16" else packed).numpy()
    data = numbers.astype(layout, copy=False).tobytes()
    return pb.HiddenStates(first=first, count=len(rows), form=form, data=data, scales=scales, projected=projected)


def check_states(message: pb.HiddenStates, width: int) -> None:
    """Raise StatesError unless the message has `count` rows of `width` numbers."""
    if message.form not in FORMS:
        raise StatesError(f"form {message.form[:20]!r} is none of {', '.join(FORMS)}")
    wanted = {"data": message.count * width * _TYPES[message.form][0].itemsize, "scales": 0}
    if message.form == "int8":
        wanted["scales"] = 4 * message.count
    for name, size in wanted.items():
        if (found := len(getattr(message, name))) != size:
            what = f"{message.count} positions of {width} numbers as {message.form}"
            raise StatesError(f"{name} has {found} bytes, and {what} take {size}")


def unpack_states(message: pb.HiddenStates, width: int) -> torch.Tensor:
    """The rows [count, width], float32, as sent; they may be not finite. Raises StatesError."""
    check_states(message, width)
    numbers = _read(message.data, _TYPES[message.form][1])
    if message.form == "bfloat16":
        numbers = numbers.view(torch.bfloat16)
    rows = numbers.view(message.count, width).float()
    return rows * _read(message.scales, _SCALE)[:, None] if message.form == "int8" else rows


def _read(data: bytes, layout: str) -> torch.Tensor:
    """A copy of the numbers, in the byte order of this machine."""
    return torch.from_numpy(np.frombuffer(data, layout).astype(np.dtype(layout).newbyteorder("=")))
