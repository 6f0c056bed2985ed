"""The Python of README.md runs as it stands there, with tiny models in the place of the embedded one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import specsplit
from specsplit.settings.models import EMBEDDED, SHIPPED_DRAFTS

from grpc_fixtures import serving

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme(
    tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model_folder("llama")
    named: list[object] = []
    monkeypatch.setattr(specsplit.Model, "folder", lambda model: (named.append(model.path), folder)[1])
    loads, connects = BLOCKS
    names: dict[str, object] = {}
    exec(loads, names)  # fmt: skip
    assert named == [*EMBEDDED, next(iter(SHIPPED_DRAFTS.values()))["path"]]
    text = names["text"]
    assert isinstance(text, specsplit.GeneratedText)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{text} {text.acceptance_rate} {text.tokens_per_second}\n")
    assert len(shown.splitlines()[-1]) > 20  # the stream
    with serving("draft", folder) as draft, serving("target", folder) as target:
        exec(connects.replace("127.0.0.1:50051", draft.address).replace("127.0.0.1:50052", target.address), names)
    assert re.match(r"\d+ tokens in \d+ rounds, ended by (eos|length|context), accepted", capsys.readouterr().out)
