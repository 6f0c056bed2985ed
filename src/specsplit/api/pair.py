"""A draft and a target model to write texts with: loaded into this process, or in workers behind gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias, Unpack, cast, overload

import grpc
import torch

from specsplit.api.generated import GeneratedStream, GeneratedText
from specsplit.api.in_process import InProcessStub
from specsplit.api.named_models import Model
from specsplit.api.options import Options, checked, with_options
from specsplit.client.event_loop import event_loop
from specsplit.client.handshake import check_stop_tokens, check_tokenizers, connected_pair
from specsplit.client.pipeline import gamma_controller, run_speculative_loop_async
from specsplit.client.result import SpeculativeResult
from specsplit.client.text import OnTokens
from specsplit.client.writer import open_stubs
from specsplit.decoding.adaptive import GammaController
from specsplit.errors import ModelError, OptionError, PromptError, UserError, WorkerError
from specsplit.launch.environment import threads_beside_another, usable_cores
from specsplit.models.sources import tokenizer_folder
from specsplit.models.tokenizer import TextCodec, TextStream, cut_at_stop, stops_at
from specsplit.rpc.connection import Connection
from specsplit.rpc.credentials import Access
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.worker import ROLES, WorkerSettings
from specsplit.worker.server import load_servicer
from specsplit.worker.servicer import WorkerServicer
from specsplit.worker.spans import WorkerSpans

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
Prompts: TypeAlias = list[str] | list[list[int]] | list[list[dict[str, str]]]
AT_ONCE = 8  # texts of one pair, or fewer where a worker has fewer sessions
CALL_TIMEOUT_S = 3600.0  # of a pass in this process: there is no connection to lose


def load(target: str | Path | Model, draft: str | Path | Model | None = None, **options: Unpack[Options]) -> Pair:
    """Load a target model and a draft for it into this process.

    target, draft: a folder, an id of the Hugging Face Hub, the name of an embedded model, or `Model(...)`, which says
    how it is run as well. Without a draft the target decodes alone. A draft may have another tokenizer.
    options: of all texts of this pair, unless a call says otherwise (see Options).

    The text is bit for bit that of the same models in workers. Until the pair is closed, PyTorch is set to its
    deterministic algorithms and, with an engine that has threads of its own, to one thread.
    Raises ModelError for a model that cannot be had, OptionError for a setting that is not possible.
    """
    config = _configured({"rpc_timeout_s": CALL_TIMEOUT_S}, options, has_draft=draft is not None)
    wanted = {"target": _model(target)} | ({} if draft is None else {"draft": _model(draft)})
    threads = usable_cores() if draft is None or config.mode == "sync" else threads_beside_another()
    folders = {role: model.folder() for role, model in wanted.items()}
    workers = {}
    for role, model in wanted.items():
        values = {"threads": threads, **model.settings(), "model": folders[role]}
        if role == "draft":
            values["target_tokenizer"] = folders["target"]
        elif config.hidden_states_project == "target" and "draft" in folders:
            values["hidden_states_draft"] = folders["draft"]
        workers[role] = checked(ROLES[role], values, of=f"{role}: ")
    return in_process_pair(workers, {}, config, lambda: TextCodec.load(tokenizer_folder(folders["target"])))


def in_process_pair(
    workers: Mapping[str, WorkerSettings],
    identities: Mapping[str, pb.DescribeReply],
    config: OrchestratorConfig | None = None,
    codec: Callable[[], TextCodec | None] = lambda: None,
) -> Pair:
    """The models that these workers would serve, role -> settings, in this process. The rest: as Pair has it."""
    restore = _torch_settings()
    servicers: dict[str, WorkerServicer] = {}

    def close() -> None:
        for servicer in servicers.values():
            servicer.model.close()
        restore()

    try:
        for role, settings in workers.items():
            servicers[role] = _servicer(role, settings)
        stubs = {role: InProcessStub(servicer) for role, servicer in servicers.items()}
        met = {role: servicer.Describe(pb.DescribeRequest(), None) for role, servicer in servicers.items()}
        base = config or OrchestratorConfig(rpc_timeout_s=CALL_TIMEOUT_S)
        check_stop_tokens(base, met["target"])
        return Pair(stubs.get("draft"), stubs["target"], codec(), base, close, {**met, **identities})
    except BaseException:
        close()
        raise


def connect(
    target: str,
    draft: str | None = None,
    *,
    tokenizer: str | Path | Model | None = None,
    token_file: str | Path | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    tls_name: str | None = None,
    insecure: bool = False,
    connect_timeout_s: float = 10.0,
    **options: Unpack[Options],
) -> Pair:
    """Use a target worker that runs at host:port (grpcs://host:port with TLS), and a draft worker for it.

    tokenizer: the target's, as `load` takes a model; by default the worker is asked for it.
    token_file: a bearer token. tls_ca: whom to trust, tls_cert and tls_key: who we are, tls_name: the name in the
    worker's certificate; docs/security.md. insecure: a token may go over a network without TLS.
    options: of all texts of this pair, unless a call says otherwise (see Options).
    Raises WorkerError when a worker does not answer, UserError when they do not belong together.
    """
    given = {
        **{"draft_address": draft, "target_address": target, "token_file": token_file, "tls_ca": tls_ca},
        **{"tls_cert": tls_cert, "tls_key": tls_key, "tls_name": tls_name, "insecure": insecure or None},
        "connect_timeout_s": connect_timeout_s,
    }
    config = _configured(given, options, has_draft=draft is not None)
    codec = None if tokenizer is None else TextCodec.load(tokenizer_folder(_model(tokenizer).folder()))
    return over_grpc(config, codec, has_draft=draft is not None)


def over_grpc(config: OrchestratorConfig, codec: TextCodec | None, *, has_draft: bool, at_once: int = AT_ONCE) -> Pair:
    """The pair of the workers that the settings name, asked what they are and checked to belong together."""
    access = Access.of(config)
    described = connected_pair(config, None if codec is None else codec.sha256, draft=has_draft)
    with described as workers:
        met = {role: worker.description for role, worker in workers.items()}
        if codec is None:
            codec = _received(workers["target"], config.connect_timeout_s)

    stubs, close = open_stubs({role: worker.address for role, worker in workers.items()}, access)
    return Pair(stubs.get("draft"), stubs["target"], codec, config, close, met, at_once)


class Pair:
    """Writes texts with a draft and a target model; made by `load` and `connect`. Use as a context manager, or `close`.

    Every call takes Options, which hold for that call. Prompts: a string (one user turn, when the model has a chat
    template), chat messages with `role` and `content`, or token ids. Calls from several threads and beside a running
    event loop, as in a notebook, are fine: texts are written on an event loop in a thread of its own.
    """

    def __init__(
        self,
        draft: Any,
        target: Any,
        codec: TextCodec | None,
        config: OrchestratorConfig,
        close: Callable[[], None],
        identities: Mapping[str, pb.DescribeReply] | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        """draft, target: stubs of grpc.aio, or what stands for them; draft may be None. identities: role -> what the
        worker said of itself; another model is refused from then on. at_once: texts written side by side."""
        self.codec = codec
        self._draft, self._target = draft, target
        self._config = config
        self._close = close
        self._identities = dict(identities or {})
        self._controllers: dict[tuple[Any, ...], GammaController | None] = {}
        most = [(worker.limits.sessions, worker.limits.streams) for worker in self._identities.values()]
        self._slots = asyncio.Semaphore(min([at_once, *(limit for each in most for limit in each if limit)]))
        self._closed = False

    @overload
    def generate(self, prompt: Prompts, **options: Unpack[Options]) -> list[GeneratedText]: ...
    @overload
    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> GeneratedText: ...
    def generate(self, prompt: Prompt | Prompts, **options: Unpack[Options]) -> GeneratedText | list[GeneratedText]:
        """The text that continues a prompt, or those of a list of prompts, which are written side by side.

        Raises PromptError and OptionError for what cannot be, WorkerError when a worker failed for good.
        """
        return event_loop().run(self._generate(prompt, options))

    @overload
    async def agenerate(self, prompt: Prompts, **options: Unpack[Options]) -> list[GeneratedText]: ...
    @overload
    async def agenerate(self, prompt: Prompt, **options: Unpack[Options]) -> GeneratedText: ...
    async def agenerate(
        self, prompt: Prompt | Prompts, **options: Unpack[Options]
    ) -> GeneratedText | list[GeneratedText]:
        """As `generate`, to be awaited. Cancelling it stops the text."""
        return await asyncio.wrap_future(event_loop().submit(self._generate(prompt, options)))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> GeneratedStream:
        """The pieces of a text as they come, for `for` and `async for` alike.

        Raises as `generate`: for the prompt and the options at once, for a worker where the text ends.
        """
        if self.codec is None:
            raise OptionError("the target worker gave no tokenizer: say which it is, connect(..., tokenizer=...)")
        config = self._options(options)
        token_ids, after = self._encode(prompt, config)
        return GeneratedStream(
            TextStream(self.codec, config.stop, after),
            token_ids,
            lambda on_tokens: event_loop().submit(self._write(token_ids, after, config, on_tokens)),
        )

    async def acheck(self, timeout_s: float = 5.0) -> None:
        """Ask the workers whether they answer. Raises WorkerError that names one which does not."""

        async def ask() -> None:
            for role, stub in (("target", self._target), ("draft", self._draft)):
                if stub is not None:
                    try:
                        await stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
                    except grpc.RpcError as error:
                        code = error.code().name
                        raise WorkerError(f"the {role} worker does not answer ({code})", code=code) from None

        await asyncio.wrap_future(event_loop().submit(ask()))

    @property
    def config(self) -> OrchestratorConfig:
        """The settings of texts that no call changes."""
        return self._config

    @property
    def target(self) -> pb.DescribeReply | None:
        """What the target worker said of itself; None in this process, until a text was written."""
        return self._identities.get("target")

    def close(self) -> None:
        """Let go of the models or the connections. No text can be written afterwards."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def _generate(
        self, prompt: Prompt | Prompts, options: Mapping[str, Any]
    ) -> GeneratedText | list[GeneratedText]:
        config = self._options(options)
        if config.stop and self.codec is None:
            raise OptionError("the target worker gave no tokenizer: stop strings need connect(..., tokenizer=...)")
        if not _is_list_of_prompts(prompt):
            return await self._write(*self._encode(cast(Prompt, prompt), config), config)
        encoded = [self._encode(one, config) for one in cast(Prompts, prompt)]
        texts = [asyncio.create_task(self._write(*one, config)) for one in encoded]
        try:
            return await asyncio.gather(*texts)
        finally:
            for text in texts:  # when one failed, the others stop
                if not text.cancelling():  # a second time would break off the closing of its streams
                    text.cancel()

    async def _write(
        self, token_ids: list[int], after: list[int], config: OrchestratorConfig, on_tokens: OnTokens | None = None
    ) -> GeneratedText:
        if on_tokens is None and self.codec is not None:
            on_tokens = stops_at(self.codec, config.stop, after)
        result = await self.write_tokens(token_ids, config, on_tokens=on_tokens, controller=self._controller(config))
        text = "" if self.codec is None else self.codec.decode(result.output_tokens, after)
        return GeneratedText(cut_at_stop(text, config.stop), token_ids, result)

    async def write_tokens(
        self,
        token_ids: Sequence[int],
        config: OrchestratorConfig,
        *,
        on_tokens: OnTokens | None = None,
        controller: GammaController | None = None,
    ) -> SpeculativeResult:
        """One text of exactly these settings, on the event loop of the client."""
        async with self._slots:
            return await run_speculative_loop_async(
                self._draft,
                self._target,
                token_ids,
                config,
                on_tokens=on_tokens,
                controller=controller,
                identities=self._identities,
            )

    def _options(self, options: Mapping[str, Any]) -> OrchestratorConfig:
        if self._closed:
            raise UserError("this pair is closed: load or connect it again")
        return with_options(self._config, options, has_draft=self._draft is not None)

    def _encode(self, prompt: Prompt, config: OrchestratorConfig) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, and those that the text continues. An answer, to what the chat template made, is a
        text of its own."""
        token_ids = self._token_ids(prompt, config)
        if self.codec is None or (config.use_chat_template and self.codec.has_template):
            return token_ids, []
        return token_ids, self.codec.continued(token_ids)

    def _token_ids(self, prompt: Prompt, config: OrchestratorConfig) -> list[int]:
        if hasattr(prompt, "tolist"):  # an array or a tensor
            prompt = prompt.tolist()
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return list(cast(Sequence[int], prompt))
        if not isinstance(prompt, str) and not all(isinstance(message, Mapping) for message in prompt):
            raise PromptError("a prompt is a string, a list of messages with role and content, or a list of token ids")
        if self.codec is None:
            raise PromptError("the target worker gave no tokenizer: send token ids, or connect(..., tokenizer=...)")
        return self.codec.encode(cast(str | Sequence[Message], prompt), use_chat_template=config.use_chat_template)

    def _controller(self, config: OrchestratorConfig) -> GammaController | None:
        """What chooses gamma when it is `auto`; it remembers from text to text."""
        if config.gamma != "auto":
            return None
        key = config.mode, config.fan_out, config.shape, config.p_min
        if key not in self._controllers:
            self._controllers[key] = gamma_controller(config)
        return self._controllers[key]


def _is_list_of_prompts(prompt: Prompt | Prompts) -> bool:
    """A list whose items are prompts themselves, not tokens or messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)


