"""Drafts that read the hidden states of a tiny target: made up, and trained in a second on what the target writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from specsplit.engines.head_module import HeadModule, save_head
from specsplit.models.head_config import HeadConfig

from tiny_models import VOCAB

LAYERS = (0, 1, 2)  # of a target that has three


def make_tiny_head(
    target: Any, texts: Sequence[Sequence[int]] = (), *, steps: int = 30, rows: int = VOCAB
) -> HeadModule:
    """A head for a Hugging Face model, with its embedding and `rows` rows of output.

    texts: of one length, which it learns by heart, half of the loss over its own outputs in place of the states.
    """
    torch.manual_seed(0)
    config = target.config
    layer = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=config.vocab_size,
        max_position_embeddings=256,
    )
    head = HeadModule(HeadConfig(layer, rows, config.hidden_size, LAYERS))
    head.embed_tokens.weight.data.copy_(target.get_input_embeddings().weight)
    if not texts:
        return head
    ids = torch.tensor([list(text) for text in texts])
    with torch.no_grad():
        hidden = target(ids, use_cache=False, output_hidden_states=True).hidden_states
    raw = torch.cat([hidden[layer] for layer in LAYERS], -1)[:, :-2]
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    rotary = head.rotary(torch.arange(ids.shape[1] - 2)[None])
    for _ in range(steps):
        embedded, states = head.embed_tokens(ids[:, 1:-1]), head.fc(raw)
        loss = torch.zeros(())
        for _ in range(2):
            outputs, _ = head.midlayer(embedded, states, rotary)
            loss = loss + torch.nn.functional.cross_entropy(head.logits(outputs).flatten(0, 1), ids[:, 2:].flatten())
            states = torch.cat([states[:, :1], outputs[:, :-1]], 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval().requires_grad_(False)


def save_tiny_head(head: HeadModule, folder: Path, tokenizer: Any) -> Path:
    """The head as a model folder."""
    save_head(head, folder, torch.float32, with_embedding=True)
    tokenizer.save_pretrained(folder)
    return folder
