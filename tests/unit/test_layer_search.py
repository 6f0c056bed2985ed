"""Finding decoder layers that can be left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specsplit.cli.main import main
from specsplit.engines.layer_search import search_layers
from specsplit.engines.transformers import CausalLM, without_layers
from specsplit.errors import UserError

from tiny_models import SMALL, make_tiny_model, make_tokenizer, random_model

PROMPTS = [[5, 9, 33, 71], [12, 90, 44, 8, 101], [63, 27]]
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def deep_model(idle: list[int]) -> Any:
    """Five layers, those of `idle` without effect: they add nothing to the residual stream."""
    config = transformers.Qwen3Config(
        **{**SMALL, "num_hidden_layers": 5}, use_sliding_window=True, sliding_window=4, layer_types=LAYER_TYPES
    )
    model = random_model(config)
    with torch.no_grad():
        for number in idle:
            model.model.layers[number].self_attn.o_proj.weight.zero_()
            model.model.layers[number].mlp.down_proj.weight.zero_()
    return model


def logits(model: CausalLM) -> torch.Tensor:
    return model.step(model.new_cache(16), PROMPTS[1])


def test_idle_layers_are_found():
    model = CausalLM(deep_model(idle=[1, 3]))
    steps = search_layers(model, PROMPTS, count=2, max_tokens=6)
    assert [step.skipped for step in steps] == [[1], [1, 3]]
    assert [step.layer for step in steps] == [1, 3]
    assert all(step.agreement == 1.0 and step.kl < 1e-6 for step in steps)


def test_the_least_harm_is_done_and_said():
    """Against measuring every layer by hand, with no cache and no shared code."""
    plain = deep_model(idle=[])
    harm = {}
    for layer in (1, 2, 3):
        same, total = 0, 0
        for prompt in PROMPTS:
            text = plain.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
            with torch.inference_mode():
                full = plain(text[None, :-1]).logits[0, len(prompt) - 1 :].argmax(-1)
                handle = plain.model.layers[layer].register_forward_hook(lambda _, args, out: args[0])
                less = plain(text[None, :-1]).logits[0, len(prompt) - 1 :].argmax(-1)
                handle.remove()
            same, total = same + int((full == less).sum()), total + len(full)
        harm[layer] = same / total
    (step,) = search_layers(CausalLM(plain), PROMPTS, count=1, max_tokens=6)
    assert step.agreement == pytest.approx(max(harm.values()))
    assert harm[step.layer] == pytest.approx(step.agreement)
    assert step.agreement < 1.0
    assert step.kl > 0


def test_the_search_repeats_and_leaves_the_model_as_it_was():
    model = CausalLM(deep_model(idle=[2]))
    before = logits(model)
    layers = model.model.model.layers
    numbers = [layer.self_attn.layer_idx for layer in layers]
    seen: list[tuple[int, int]] = []
    steps = search_layers(
        model, PROMPTS, count=3, max_tokens=5, on_candidate=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 6) for done in range(1, 7)]  # 3 + 2 + 1 candidates
    assert model.model.model.layers is layers
    assert [layer.self_attn.layer_idx for layer in layers] == numbers == list(range(5))
    assert model.model.config.num_hidden_layers == 5
    assert model.model.config.layer_types == LAYER_TYPES
    assert torch.equal(logits(model), before)
    assert search_layers(model, PROMPTS, count=3, max_tokens=5) == steps
    assert steps[0].layer == 2
    assert steps[2].skipped == [1, 2, 3]


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "qwen3-mixed"])
def test_layers_come_back_after_an_error(architecture):
    model = CausalLM(make_tiny_model(architecture))
    before = logits(model)
    with without_layers(model.model, [1]):
        assert not torch.equal(model.model(torch.tensor([PROMPTS[1]]), use_cache=False).logits[0, -1:], before)

    def fail() -> None:
        with without_layers(model.model, [0, 2]):
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert torch.equal(logits(model), before)


def test_the_first_and_the_last_layer_stay():
    assert search_layers(CausalLM(deep_model(idle=[0, 4])), PROMPTS, count=1, max_tokens=4)[0].layer in (1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 4}, "cannot leave out 4 of 5 layers: the first and the last stay, 1 to 3 can go"),
        ({"count": 0}, "cannot leave out 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        search_layers(CausalLM(deep_model(idle=[])), PROMPTS, max_tokens=2, **options)


def test_a_prompt_that_fills_the_context():
    model = CausalLM(deep_model(idle=[]))
    with pytest.raises(UserError, match="a prompt of 256 tokens leaves no room in a context of 256"):
        search_layers(model, [[5] * 256], count=1)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    deep_model(idle=[1]).save_pretrained(tmp_path / "model", safe_serialization=True)
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one fox"}\n{"prompt": "two dogs"}\n')
    return ["pick-layers", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl")]


def test_the_command(tmp_path, inputs, capsys):
    output = tmp_path / "layers.json"
    arguments = [*inputs, "--count", "2", "--max-tokens", "4", "--limit", "2", "--output", str(output)]
    main(arguments)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "skip layer 1: agreement 1.000, skipped [1]"
    found = json.loads(output.read_text())
    assert found["layers"] == found["steps"][1]["skipped"] == sorted(step["layer"] for step in found["steps"])
    assert found["agreement"] == found["steps"][1]["agreement"]
    assert (found["model"], found["count"], found["prompts"]) == ("model", 2, 2)
    assert len(found["weights_sha256"]) == len(found["prompts_sha256"]) == 64
    first = output.read_bytes()
    main(arguments)
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--count", "9"], "cannot leave out 9 of 5 layers"),
        (["--count", "1", "--max-tokens", "0"], "--max-tokens = '0': Input should be greater than or equal to 1"),
        (["--count", "1", "--dtype", "int3"], "--dtype = 'int3': Input should be 'auto'"),
    ],
)
def test_mistakes_on_the_command_line(inputs, capsys, extra, message):
    with pytest.raises(SystemExit) as ended:
        main([*inputs, *extra])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
