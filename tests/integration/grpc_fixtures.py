"""Workers in this process behind real gRPC servers on real ports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specsplit.engines.passes import Pass
from specsplit.rpc.codec import tokens_crc32
from specsplit.rpc.connection import OPEN, Connection, connect
from specsplit.rpc.credentials import TLS_SCHEME, Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.worker import DraftWorkerConfig, TargetWorkerConfig
from specsplit.worker.server import WorkerServer, load_servicer

VOCAB = 128
PROMPTS = [[5, 6, 7], [10, 3, 40, 22], [33], [8, 8, 8, 8, 8], [50, 4], [61, 60, 59, 58], [12, 13], [120, 19, 18]]


def noisy_copy(folder: Path, copy: Path, *, noise: float) -> Path:
    """The model of `folder` with every weight changed a little: a draft that is right some of the time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    errors = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=errors) * parameter.std() * noise)
    model.save_pretrained(copy)
    AutoTokenizer.from_pretrained(folder).save_pretrained(copy)
    return copy


class Reference:
    """What transformers itself writes: `generate(do_sample=False)`."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._written: dict[tuple[Any, ...], list[int]] = {}

    def text(self, prompt: Sequence[int], count: int, *, eos: int | None = None) -> list[int]:
        """At most `count` tokens after the prompt; the end-of-text token, when it came, is the last one."""
        asked = (*prompt, count, eos)
        if asked not in self._written:  # many tests ask for the same text
            ids = torch.tensor([list(prompt)])
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=eos,
                pad_token_id=0,
            )
            self._written[asked] = written[0, len(prompt) :].tolist()
        return list(self._written[asked])


class Worker:
    """One worker that this process serves. `passes` counts the passes of its model, each session's part as one."""

    def __init__(self, role: str, model: Path, *, access: Access = OPEN, **settings: Any) -> None:
        defaults = {"port": 0, "threads": 1, "dtype": "float32", "max_context": 128}
        self.role = role
        self.access = access
        self.settings = {**defaults, "model": model, **settings}
        self.passes = 0
        self.before_pass: Callable[[], None] = lambda: None
        self._channels: list[Connection] = []
        self.start()

    def start(self) -> None:
        """Serve with no session, on the port of the last start."""
        settings = DraftWorkerConfig if self.role == "draft" else TargetWorkerConfig
        self.servicer: Any = load_servicer(settings(**self.settings))
        model = self.servicer.model.model
        step_many = model.step_many

        def counted(passes: Sequence[Pass]) -> list[torch.Tensor]:
            self.passes += len(passes)
            self.before_pass()
            return step_many(passes)

        model.step_many = counted
        self.server = WorkerServer(self.servicer.config)
        self.server.start()
        self.server.open(self.servicer)
        self.settings["port"] = self.server.port

    def restart(self) -> None:
        self.server.stop()
        self.start()

    @property
    def address(self) -> str:
        return f"{TLS_SCHEME if 'tls_cert' in self.settings else ''}127.0.0.1:{self.server.port}"

    def connect(self) -> Connection:
        """A channel of its own, closed when the worker is. It shows what `access` says."""
        self._channels.append(connect(self.role, self.address, timeout_s=20, access=self.access))
        return self._channels[-1]

    @property
    def stub(self) -> Any:
        return (self._channels[0] if self._channels else self.connect()).stub

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.server.stop()


@contextmanager
def serving(role: str, model: Path, **settings: Any) -> Iterator[Worker]:
    """A worker for the time of a test."""
    worker = Worker(role, model, **settings)
    try:
        yield worker
    finally:
        worker.close()


class Gate:
    """Holds the model of a worker at its next pass until `open`."""

    def __init__(self, worker: Worker) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()
        worker.before_pass = self._hold

    def _hold(self) -> None:
        self._reached.set()
        self._opened.wait(30)

    def wait(self) -> None:
        assert self._reached.wait(30), "the model was not called"

    def open(self) -> None:
        self._opened.set()


def context(
    new_tokens: Sequence[int], *, session: str = "s", round: int = 1, held: Sequence[int] = (), **fields: Any
) -> pb.Context:
    """The context of a request whose session holds `held`; `fields` replace what follows from that."""
    values = {"prefix_length": len(held), "prefix_crc32": tokens_crc32(held), **fields}
    return pb.Context(session_id=session, round=round, new_tokens=new_tokens, **values)


def verify_request(*args: Any, tree: pb.TokenTree | None = None, **kwargs: Any) -> pb.VerifyDraftsRequest:
    return pb.VerifyDraftsRequest(context=context(*args, **kwargs), tree=tree)


def draft_request(
    *args: Any, gamma: int = 3, branching: Sequence[int] = (), stop: Sequence[int] = (), **kwargs: Any
) -> pb.GenerateDraftsRequest:
    return pb.GenerateDraftsRequest(
        context=context(*args, **kwargs), max_draft_tokens=gamma, branching=branching, stop_token_ids=stop
    )
