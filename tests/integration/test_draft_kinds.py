"""Every kind of draft behind a real worker: whatever proposes the tokens, the text is the target's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from specsplit.client.writer import TextWriter
from specsplit.distill.draft import DraftLearner, build_draft, pick_layers, pick_vocabulary
from specsplit.distill.training import Trainer
from specsplit.distill.writing import Writer
from specsplit.engines.transformers import CausalLM
from specsplit.models.sources import prepare_model
from specsplit.models.tokenizer import TextCodec
from specsplit.settings.distill import TrainingSettings, WritingSettings
from specsplit.settings.run import OrchestratorConfig

from grpc_fixtures import PROMPTS, Reference, Worker, serving
from tiny_models import VOCAB, make_tokenizer

LENGTH = 24
KINDS = (
    "ngram",
    "suffix",
    "suffix or model",
    "dtype auto",
    "skipped layer",
    "reduced head",
    "distilled",
    "another tokenizer",
)


def reduced_head(folder: Path, copy: Path) -> Path:
    """The model of `folder`, able to say every second token only."""
    shutil.copytree(folder, copy)
    (copy / "draft_to_target.json").write_text(json.dumps(list(range(0, VOCAB, 2))))
    return copy


def distilled(folder: Path, copy: Path) -> Path:
    """Two layers and half of the tokens of the model of `folder`, trained for a moment on what it writes."""
    target = CausalLM.load(folder, device="cpu")
    lengths = {"max_user_tokens": 3, "max_answer_tokens": 16, "write_batch": 64, "top_k": 8}
    writer = Writer(target, TextCodec.load(folder), WritingSettings.load({**lengths, "user_temperature": 4}))
    texts = writer.batch(0).texts
    settings = TrainingSettings.load({"vocab_size": VOCAB // 2, "batch_size": 4, "validation_texts": 2, "epochs": 2})
    tokens = pick_vocabulary(settings, texts, target, top_k=8)
    learner = DraftLearner(build_draft(target, pick_layers(settings, target.num_layers), tokens), tokens)
    Trainer(learner, texts, settings).run()
    learner.save("float32", folder, copy)
    return copy


def renumbered(folder: Path, copy: Path) -> Path:
    """The model of `folder` with the same tokens under other numbers."""
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))  # new number -> old one
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight.copy_(layer.weight[order])
    model.save_pretrained(copy)
    description = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = {number: word for word, number in description["model"]["vocab"].items()}
    description["model"]["vocab"] = {words[old]: new for new, old in enumerate(order.tolist())}
    description["added_tokens"] = []
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
    ).save_pretrained(copy)
    return copy


@contextmanager
def drafting(kind: str, folder: Path, copy: Path) -> Iterator[Worker]:
    """A draft worker of a kind, made from the target's own folder."""
    settings: dict[str, object] = {}
    if kind == "ngram":
        parameters = {"source": "ngram", "max_ngram": 2, "min_ngram": 1, "tokenizer": str(folder)}
        prepare_model(parameters, "ngram", copy)
    elif kind.startswith("suffix"):
        parameters = {"source": "suffix", "min_match": 1, "tokenizer": str(folder)}
        if kind == "suffix or model":
            parameters["model"] = str(reduced_head(folder, copy.with_name("model")))
        prepare_model(parameters, "suffix", copy)
        settings = {"engine": "transformers"}
    elif kind == "reduced head":
        reduced_head(folder, copy)
    elif kind == "distilled":
        distilled(folder, copy)
    elif kind == "another tokenizer":
        renumbered(folder, copy)
        settings["target_tokenizer"] = folder
    else:
        copy = folder
        settings = {"dtype": "auto"} if kind == "dtype auto" else {"skip_layers": [1]}
    with serving("draft", copy, **settings) as worker:
        yield worker


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_the_target_alone(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    folder = tiny_model_folder("llama")
    reference = Reference(folder)
    accepted = 0
    with serving("target", folder) as target, drafting(kind, folder, tmp_path / "draft") as draft:
        assert draft.connect().description.dtype == ("int8" if kind == "dtype auto" else "float32")
        assert target.servicer.vocab_size == draft.servicer.vocab_size == VOCAB
        with TextWriter(draft.address, target.address) as writer:
            for prompt, temperature in ((PROMPTS[2], 0.0), (PROMPTS[1], 1.0)):
                common = {"temperature": temperature, "max_output_tokens": LENGTH, "ignore_eos": True, "seed": 3}
                expected = writer.write(prompt, OrchestratorConfig(gamma=0, **common)).output_tokens
                if not temperature:
                    assert expected == reference.text(prompt, LENGTH)
                for mode in ("sync", "overlap", "lookahead"):
                    for tree in ("chain", "dynamic-8x3"):
                        config = OrchestratorConfig(mode=mode, tree=tree, gamma=3, **common)
                        result = writer.write(prompt, config)
                        assert result.output_tokens == expected, (mode, tree, temperature)
                        accepted += sum(r.accepted for r in result.rounds)
    assert accepted > 5  # else little was proved


def test_a_renumbered_draft_agrees_wherever_it_can_speak(
    tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The same weights under another tokenizer: a draft is wrong only about tokens that its tokenizer cannot read."""
    folder = tiny_model_folder("llama")
    config = OrchestratorConfig(gamma=3, max_output_tokens=5, ignore_eos=True)
    readable = range(3, 98)  # a character each; the tokens after them are words that no text is split into
    checked = 0
    with (
        serving("target", folder) as target,
        drafting("another tokenizer", folder, tmp_path / "draft") as draft,
        TextWriter(draft.address, target.address) as writer,
    ):
        for prompt in ([token, token + 1] for token in range(5, 65)):
            result = writer.write(prompt, config)
            first = result.rounds[1]  # that has a draft
            if set(readable).issuperset(result.output_tokens[: 1 + first.drafted]):
                assert first.accepted == first.drafted == 3
                checked += 1
    assert checked > 10
