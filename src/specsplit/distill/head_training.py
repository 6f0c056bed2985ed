"""A head that reads the target's hidden states, made and trained by unrolling it over its own states.

EAGLE-3's training-time test (Li et al. 2025): in the first step the state before each token is the target's; in every
further one, one token on, it is the head's own output of the step before, as when it drafts. All steps of a text are
computed together: a row is a place of the text and what the head drafts after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specsplit.distill.draft import WEIGHTS, copy_tokenizer, pick_vocabulary
from specsplit.distill.losses import Judged, Learner, autocast, to_draft_rows
from specsplit.distill.shards import Text
from specsplit.engines.head_module import HeadModule, save_head
from specsplit.engines.transformers import DTYPES, CausalLM
from specsplit.errors import UserError
from specsplit.models.head_config import HeadConfig
from specsplit.settings.distill import TrainingSettings

DECAY = 0.8  # of the weight of a step against that of the one before it, as in EAGLE-3
SCALED_BY = 64  # texts that the size of the target's states is taken from
TAKEN = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size")
ALSO_TAKEN = ("head_dim", "max_position_embeddings", "rope_parameters", "bos_token_id", "eos_token_id")


def build_head(target: CausalLM, layers: Sequence[int], tokens: Sequence[int] | None) -> HeadModule:
    """A head of the shape of the target's layers, float32, that reads the inputs of `layers`.

    Embedding, norm and output head, of `tokens`, are the target's at first; the layer is random: the weights of the
    target's last one are no better a beginning.
    """
    from transformers import LlamaConfig

    hf, config = target.model, target.model.config.get_text_config()
    shape = {name: getattr(config, name) for name in TAKEN}
    shape |= {name: getattr(config, name) for name in ALSO_TAKEN if getattr(config, name, None) is not None}
    layer = LlamaConfig(**shape, num_hidden_layers=1, tie_word_embeddings=False, pad_token_id=None)
    known = range(config.vocab_size) if tokens is None else tokens
    head = HeadModule(HeadConfig(layer, len(known), config.hidden_size, tuple(layers)))
    head.set_tokens(known)
    with torch.no_grad():
        head.embed_tokens.weight.copy_(hf.get_input_embeddings().weight)
        head.norm.weight.copy_(hf.model.norm.weight)
        head.lm_head.weight.copy_(hf.get_output_embeddings().weight[list(known)])
        head.fc.weight.normal_(std=head.fc.in_features**-0.5)
    return head


def make_head(
    target: CausalLM,
    texts: Sequence[Text],
    manifest: Mapping[str, Any],
    settings: TrainingSettings,
    device: torch.device,
) -> tuple[HeadLearner, list[int], list[int] | None]:
    """The head to be trained, the target's layers whose inputs it reads, and the tokens of its output head.

    Raises UserError for text without hidden states, and for settings of the other kind.
    """
    layers = manifest.get("state_layers")
    if not layers:
        raise UserError("the text was written without hidden states: write it with kind hidden_states")
    if settings.take_layers is not None:
        raise UserError("take_layers: a head of kind hidden_states has no layers of the target; leave it out")
    tokens = pick_vocabulary(settings, texts, target, manifest["settings"]["top_k"])
    head = build_head(target, layers, tokens).to(device)
    return HeadLearner(head, texts, tokens, settings.unroll_steps), layers, tokens


@dataclass(frozen=True)
class HeadBatch:
    """ids, states: [texts, length], [texts, length, layers * hidden], tokens from the second on with the states before
    them, padded at the right. base: [texts, rows], the entry from which a row drafts. answered: [texts], rows that
    there are of each. rows, log_probs: [texts, rows, k], the target's likeliest tokens after the base."""

    ids: torch.Tensor
    states: torch.Tensor
    base: torch.Tensor
    answered: torch.Tensor
    rows: torch.Tensor
    log_probs: torch.Tensor


