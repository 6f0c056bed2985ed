"""Between the target's tokens, which the wire speaks, and a draft model's own.

A draft model may have another tokenizer than the target. It then proposes only tokens that both have, its logits
renormalised over them: token-level intersection (Timor et al. 2025, "Accelerating LLM Inference with Lossless
Speculative Decoding Algorithms for Heterogeneous Vocabularies"). Verification stays as it is, so the text does too.

Tokens are the same when they stand for the same bytes of a text, however their files spell them: " the" is `Ġthe` in a
byte-level vocabulary and `▁the` in a SentencePiece one, a line feed is `Ċ` or `<0x0A>`. The token of a space shows how
a vocabulary spells, as in transformers' AssistantToTargetTranslator; that one translates only the sign of the leading
space, and so loses line feeds, inner spaces and everything beyond ASCII.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specsplit.decoding.sampling import Candidates, Sampling, candidates
from specsplit.errors import UserError
from specsplit.io import read_json
from specsplit.models.file_names import MAP_FILES
from specsplit.models.fingerprint import has_tokenizer, read_config
from specsplit.models.head_config import is_head
from specsplit.models.head_files import read_head
from specsplit.models.tokenizer import TextCodec

OVERLAP = 64  # tokens at the end of a text that are encoded again with those after them
RECENT = 64  # texts that are remembered
MAP_TENSOR = "draft_to_target"


class Vocabulary:
    """One vocabulary for both models. size: target token ids that can be proposed are below it.

    same_ids: whether the draft reads the target's token ids, so that what it proposes can be fed as it is.
    targets: then the target's token of every row of its output head, where that is not the row's number.
    """

    same_ids = True
    targets: torch.Tensor | None = None

    def __init__(self, size: int) -> None:
        self.size = size

    def context(self, tokens: Sequence[int]) -> list[int]:
        """The draft's tokens of a text; at least one when `tokens` has one."""
        return list(tokens)

    def token(self, token: int) -> int:
        """The draft's token of a proposed target token."""
        return token

    def lacks(self, token: int) -> bool:
        """Whether the draft cannot read a target token as one of its own."""
        return False

    def outward(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, draft vocabulary] -> [rows, size], -inf for tokens that the draft cannot say."""
        return logits

    def candidates(
        self, logits: torch.Tensor, positions: Sequence[int], sampling: Sampling, count: int, *, below: int
    ) -> list[Candidates]:
        """As `sampling.candidates` of what `outward` makes of the draft's logits, of tokens below `below`."""
        return candidates(self.outward(logits)[:, :below], positions, sampling, count)


class ReducedVocabulary(Vocabulary):
    """A draft that reads every token of the target but can say only some: its output head has fewer rows.

    As in FR-Spec (Zhao et al. 2025) and EAGLE-3 (Li et al. 2025). draft_to_target: target token of every row of the
    output head. size: of the target's vocabulary.
    """

    def __init__(self, draft_to_target: Sequence[int], size: int) -> None:
        super().__init__(size)
        self.targets: torch.Tensor = torch.tensor(list(draft_to_target), dtype=torch.long)
        self._tokens = list(draft_to_target)
        self._largest = max(self._tokens)

    def candidates(
        self, logits: torch.Tensor, positions: Sequence[int], sampling: Sampling, count: int, *, below: int
    ) -> list[Candidates]:
        """As Vocabulary.candidates; greedy ones are found among the few tokens that the draft can say."""
        if not sampling.greedy or below <= self._largest:
            return super().candidates(logits, positions, sampling, count, below=below)
        found = candidates(logits, positions, sampling, count)
        return [replace(each, token_ids=[self._tokens[row] for row in each.token_ids]) for each in found]

    def outward(self, logits: torch.Tensor) -> torch.Tensor:
        self.targets = self.targets.to(logits.device)
        return _spread(logits, self.targets, self.size)


class _Encoded(NamedTuple):
    """A text in the target's tokens, in characters, and in the draft's tokens."""

    tokens: list[int]
    text: str
    ids: list[int]


