"""Stop strings cut the text of the target alone, in every mode and tree; advice, followed once each."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_no_traceback import edit

import specsplit
from specsplit.client.handshake import check_tokenizers, text_limit
from specsplit.errors import ModelError, PromptError, UserError
from specsplit.models.sources import resolve_model, tokenizer_folder
from specsplit.rpc.credentials import join_address, split_address
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.worker import TargetWorkerConfig
from specsplit.worker.server import WorkerServer

PROMPT, LENGTH = "abc", 24


@pytest.fixture(scope="module")
def pair(tiny_model_folder: Callable[..., Path]) -> Iterator[specsplit.Pair]:
    folders = tiny_model_folder("llama"), tiny_model_folder("llama", 1)
    with specsplit.load(*folders, max_new_tokens=LENGTH, ignore_eos=True, gamma=4) as loaded:
        yield loaded


@pytest.mark.parametrize("tree", ["chain", "2x2", "dynamic-8x3"])
@pytest.mark.parametrize("mode", ["sync", "overlap", "lookahead"])
def test_a_text_is_cut_before_the_string_that_ends_it(pair: specsplit.Pair, mode: str, tree: str) -> None:
    whole = pair.generate(PROMPT, gamma=0)
    for start, size in ((3, 1), (9, 2), (15, 4)):
        stop = str(whole)[start : start + size]
        text = pair.generate(PROMPT, mode=mode, tree=tree, stop=[stop, "never there"])  # type: ignore[arg-type]
        assert text == whole[: whole.index(stop)]
        assert text.finish_reason == "stop"
        # Those up to the one that completes the string.
        assert text.token_ids == whole.token_ids[: len(text.token_ids)]
        decode = pair.codec.decode  # type: ignore[union-attr]
        assert stop in decode(text.token_ids)
        assert stop not in decode(text.token_ids[:-1])


def test_the_advice_about_the_models_own_settings_is_right(
    tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "model"))
    edit("generation_config.json", repetition_penalty=1.1)(folder)
    with pytest.raises(ModelError, match=r"repetition_penalty 1\.1.*ignore_model_settings=True"):
        specsplit.load(folder)
    with specsplit.load(specsplit.Model(folder, ignore_model_settings=True), max_new_tokens=4) as pair:
        ignored = pair.generate(PROMPT).token_ids
    with specsplit.load(tiny_model_folder("llama"), folder, max_new_tokens=4) as pair:  # of a draft they do not matter
        assert pair.generate(PROMPT).token_ids == ignored


def test_a_folder_with_a_tokenizer_alone_is_enough_for_one(
    tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    for path in tiny_model_folder("llama").iterdir():
        if path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert tokenizer_folder(tmp_path) == tmp_path
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(tmp_path)


def test_the_advice_where_tokenizers_differ() -> None:
    one, other = "1" * 64, "2" * 64
    with pytest.raises(UserError, match="--target-tokenizer FOLDER"):
        check_tokenizers({"--tokenizer": one, "the draft worker (d)": other, "the target worker (t)": one})
    with pytest.raises(UserError, match="Give the tokenizer of the target's model"):
        check_tokenizers({"--tokenizer": other, "the draft worker (d)": one, "the target worker (t)": one})


def test_a_limit_of_the_model_cannot_be_raised() -> None:
    def worker(limit: int, own: int) -> pb.DescribeReply:
        return pb.DescribeReply(max_context=limit, runtime={"model_max_context": str(own)})

    assert text_limit(worker(128, 2048)) == (128, True)
    assert text_limit(worker(256, 256)) == (256, False)
    assert text_limit(worker(2048, 4096), worker(1024, 1024)) == (1024, False)


@pytest.mark.parametrize(
    ("host", "address"),
    [("::1", "[::1]:50"), ("[::1]", "[::1]:50"), ("::", "[::]:50"), ("a", "a:50"), ("1.2.3.4", "1.2.3.4:50")],
)
def test_addresses_of_every_kind_of_host(host: str, address: str) -> None:
    assert join_address(host, 50) == address
    assert split_address(address)[2] == 50


def test_an_ipv6_address_without_brackets_is_refused_for_what_it_is() -> None:
    with pytest.raises(UserError, match=r"in brackets, as in \[::1\]:50051"):
        split_address("::1:50051")


def test_a_prompt_that_the_template_does_not_take_has_its_id(tiny_model_folder: Callable[..., Path]) -> None:
    from specsplit.experiment.dataset import Prompt
    from specsplit.experiment.records import encode_prompts
    from specsplit.models.tokenizer import TextCodec

    codec = TextCodec.load(tiny_model_folder("llama"))
    codec.tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(PromptError, match=r"prompt 'p7': the chat template .*ZeroDivisionError"):
        encode_prompts([Prompt("p7", "hello", "chat")], codec, chat=True, limit=100)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_worker_listens_on_ipv6(host: str) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    server = WorkerServer(TargetWorkerConfig(host=host, port=0))
    server.start()
    try:
        assert server.port > 0
        with socket.create_connection(("::1", server.port), timeout=5):
            pass
    finally:
        server.stop()


def test_every_address_of_ipv6_wants_what_that_of_ipv4_does() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match=re.escape(host)):
            WorkerServer(TargetWorkerConfig(host=host, port=0))
