"""What a model's own generation settings ask of `generate`, and what of it would change a greedy text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specsplit.errors import UserError, listed, shortened
from specsplit.io import read_json_object

GENERATION_CONFIG = "generation_config.json"
# Settings of `generate` that leave a greedy text as it is: they concern sampling, beams (of which greedy has one),
# caches, assistants and what is returned; or the client says them (lengths), or they are honoured (end of text).
HARMLESS = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("renormalize_logits", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty"),
    *("num_return_sequences", "max_length", "max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("decoder_start_token_id", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
    *("prefill_chunk_size", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("speculation_type", "compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
}
NEUTRAL = {"penalty_alpha": 0, "min_new_tokens": 0, "guidance_scale": 1, "token_healing": False}


def text_changing_settings(folder: Path) -> dict[str, Any]:
    """The generation settings of a model folder that would change its greedy text, by name.

    They are read as `generate` reads them: of generation_config.json, of config.json where there is none. What
    transformers does not know changes nothing. Raises UserError for a file that is not a JSON object.
    """
    from transformers import GenerationConfig

    known = vars(GenerationConfig()).keys()
    neutral = {**GenerationConfig._get_default_generation_params(), **NEUTRAL}
    path = _settings_file(folder)
    given = read_json_object(path) if path.is_file() else {}
    return {
        name: value
        for name, value in given.items()
        if name in known
        and not name.startswith("_")
        and name not in HARMLESS
        and value not in (None, [], {})
        and value != neutral.get(name)
    }


def _settings_file(folder: Path) -> Path:
    own = folder / GENERATION_CONFIG
    return own if own.is_file() else folder / "config.json"


def refuse_model_settings(folder: Path, how: str) -> None:
    """Refuse a target whose own generation settings would change its greedy text: they are not applied.

    how: what the user gives to ignore them. Raises UserError that names each.
    """
    if found := text_changing_settings(folder):
        named = ", ".join(f"{name} {shortened(str(value))}" for name, value in found.items())
        stop = "; strings that end a text: generation.stop, or --stop" if "stop_strings" in found else ""
        raise UserError(
            f"{_settings_file(folder)} sets {named}, which would change the greedy text and is not applied here. To "
            f"go on without, so that the text is that of the model alone, {how}{stop}"
        )


def check_eos(folder: Path) -> None:
    """Raise UserError for an end of text that is given as anything but ids of tokens, or that no token can be."""
    paths = [path for path in (folder / GENERATION_CONFIG, folder / "config.json") if path.is_file()]
    given = {path: read_json_object(path) for path in paths}
    ends = {path: _end_ids(path, content) for path, content in given.items()}
    config = given.get(folder / "config.json", {})
    text = config.get("text_config")
    vocab_size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    # What is given first is what ends a text.
    path, ids = next(((path, ids) for path, ids in ends.items() if ids), (folder, []))
    if ids and type(vocab_size) is int and min(ids) >= vocab_size:
        raise UserError(
            f"{path}: eos_token_id: {listed(ids)} is beyond the vocabulary of {vocab_size} tokens, so no text would "
            "end; give the number of the token"
        )


def _end_ids(path: Path, given: Mapping[str, Any]) -> list[int]:
    """The ids that a configuration gives for the end of text, of two names of the key by the first that is there."""
    found: list[int] = []
    for eos in (given.get("eos_token_id"), given.get("eos_token_ids")):
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if wrong := [one for one in ids if type(one) is not int or one < 0]:
            raise UserError(
                f"{path}: eos_token_id: {wrong[0]!r} is not the id of a token; give the number of the token"
            )
        found = found or ids
    return found
