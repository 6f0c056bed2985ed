"""What a draft is distilled with. Each field is a flag of `specsplit distill` and a variable SPECSPLIT_DISTILL_*."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from specsplit.settings.processes import Settings

ENVIRONMENT = SettingsConfigDict(env_prefix="SPECSPLIT_DISTILL_")
Temperature = Annotated[float, Field(ge=0, le=100)]


class DistillSettings(Settings):
    """What the steps share."""

    model_config = ENVIRONMENT

    seed: int = Field(0, ge=0, lt=1 << 32, description="of everything that is drawn at random")
    device: str = Field("auto", description="auto | cpu | cuda | cuda:N")
    threads: int | None = Field(
        None, ge=1, description="compute threads, which decide the last bits on a CPU; default: every core it may use"
    )


class WritingSettings(DistillSettings):
    """The text that the target writes to train the draft on."""

    tokens: int = Field(20_000_000, ge=1, description="tokens of answers to write, at least")
    user_temperature: float = Field(1.0, gt=0, le=100, description="that user turns are sampled at")
    answer_temperature: list[Temperature] = Field(
        [0.0, 0.7, 1.0], min_length=1, description="that answers are sampled at, batch by batch in turn; 0 = greedy"
    )
    max_user_tokens: int = Field(128, ge=1, description="longest user turn; a longer one is cut")
    max_answer_tokens: int = Field(256, ge=1, description="longest answer; a longer one is cut")
    write_batch: int = Field(512, ge=1, description="texts written at once; each batch is a file")
    top_k: int = Field(16, ge=1, description="likeliest tokens whose probabilities are kept at each position")
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format of the target: auto is bfloat16 on a GPU, float32 on a CPU"
    )

    def what_decides(self) -> dict[str, Any]:
        """Everything that decides the next batch; not `tokens`, so that more of the same text goes on from it."""
        return self.model_dump(exclude={"tokens", "device"})


class TrainingSettings(DistillSettings):
    """The draft, and how it is trained."""

    layers: int = Field(2, ge=1, description="decoder layers taken over from the target, spread evenly")
    take_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="which layers, from 0, instead of how many"
    )
    vocab_size: int | None = Field(
        None, ge=2, description="tokens that the draft knows, the most frequent ones; default: all of the target's"
    )
    draft_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="number format that the draft is saved in"
    )
    epochs: int = Field(4, ge=1, description="times that all texts are gone through")
    batch_size: int = Field(64, ge=1, description="texts a step")
    learning_rate: float = Field(1e-3, gt=0, description="its peak; it rises over the warm-up, then falls as a cosine")
    warmup_share: float = Field(0.03, ge=0, lt=1, description="of the steps, in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW, on matrices")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a gradient; a larger one is scaled down")
    validation_texts: int = Field(256, ge=1, description="texts that are not trained on")
    evaluate_every: int = Field(200, ge=1, description="steps from one evaluation to the next")
    checkpoint_every: int = Field(200, ge=1, description="steps from one checkpoint to the next")

    @field_validator("take_layers")
    @classmethod
    def _different(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a layer stands there twice")
        return value
