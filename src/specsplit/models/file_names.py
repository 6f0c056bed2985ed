"""The files that make a model, by name. The standard library alone: the workflow reads it while Snakemake parses."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

GGUF_FILE = "model.gguf"
# The only files taken from a source: no Python code, and no pickles, which run code when they are loaded.
CONFIG_FILES = ("config.json", "generation_config.json")
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", GGUF_FILE)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
)
TOKENIZER_EXTRAS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
# Of a head that drafts from hidden states alone, whose original checkpoints are so; read without running code.
HEAD_WEIGHTS = "pytorch_model.bin"
# Of a draft with a reduced vocabulary: the target token of every row of its output head (models/vocabulary.py).
MAP_FILES = ("draft_to_target.json", "draft_to_target.safetensors")
MODEL_FILES = CONFIG_FILES + WEIGHT_FILES + TOKENIZER_FILES + TOKENIZER_EXTRAS + MAP_FILES


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name matches one of the patterns; a name with a folder in it matches none."""
    return not {"/", "\\"} & set(name) and any(fnmatchcase(name, pattern) for pattern in patterns)


def is_gguf_file(path: Path) -> bool:
    """Whether a model is named by a GGUF file, there or not, instead of a folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()