class HeadLearner(Learner):
    """Trains everything of `head` but the embedding. steps: that it is unrolled over.

    While it learns, the target's states are divided by their size, layer by layer, so that all are learnt from at the
    same rate; `save` puts that into the weights.
    """

    def __init__(self, head: HeadModule, texts: Sequence[Text], tokens: Sequence[int] | None, steps: int) -> None:
        self.head = head.eval()
        head.embed_tokens.requires_grad_(False)
        parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
        weights = [DECAY**step / sum(DECAY**other for other in range(steps)) for step in range(steps)]
        super().__init__(parameters, tokens, head.config.layer.vocab_size, weights)
        sizes = torch.stack([_of(text)[1:].float().square().mean((0, 2)) for text in texts[:SCALED_BY]])
        scale = sizes.mean(0).clamp(min=1e-12).rsqrt()
        self._scale = scale.repeat_interleave(head.config.target_hidden_size).to(self.device)

    def save(self, dtype: str, target_folder: Path, folder: Path) -> None:
        """Write the head, without the target's embedding, and the target's tokenizer files."""
        with torch.no_grad():
            self.head.fc.weight.mul_(self._scale)
        self._scale = torch.ones_like(self._scale)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).unlink(missing_ok=True)
        copy_tokenizer(target_folder, folder)
        save_head(self.head, folder, DTYPES[dtype])

    def collate(self, texts: Sequence[Text]) -> HeadBatch:
        length = max(len(text.tokens) for text in texts) - 1
        first = [max(text.answer, 2) for text in texts]  # token 1 has no entry before it
        answered = [max(0, len(text.tokens) - start) for text, start in zip(texts, first, strict=True)]
        k, width = texts[0].top_ids.shape[1], max(1, *answered)
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        states = torch.zeros(len(texts), length, len(self._scale), dtype=_of(texts[0]).dtype)
        top_ids = torch.zeros(len(texts), width, k, dtype=torch.long)
        log_probs = torch.zeros(len(texts), width, k)
        for i, (text, count) in enumerate(zip(texts, answered, strict=True)):
            ids[i, : len(text.tokens) - 1] = text.tokens[1:]
            states[i, : len(text.tokens) - 1] = _of(text).flatten(1)
            if count:
                top_ids[i, :count], log_probs[i, :count] = text.top_ids[-count:], text.top_log_probs[-count:]
        base = torch.tensor(first)[:, None] - 2 + torch.arange(width)
        rows = to_draft_rows(top_ids, self._row_of)
        parts = (ids, states, base.clamp(max=length - 1), torch.tensor(answered), rows, log_probs)
        return HeadBatch(*(part.to(self.device, non_blocking=True) for part in parts))

    def say(self, batch: HeadBatch) -> list[Judged]:
        said = []
        with autocast(self.device):
            for step, outputs in enumerate(self._outputs(batch)):
                # Rows whose token of this step is in the text, [texts, rows - step].
                there = torch.arange(step, batch.base.shape[1], device=self.device) < batch.answered[:, None]
                logits = self.head.logits(outputs[:, : there.shape[1]][there])
                said.append((logits, batch.rows[:, step:][there], batch.log_probs[:, step:][there]))
        return said

    def _outputs(self, batch: HeadBatch) -> list[torch.Tensor]:
        """The head's outputs at each step, [texts, rows, hidden]."""
        layer, base = self.head.midlayer, batch.base
        length = batch.ids.shape[1]
        every = torch.arange(length, device=self.device).expand(len(base), -1)
        states = self.head.project(batch.states.float() * self._scale)
        queries, keys, values = layer.attention_inputs(
            self.head.embed_tokens(batch.ids), states, self.head.rotary(every)
        )
        hidden = every[:, None] > base[:, :, None]  # of the entries: [texts, rows, length]
        queries = queries.gather(2, base[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
        states = states.gather(1, base[:, :, None].expand(-1, -1, states.shape[2]))
        own: list[tuple[torch.Tensor, torch.Tensor]] = []
        outputs: list[torch.Tensor] = []
        for step in range(len(self.weights)):
            if step:
                place = (base + step).clamp(max=length - 1)
                embedded = self.head.embed_tokens(batch.ids.gather(1, place))
                queries, *drafted = layer.attention_inputs(embedded, states, self.head.rotary(base + step))
                own.append((drafted[0], drafted[1]))
            outputs.append(layer.finish(states, _attend(queries, keys, values, hidden, own)))
            states = self.head.next_states(outputs[-1])
        return outputs


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    own: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Attention of rows to the entries of their text that are not hidden, and each to what it drafted itself.

    queries: [texts, heads, rows, dim]. keys, values: [texts, kv_heads, length, dim]. own: keys and values of the
    earlier steps, [texts, kv_heads, rows, dim]. Returns [texts, heads, rows, dim].
    """
    # [texts, kv_heads, group, rows, dim]
    grouped = queries.unflatten(1, (keys.shape[1], -1)) * queries.shape[-1] ** -0.5
    scores = (grouped.flatten(2, 3) @ keys.transpose(2, 3)).unflatten(2, grouped.shape[2:4])
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    drafted = [(grouped * key[:, :, None]).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat([scores, *drafted], -1).softmax(-1, dtype=torch.float32).to(values.dtype)
    mixed = (weights[..., : keys.shape[2]].flatten(2, 3) @ values).unflatten(2, grouped.shape[2:4])
    for i, (_, value) in enumerate(own, start=keys.shape[2]):
        mixed = mixed + weights[..., i : i + 1] * value[:, :, None]
    return mixed.flatten(1, 2)


def _of(text: Text) -> torch.Tensor:
    assert text.states is not None  # as the manifest says
    return text.states