class SharedVocabulary(Vocabulary):
    """The tokens that two tokenizers have in common.

    draft_rows: rows of the draft's output head; tokens beyond them are not shared. Special tokens are shared only
    when both have the same and it is special in both. Raises UserError when nothing is shared.
    """

    same_ids = False

    def __init__(self, target_tokenizer: Any, draft_tokenizer: Any, draft_rows: int) -> None:
        targets, drafts = spellings(target_tokenizer), spellings(draft_tokenizer)
        pairs = sorted((targets[spelling], drafts[spelling]) for spelling in targets.keys() & drafts.keys())
        pairs = [(target, draft) for target, draft in pairs if draft < draft_rows]
        if not pairs:
            raise UserError(
                "the draft model's tokenizer shares no token with the target's: choose a draft model whose "
                "vocabulary is of the same kind"
            )
        super().__init__(max(target_tokenizer.get_vocab().values()) + 1)
        self.shared = len(pairs)
        self._draft_of = dict(pairs)
        self._targets = torch.tensor([target for target, _ in pairs])
        self._drafts = torch.tensor([draft for _, draft in pairs])
        self._target_tokenizer = target_tokenizer
        self._draft_tokenizer = draft_tokenizer
        self._recent: deque[_Encoded] = deque(maxlen=RECENT)
        self._prefix = _prefix(draft_tokenizer)
        starts = (draft_tokenizer.bos_token_id, draft_tokenizer.eos_token_id, 0)
        self._start = next(token for token in starts if token is not None)

    def context(self, tokens: Sequence[int]) -> list[int]:
        """Draft tokens of a text, which is decoded and encoded again; of one that continues a text that was here
        lately, its end alone.

        Special tokens are written out for the draft tokenizer to find. The bytes of an unfinished character at the
        end are left out; the draft continues the text before them.
        """
        found = self._continued(tokens)
        if found is None:
            text = self._decode(tokens)
            found = _Encoded(list(tokens), text, self._encode(text))
        self._recent.append(found)
        ids = list(found.ids)
        if ids[: len(self._prefix)] != self._prefix:  # the text may begin with it already
            ids = self._prefix + ids
        return ids or [self._start]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._target_tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._draft_tokenizer(text.rstrip("\ufffd"), add_special_tokens=False)["input_ids"]
        return ids

    def _continued(self, tokens: Sequence[int]) -> _Encoded | None:
        """The text as a continuation of a recent one, whose last OVERLAP tokens are done again with what is new.

        Done again alone they must give what they gave as a part of the whole, and new tokens must not change how they
        begin; else None.
        """
        old = next((e for e in reversed(list(self._recent)) if list(tokens[: len(e.tokens)]) == e.tokens), None)
        if old is None or len(old.tokens) <= OVERLAP:
            return None
        keep = len(old.tokens) - OVERLAP
        before, after = self._decode(old.tokens[keep:]), self._decode(tokens[keep:])
        ids_before, ids_after = self._encode(before), self._encode(after)
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids_before[::-1], old.ids[::-1], strict=False))
        )
        first = len(ids_before) - same  # from here on they are the whole text's own
        begin = first + OVERLAP // 8
        if same < OVERLAP // 4 or not old.text.endswith(before) or ids_before[:begin] != ids_after[:begin]:
            return None
        text = old.text[: len(old.text) - len(before)] + after
        return _Encoded(list(tokens), text, old.ids[: len(old.ids) - same] + ids_after[first:])

    def token(self, token: int) -> int:
        return self._draft_of[token]

    def lacks(self, token: int) -> bool:
        return token not in self._draft_of

    def outward(self, logits: torch.Tensor) -> torch.Tensor:
        self._targets, self._drafts = self._targets.to(logits.device), self._drafts.to(logits.device)
        return _spread(logits.index_select(1, self._drafts), self._targets, self.size)


def _spread(logits: torch.Tensor, columns: torch.Tensor, size: int) -> torch.Tensor:
    return logits.new_full((len(logits), size), float("-inf")).index_copy_(1, columns, logits)


