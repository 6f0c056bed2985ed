"""int8 weights for the linear layers of a model on the CPU, where a pass is as long as reading its weights takes.

Weights alone are rounded, symmetrically with one scale for every output (as LLM.int8(), Dettmers et al. 2022, without
its outliers); activations stay in bfloat16. Rounding these too (`torch.ao.quantization.quantize_dynamic`) is hardly
faster and makes a far worse draft: it takes one scale for all positions of a pass, so a few large values drown the
rest, and a token's logits depend on what else is in the pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from specsplit.errors import UserError

LARGEST = 127
ALIGNMENT = 16  # the CPU kernel reads beyond rows that are no multiple of this long
MANY_ROWS = 32  # from here on widening the weights for an ordinary product is faster


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with W in int8. weight: [outputs, inputs], floating point; inputs a multiple of ALIGNMENT."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float()
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / LARGEST).to(dtype)  # the one that will be multiplied by
        rounded = (weight / scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST)
        self.weight = nn.Parameter(rounded.to(torch.int8).contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features)
        if len(rows) < MANY_ROWS:
            product = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:  # every int8 number is exact in bfloat16
            product = F.linear(rows, self.weight.to(rows.dtype)) * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.view(*hidden.shape[:-1], self.out_features)


def quantise_linears(model: Any) -> int:
    """Replace the linear layers of a bfloat16 model on the CPU by int8 ones, in place; returns how many.

    The output head is one of them; an embedding tied to it stays as it is. Layers that the kernel cannot take
    (inputs no multiple of 16) and the fused weights of experts stay in bfloat16. UserError on any other device.
    """
    if model.device.type != "cpu":
        raise UserError(f"dtype int8 is for the CPU, not for {model.device}: use device cpu, or dtype bfloat16")
    if model.dtype != torch.bfloat16:
        raise ValueError(f"only bfloat16 models can be quantised, this one is {model.dtype}")
    linears = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    replaced = 0
    for name, module in linears:
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # Conv1D is GPT-2's linear layer
        if weight.shape[1] % ALIGNMENT:
            continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Int8Linear(weight, module.bias))
        replaced += 1
    return replaced
