"""What a draft is distilled with. Environment: SPECSPLIT_DISTILL_*."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from specsplit.settings.base import setting
from specsplit.settings.measure import IntervalSettings
from specsplit.settings.run import MAX_GAMMA, MAX_SEED, MAX_TEMPERATURE
from specsplit.settings.worker import ComputeSettings, Dtype, Engine, Layer

Kind = Literal["independent", "hidden_states"]
AnswerTemperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)]


class DistillSettings(ComputeSettings):
    """What the steps share."""

    prefix = "SPECSPLIT_DISTILL_"

    seed: int = setting(0, "Seed of everything that is drawn at random.", ge=0, le=MAX_SEED)
    kind: Kind = setting(
        "independent",
        "What is made: independent is a small model of the target's layers, hidden_states a head that reads the "
        "target's hidden states (EAGLE-3).",
        example="hidden_states",
        note="independent | hidden_states",
    )


def _no_layer_twice(value: list[int] | None) -> list[int] | None:
    if value is not None and len(set(value)) < len(value):
        raise ValueError("a layer stands there twice")
    return value


class WritingSettings(DistillSettings):
    """The text that the target writes to train the draft on."""

    tokens: int = setting(
        20_000_000,
        "Tokens of answers that the target writes to train on, at least.",
        example=50_000_000,
        note="of answers",
        heading="the text that the target writes",
        ge=1,
    )
    user_temperature: float = setting(
        1.0, "Temperature that user turns are sampled at.", example=0.8, gt=0, le=MAX_TEMPERATURE
    )
    answer_temperature: list[AnswerTemperature] = setting(
        [0.0, 0.7, 1.0],
        "Temperatures that answers are sampled at, batch by batch in turn; 0 is greedy.",
        example=[0],
        note="batch by batch in turn; 0 = greedy",
        min_length=1,
    )
    max_user_tokens: int = setting(128, "Longest user turn, in tokens; a longer one is cut.", example=64, ge=1)
    max_answer_tokens: int = setting(256, "Longest answer, in tokens; a longer one is cut.", example=512, ge=1)
    write_batch: int = setting(
        512,
        "Texts written at once; each batch is a file, and what an interrupted run goes on from.",
        example=16,
        note="texts at once",
        ge=1,
    )
    top_k: int = setting(
        16,
        "Likeliest tokens of the target whose probabilities the draft learns at each position; all others count as "
        "one.",
        example=32,
        note="likeliest tokens that the draft learns at each position",
        ge=1,
    )
    state_layers: list[Layer] | None = setting(
        None,
        "With kind hidden_states: layers of the target, counted from 0, whose inputs the head reads; null: 2, the "
        "middle one, and the third from the end.",
        example=[1, 9, 17],
        note="whose inputs a hidden_states head reads; null: 2, half, third from the end",
        min_length=1,
    )
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Number format in which the target writes: auto is bfloat16 on a GPU and float32 on a CPU.",
        example="float32",
        note="bfloat16 on a GPU, float32 on a CPU",
    )

    _different = field_validator("state_layers")(_no_layer_twice)

    def what_decides(self) -> dict[str, Any]:
        """Everything that decides the next batch; not `tokens`, so that more of the same text goes on from it."""
        return self.model_dump(exclude={"tokens", "device"})


class TrainingSettings(DistillSettings):
    """The draft, and how it is trained."""

    layers: int = setting(
        2,
        "Decoder layers of the draft, taken over from the target, the first and the last of it and others evenly "
        "between.",
        example=4,
        note="of the target's, spread evenly",
        heading="the draft",
        ge=1,
    )
    take_layers: list[Layer] | None = setting(
        None,
        "Which layers of the target, counted from 0, instead of how many; null leaves it to layers.",
        example=[0, 1, 29],
        note="which, instead of how many: [0, 29]",
        min_length=1,
    )
    vocab_size: int | None = setting(
        None,
        "Tokens that the draft knows, the most frequent ones of the text; null is all of the target's.",
        example=16384,
        note="most frequent tokens; null = all",
        ge=2,
    )
    unroll_steps: int = setting(
        3,
        "With kind hidden_states: tokens in a row that the head learns to draft from its own states.",
        example=5,
        note="that a hidden_states head learns to draft in a row",
        ge=1,
        le=MAX_GAMMA,
    )
    draft_dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", "Number format that the draft is saved in.", example="float16"
    )
    epochs: int = setting(4, "How often all texts are gone through.", example=10, heading="its training", ge=1)
    batch_size: int = setting(64, "Texts in a step of the training.", example=8, note="texts a step", ge=1)
    learning_rate: float = setting(
        1e-3, "Peak of the learning rate (AdamW); it rises over the warm-up and falls as a cosine.", example=5e-4, gt=0
    )
    warmup_share: float = setting(0.03, "Share of the steps in which the learning rate rises.", example=0.1, ge=0, lt=1)
    weight_decay: float = setting(0.01, "Weight decay (AdamW), on matrices.", example=0.1, ge=0)
    clip_norm: float = setting(1.0, "Largest norm of a gradient; a larger one is scaled down to it.", example=0.5, gt=0)
    validation_texts: int = setting(256, "Texts that are not trained on but evaluated on.", example=16, ge=1)
    evaluate_every: int = setting(200, "Steps from one evaluation to the next.", example=50, note="steps", ge=1)
    checkpoint_every: int = setting(
        200,
        "Steps from one checkpoint to the next; an interrupted training goes on from the last.",
        example=1000,
        operates=True,
        ge=1,
    )

    _different = field_validator("take_layers")(_no_layer_twice)


class AcceptanceSettings(ComputeSettings, IntervalSettings):
    """How the acceptance of a draft is measured."""

    gamma: int = setting(
        8,
        "Positions of a draft at which acceptance is measured, on the prompts of the dataset.",
        example=5,
        heading="its acceptance, on the prompts of the dataset",
        ge=1,
        le=MAX_GAMMA,
    )
    max_output_tokens: int = setting(64, "Most tokens of a text.", ge=1)
    limit: int | None = setting(None, "Take a slice of this many prompts; null: all.", ge=1)
    use_chat_template: bool = setting(True, "Wrap the prompts in the model's chat template, when it has one.")
    target_dtype: Dtype = setting("float32", "Number format of the target, as in the sweep.")
    draft_dtype: Dtype = setting("bfloat16", "Number format of the draft.")
    engine: Engine = setting("auto", "What runs the models, as in the sweep.")