def load_vocabulary(draft_folder: Path, target_tokenizer_folder: Path | None, model_vocab_size: int) -> Vocabulary:
    """How the draft model in `draft_folder` speaks with the target.

    target_tokenizer_folder: a folder with the target's tokenizer; None when it is the draft's own.
    model_vocab_size: rows of the draft's output head. A folder with a `draft_to_target` file (see read_reduced_map)
    has a reduced head. Raises UserError when a tokenizer cannot be read, when the two share nothing, or when the
    map does not fit.
    """
    # A head may have none of its own, and speaks that of its target.
    own = draft_folder
    if target_tokenizer_folder is not None and not has_tokenizer(draft_folder):
        own = target_tokenizer_folder
    codec = TextCodec.load(own)
    target = codec if target_tokenizer_folder is None else TextCodec.load(target_tokenizer_folder)
    targets = read_reduced_map(draft_folder)
    if targets is None:
        if target.sha256 == codec.sha256:
            return Vocabulary(model_vocab_size)
        return SharedVocabulary(target.tokenizer, codec.tokenizer, model_vocab_size)
    if target.sha256 != codec.sha256:
        raise UserError(
            f"{draft_folder} has a reduced output head (draft_to_target) and another tokenizer than the target in "
            f"{target_tokenizer_folder}: use a draft with the target's tokenizer, or one with a full head"
        )
    if len(targets) != model_vocab_size:
        raise UserError(
            f"{draft_folder}: draft_to_target has {len(targets)} entries, but the output head {model_vocab_size} rows"
        )
    size = read_config(draft_folder).get_text_config().vocab_size
    if max(targets) >= size:
        raise UserError(f"{draft_folder}: draft_to_target names token {max(targets)}; the model has 0 to {size - 1}")
    return ReducedVocabulary(targets, size)


def read_reduced_map(folder: Path) -> list[int] | None:
    """The target token of every row of a reduced output head; None when the folder has no such map.

    Read from `draft_to_target.json`, a list of token ids, or from the tensor `draft_to_target` of
    `draft_to_target.safetensors`; of a head that drafts from hidden states from its `d2t`. Raises UserError when it is
    not a list of different token ids.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if is_head(folder):
        return read_head(folder)[2]
    paths = [folder / name for name in MAP_FILES if (folder / name).is_file()]
    if not paths:
        return None
    if len(paths) > 1:
        raise UserError(f"{folder} has both {' and '.join(MAP_FILES)}: remove one of them")
    path = paths[0]
    if path.suffix == ".json":
        tokens = read_json(path)
    else:
        try:
            tokens = load_file(path).get(MAP_TENSOR, np.zeros(0)).tolist()
        except SafetensorError as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    if not isinstance(tokens, list) or not tokens or any(type(t) is not int or t < 0 for t in tokens):
        raise UserError(f"{path}: wanted a list of token ids, the target token of every row of the output head")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{path}: a target token stands there twice; every row of the output head has its own")
    return tokens


# --- what a token stands for


def spellings(tokenizer: Any) -> dict[tuple[bool, bytes], int]:
    """(special, bytes in a text) -> token id. Of several tokens for the same bytes the whole-text one is taken before
    a byte token (`A` before `<0x41>`), then the lowest id."""
    # How the vocabulary spells a space: Ġ (byte-level), ▁ (SentencePiece), or itself.
    ids = tokenizer(" ", add_special_tokens=False)["input_ids"]
    space = str(tokenizer.convert_ids_to_tokens(ids)[0])[:1] if ids else " "
    added = tokenizer.added_tokens_decoder
    found: dict[tuple[bool, bytes], tuple[bool, int]] = {}
    for piece, token in tokenizer.get_vocab().items():
        if token in added:  # these are found in a text as they stand
            key, rank = (bool(added[token].special), str(added[token].content).encode()), (False, token)
        else:
            raw, is_byte = _bytes(piece, space)
            key, rank = (False, raw), (is_byte, token)
        if key[1]:
            found[key] = min(rank, found.get(key, rank))
    return {key: token for key, (_, token) in found.items()}


def _bytes(piece: str, space: str) -> tuple[bytes, bool]:
    """The bytes that a piece of the vocabulary stands for, and whether it is a byte-fallback token."""
    if space == "Ġ" and all(character in BYTE_OF for character in piece):
        return bytes(BYTE_OF[character] for character in piece), False
    if space == "▁":
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(match[1], 16)]), True
        return piece.replace("▁", " ").encode(), False
    return piece.encode(), False


# The character by which byte-level vocabularies, from GPT-2 on, write every byte.
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def _prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text, its BOS for example."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []
