"""Training the draft on the target's probabilities: AdamW, a cosine, checkpoints from which it goes on bit for bit."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from specsplit.distill.losses import Learner
from specsplit.distill.process import Team
from specsplit.distill.shards import HEADER, Text, batches, replace_tensors
from specsplit.errors import UserError, counted
from specsplit.io import json_sha256
from specsplit.settings.distill import TrainingSettings

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")
LOSS_COLUMNS = ("step", "tokens", "learning_rate", "loss", "grad_norm", "validation_loss", "validation_agreement")
Row = dict[str, Any]  # of LOSS_COLUMNS, those that are known
AHEAD = 2  # batches that are made ready beside the training


def split_texts(texts: Sequence[Text], validation: int, seed: int) -> tuple[list[Text], list[Text]]:
    """(to train on, to evaluate on), drawn by the seed. Raises UserError when nothing is left to train on."""
    if validation >= len(texts):
        raise UserError(
            f"validation_texts {validation}: there are {counted(len(texts), 'text')}, and some must be left to train "
            "on. Write more (tokens), or hold back fewer"
        )
    order = np.random.default_rng([seed, len(texts)]).permutation(len(texts)).tolist()
    held = set(order[:validation])
    return [t for i, t in enumerate(texts) if i not in held], [t for i, t in enumerate(texts) if i in held]


def learning_rate(step: int, steps: int, settings: TrainingSettings) -> float:
    """Of step `step`, counted from 1: a linear rise over the warm-up, then a cosine that ends near 0 at `steps`."""
    warmup = math.ceil(settings.warmup_share * steps)
    if step <= warmup:
        return settings.learning_rate * step / (warmup + 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, steps - warmup)))


def hash_recipe(
    settings: TrainingSettings, data_sha256: str, target: Mapping[str, Any], hardware: Mapping[str, Any], code: str
) -> str:
    """Hash of everything that decides the weights. hardware: of `describe_hardware`; code: hash of the source files.

    Another device, number of threads, PyTorch or other code goes on with other numbers.
    """
    decides = settings.model_dump(exclude={"device", "draft_dtype", "checkpoint_every"})
    return json_sha256({"settings": decides, "data": data_sha256, "target": target, "hardware": hardware, "code": code})


class Trainer:
    """Trains what `learner` holds, in place.

    On a CPU each thread takes its part of a batch, alone: that is faster than all together at every product.
    recipe_sha256: of everything that decides the result; a checkpoint of another one is not gone on from. checkpoint:
    its file; None = none are written. rows: the loss curve, LOSS_COLUMNS; tokens are those of answers so far, losses
    are nats a token, grad_norm is that before clipping.
    """

    def __init__(
        self,
        learner: Learner,
        texts: Sequence[Text],
        settings: TrainingSettings,
        *,
        recipe_sha256: str = "",
        checkpoint: Path | None = None,
    ) -> None:
        self.learner, self.settings = learner, settings
        self.train_texts, self.validation_texts = split_texts(texts, settings.validation_texts, settings.seed)
        self._lengths = [len(text.tokens) for text in self.train_texts]
        self._parameters = learner.parameters
        matrices = [p for p in self._parameters.values() if p.dim() > 1]
        vectors = [p for p in self._parameters.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS)
        self._team = Team(learner.device)
        self._recipe, self._checkpoint = recipe_sha256, checkpoint
        self.steps = sum(1 for epoch in range(settings.epochs) for _ in self._epoch(epoch))
        self.step = self.resumed_at = 0
        self.seconds = 0.0  # of training, in all calls
        self.learnt = 0  # tokens of answers
        self.rows: list[Row] = []

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self._parameters.values())

    @property
    def columns(self) -> tuple[str, ...]:
        """Of `rows`."""
        return LOSS_COLUMNS + self.learner.columns

    def run(self, on_step: Callable[[Row], None] = lambda row: None) -> None:
        """Train to the end, from the checkpoint where there is one. on_step(row): after each step.

        Raises UserError when the loss is no number any more.
        """
        self._load_checkpoint()
        started, before = time.monotonic(), self.seconds
        if not self.rows:
            self._note({"step": 0, "tokens": 0, **self.evaluate()}, on_step)
        for parts, answered in self._batches_from(self.step):
            row = self._learn(parts, answered)
            if self.step % self.settings.evaluate_every == 0 or self.step == self.steps:
                row |= self.evaluate()
            self._note(row, on_step)
            self.seconds = before + time.monotonic() - started
            if self.step % self.settings.checkpoint_every == 0:
                self._save_checkpoint()

    def evaluate(self) -> Row:
        """On the texts that are not trained on: mean divergence, nats, and share of positions at which the likeliest
        tokens agree."""
        size, texts = self.settings.batch_size, sorted(self.validation_texts, key=lambda text: len(text.tokens))

        @torch.no_grad()
        def judge(part: Sequence[Text]) -> dict[str, tuple[float, int]]:
            return self.learner.evaluate(self.learner.collate(part))

        found = self._team.map(judge, [texts[start : start + size] for start in range(0, len(texts), size)])
        sums = {
            name: [sum(column) for column in zip(*(part[name] for part in found), strict=True)] for name in found[0]
        }
        return {name: total / count for name, (total, count) in sums.items() if count}

    def _epoch(self, epoch: int) -> Iterator[list[int]]:
        return batches(self._lengths, self.settings.batch_size, self.settings.seed, epoch)

    def _batches_from(self, step: int) -> Iterator[tuple[list[Any], int]]:
        """The parts of every batch after `step`, made ready beside the training; and the tokens of answers in it."""
        indices = islice(chain.from_iterable(map(self._epoch, range(self.settings.epochs))), step, None)
        waiting: deque[tuple[Future[list[Any]], int]] = deque()

        def prepare(texts: Sequence[Text]) -> list[Any]:
            return [self.learner.collate(part) for part in self._team.split(texts)]

        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as loader:
            for batch in indices:
                texts = [self.train_texts[index] for index in batch]
                waiting.append((loader.submit(prepare, texts), sum(text.answered for text in texts)))
                if len(waiting) > AHEAD:
                    parts, answered = waiting.popleft()
                    yield parts.result(), answered
            for parts, answered in waiting:
                yield parts.result(), answered

    def _learn(self, parts: Sequence[Any], answered: int) -> Row:
        self.step += 1
        rate = learning_rate(self.step, self.steps, self.settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        parameters = list(self._parameters.values())

        def differentiate(part: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            loss = self.learner.loss(part) / answered
            return loss.detach(), torch.autograd.grad(loss, parameters)

        def update(results: Sequence[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]) -> tuple[float, float]:
            (loss, gradients), *others = results
            for part_loss, part_gradients in others:
                loss = loss + part_loss
                torch._foreach_add_(gradients, part_gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
            if not torch.isfinite(norm):
                raise UserError(f"step {self.step}: the loss is {float(loss)}; train with a lower learning_rate")
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            return float(loss), float(norm)

        results = self._team.map(differentiate, parts)
        loss, norm = self._team.map(update, [results])[0]
        self.learnt += answered
        return {"step": self.step, "tokens": self.learnt, "learning_rate": rate, "loss": loss, "grad_norm": norm}

    def _note(self, row: Row, on_step: Callable[[Row], None]) -> None:
        self.rows.append(row)
        on_step(row)

    # ---- checkpoints: safetensors, which run no code when they are read

    def _save_checkpoint(self) -> None:
        if self._checkpoint is None:
            return
        state = self._optimizer.state
        tensors = {f"param.{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= {f"{m}.{name}": state[p][m] for name, p in self._parameters.items() for m in MOMENTS}
        header = {"recipe": self._recipe, "step": self.step, "seconds": self.seconds, "learnt": self.learnt}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        replace_tensors(self._checkpoint, tensors, {HEADER: json.dumps({**header, "rows": self.rows})})

    def _load_checkpoint(self) -> None:
        """Go on from the checkpoint, when there is one of this recipe; another one is left to be written over."""
        if self._checkpoint is None or not self._checkpoint.is_file():
            return
        try:
            with safe_open(self._checkpoint, framework="pt") as kept:
                header = json.loads(kept.metadata()[HEADER])
                if header["recipe"] != self._recipe:
                    return
                with torch.no_grad():
                    for name, p in self._parameters.items():
                        p.copy_(kept.get_tensor(f"param.{name}"))
                        moments = {m: kept.get_tensor(f"{m}.{name}").to(p.device) for m in MOMENTS}
                        self._optimizer.state[p] = {"step": torch.tensor(float(header["step"])), **moments}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._checkpoint}: not a readable checkpoint ({error}); delete it") from None
        self.step = self.resumed_at = header["step"]
        self.seconds, self.learnt, self.rows = header["seconds"], header["learnt"], header["rows"]
