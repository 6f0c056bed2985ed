"""A model's own generation settings: each is honoured, harmless, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from specsplit.client.handshake import check_stop_tokens
from specsplit.errors import UserError
from specsplit.models.generation_settings import HARMLESS, check_eos, refuse_model_settings, text_changing_settings
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig

# A value that changes greedy text, for each setting that can.
CHANGING: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "suppress_tokens": [7],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[7, 8]],
    "force_words_ids": [[7]],
    "constraints": [[7]],
    "min_length": 5,
    "min_new_tokens": 5,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 2,
    "sequence_bias": [[[7], -10.0]],
    "exponential_decay_length_penalty": [5, 1.1],
    "guidance_scale": 1.5,
    "remove_invalid_values": True,
    "token_healing": True,
    "watermarking_config": {"bias": 2.0},
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beams": 4,
    "stop_strings": ["\n\n"],
    "max_time": 3.0,
}


def write(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", CHANGING)
def test_each_setting_that_changes_greedy_text_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, do_sample=True, top_p=0.8, **{name: CHANGING[name]})

    with pytest.raises(UserError, match=rf"generation_config.json sets {name} .*give --ignore-it"):
        refuse_model_settings(tmp_path, "give --ignore-it")


def test_every_setting_that_transformers_knows_is_either_harmless_or_refused() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}

    assert known - HARMLESS == set(CHANGING)


def test_neutral_harmless_and_unknown_settings_are_taken(tmp_path: Path) -> None:
    neutral = GenerationConfig._get_default_generation_params()
    given = {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": [1, 2], "chat_format": "chatml"}
    write(tmp_path, **{**neutral, **given, "min_new_tokens": 0, "repetition_penalty": 1})

    assert text_changing_settings(tmp_path) == {}


def test_without_a_generation_config_those_of_the_configuration_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "repetition_penalty": 1.3}))

    with pytest.raises(UserError, match=r"config.json sets repetition_penalty 1\.3"):
        refuse_model_settings(tmp_path, "")


@pytest.mark.parametrize("eos", ["</s>", ["</s>"], 1.5, [2, None], True])
def test_an_end_of_text_that_is_no_token_id_is_named(tmp_path: Path, eos: Any) -> None:
    write(tmp_path, eos_token_id=eos)

    with pytest.raises(UserError, match=r"eos_token_id: .* is not the id of a token"):
        check_eos(tmp_path)


@pytest.mark.parametrize("tokens", [[100], [1, 1 << 40]])
def test_stop_tokens_that_the_target_does_not_have_are_named(tokens: list[int]) -> None:
    target = pb.DescribeReply(vocab_size=100, model="big")
    for known in (None, [], [2, 99]):
        check_stop_tokens(OrchestratorConfig(stop_token_ids=known), target)
    said = rf"generation\.stop_token_ids, --stop-token-ids\): {tokens[-1]} is beyond the vocabulary of 100 .* of big"
    with pytest.raises(UserError, match=said):
        check_stop_tokens(OrchestratorConfig(stop_token_ids=tokens), target)