def _received(target: Connection, timeout_s: float) -> TextCodec | None:
    """The tokenizer of a target worker, from itself; None when it gives none."""
    described = target.stub.Describe(pb.DescribeRequest(with_tokenizer=True), timeout=timeout_s)
    if not described.tokenizer_files:
        return None
    codec = TextCodec.unpack(described.tokenizer_files)
    check_tokenizers({"its tokenizer as received": codec.sha256, "the target worker": described.tokenizer_sha256})
    return codec


def _model(given: str | Path | Model) -> Model:
    return given if isinstance(given, Model) else Model(given)


def _configured(given: Mapping[str, Any], options: Mapping[str, Any], *, has_draft: bool) -> OrchestratorConfig:
    """The settings of a pair; with nothing to draft from, gamma is 0, unless it is asked to be more."""
    base = OrchestratorConfig.load({name: value for name, value in given.items() if value is not None})
    drafts = has_draft or options.get("lookup", base.lookup)
    return with_options(base, options if drafts else {"gamma": 0, **options}, has_draft=has_draft)


def _servicer(role: str, config: WorkerSettings) -> WorkerServicer:
    """A model with the handlers of its worker."""
    try:
        servicer = load_servicer(config)
    except OptionError:
        raise
    except UserError as error:
        raise ModelError(f"{role}: {error}") from error
    servicer.spans = WorkerSpans.of(role)
    return servicer


def _torch_settings() -> Callable[[], None]:
    """What puts PyTorch's settings of the whole process back to what they are now."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()

    def restore() -> None:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

    return restore
