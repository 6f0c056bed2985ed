"""Tiny models with random weights, made on the spot: every architecture, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)
VOCAB = 128
COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "qwen3-mixed": lambda: transformers.Qwen3Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
}
ARCHITECTURES = tuple(CONFIGS)


def make_tiny_model(architecture: str, seed: int = 0) -> Any:
    """A float32 model of the named architecture whose greedy text is not one token repeated."""
    return random_model(CONFIGS[architecture](), seed)


def random_model(config: Any, seed: int = 0) -> Any:
    """A model of the given configuration with random weights."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Larger than the usual initialisation, so that what a layer does shows in the choice of a token.
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name or "wte" in name else 0.3))
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes 32 to 126 as tokens, and a chat template."""
    letters = [chr(code) for code in range(32, 127)]
    words = ["<pad>", "<s>", "</s>", *letters]
    words += [f"<extra{i}>" for i in range(VOCAB - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    return fast
