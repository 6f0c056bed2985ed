"""What a pair gives back: a text with its figures, and a text that is still being written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Self

from specsplit.client.result import Failure, Round, SpeculativeResult
from specsplit.decoding.measures import acceptance_length, acceptance_rate, per_token_ms
from specsplit.errors import counted
from specsplit.models.tokenizer import TextStream


class GeneratedText(str):
    """A generated text: a string, with what was measured while it was written. Times are milliseconds.

    token_ids: the generated tokens, the end-of-text token left out. prompt_token_ids: what they continue.
    rounds: each draft and its verification (`Round`: drafted, accepted, times). finish_reason: "eos", "stop", "length",
    "max_rounds" or "context". ttft_ms: until the first token, prompt included; None when none came. total_ms: until the
    last. failures: of workers that were got over.
    """

    token_ids: list[int]
    prompt_token_ids: list[int]
    rounds: list[Round]
    finish_reason: str
    ttft_ms: float | None
    total_ms: float
    failures: list[Failure]
    _result: SpeculativeResult

    def __new__(cls, text: str, prompt_token_ids: Sequence[int], result: SpeculativeResult) -> Self:
        self = super().__new__(cls, text)
        self._result = result
        self.token_ids, self.prompt_token_ids = result.output_tokens, list(prompt_token_ids)
        self.rounds, self.failures = result.counted_rounds, result.failures
        self.finish_reason, self.ttft_ms, self.total_ms = result.finish_reason, result.ttft_ms, result.total_ms
        return self

    def __getnewargs__(self) -> tuple[str, list[int], SpeculativeResult]:  # type: ignore[override]
        return str(self), self.prompt_token_ids, self._result

    @property
    def acceptance_rate(self) -> float | None:
        """Mean of accepted / drafted over the rounds that drafted something; None when none did."""
        return acceptance_rate(self.rounds)

    @property
    def acceptance_length(self) -> float | None:
        """1 + accepted tokens / verifications, as in the tables of a sweep; None when nothing was drafted."""
        return acceptance_length(self.rounds)

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each place in a draft, from the first: how often its token was accepted once all before it were."""
        rates = []
        for place in range(max((r.drafted for r in self.rounds), default=0)):
            reached = [r.accepted > place for r in self.rounds if r.drafted > place and r.accepted >= place]
            if not reached:
                break
            rates.append(sum(reached) / len(reached))
        return rates

    @property
    def tokens_per_second(self) -> float:
        """Over the whole text, the pass over the prompt included."""
        return len(self.token_ids) / self.total_ms * 1e3 if self.total_ms else 0.0

    def summary(self) -> str:
        """The figures in one line."""
        tokens, rounds = len(self.token_ids), self.rounds
        drafted, accepted = sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
        parts = [f"{counted(tokens, 'token')} in {counted(len(rounds), 'round')}", f"ended by {self.finish_reason}"]
        if drafted:
            parts.append(f"accepted {accepted} of {drafted} drafted ({accepted / drafted:.0%})")
        if self.ttft_ms is not None:
            parts.append(f"TTFT {self.ttft_ms:.0f} ms")
        if (tpot := per_token_ms(self.total_ms, self.ttft_ms, tokens)) is not None:
            parts.append(f"TPOT {tpot:.1f} ms")
        parts += [f"{f.worker} worker failed in round {f.round} ({f.code}, {f.action})" for f in self.failures]
        return ", ".join(parts)


_Item = tuple[str, list[int]]  # text and the tokens that were written since the one before


class Piece(str):
    """A piece of a text. token_ids: the tokens that were written since the piece before it."""

    token_ids: list[int]


class GeneratedStream:
    """A text as it is written: iterate over its pieces with `for` or `async for`; `text` is the whole of it.

    Leaving early, by `close` or the end of a `with` block, or dropping the stream, stops the text.
    """

    def __init__(
        self,
        decoder: TextStream,
        prompt_token_ids: Sequence[int],
        start: Callable[[Callable[[list[int]], int | None]], Future[GeneratedText]],
    ) -> None:
        """start: begins the text and returns its future; it is given what to call with each round's tokens."""
        self.prompt_token_ids = list(prompt_token_ids)
        self._token_ids: list[int] = []  # of the next piece
        pieces = _Pieces()

        def ended(_: Future[GeneratedText]) -> None:
            pieces.put((decoder.feed([], last=True), []))
            pieces.put(None)

        def on_tokens(tokens: list[int]) -> int | None:
            piece, kept = decoder.take(tokens)
            pieces.put((piece, tokens[:kept]))
            return kept

        self._pieces = pieces
        self._ended = False
        # What is called from the event loop does not refer to this object: dropping it ends it.
        self._future = start(on_tokens)
        self._future.add_done_callback(ended)

    @property
    def text(self) -> GeneratedText:
        """The whole text; waits for its end. Raises WorkerError when it failed."""
        return self._future.result()

    def close(self) -> None:
        """Stop writing; the pieces that are there already are dropped."""
        self._ended = True
        self._future.cancel()
        self._pieces.put(None)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while not self._ended:
            if (piece := self._took(self._pieces.get())) is not None:
                return piece
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        while not self._ended:
            if (piece := self._took(await self._pieces.aget())) is not None:
                return piece
        raise StopAsyncIteration

    def _took(self, item: _Item | None) -> Piece | None:
        """A piece that is not empty. At the end of the text, raises what went wrong with it."""
        if item is None:
            if not self._ended:
                self._ended = True
                self._future.result()
            return None
        self._token_ids += item[1]
        if not item[0]:
            return None
        piece = Piece(item[0])
        piece.token_ids, self._token_ids = self._token_ids, []
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if future := getattr(self, "_future", None):
            future.cancel()


class _Pieces:
    """A queue of texts and their tokens that a thread or an event loop waits at; None is the end."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, piece: _Item | None) -> None:
        self._queue.put(piece)
        if waiting := self._waiting:
            loop, event = waiting
            with suppress(RuntimeError):  # that loop is closed, so nothing waits for it
                loop.call_soon_threadsafe(event.set)

    def get(self) -> _Item | None:
        return self._queue.get()

    async def aget(self) -> _Item | None:
        event = asyncio.Event()
        self._waiting = asyncio.get_running_loop(), event
        while True:
            event.clear()
            try:  # after the event is in place, so that no piece is missed
                return self._queue.get_nowait()
            except Empty:
                await event.wait()
