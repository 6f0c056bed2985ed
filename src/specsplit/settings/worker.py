"""Settings of the two workers. Environment: SPECSPLIT_DRAFT_*, SPECSPLIT_TARGET_*."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from specsplit.settings.access import AccessSettings
from specsplit.settings.base import Settings, setting

Engine = Literal["auto", "fused", "graphs", "transformers"]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]
DraftDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
FloatDtype = Literal["float32", "bfloat16", "float16"]
Layer = Annotated[int, Field(ge=0)]
Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", json_schema_extra={"title": "auto, cpu, cuda or cuda:N"})
]


WAITING_CALLS = 256  # that wait for one of max_calls, or for their client


class ComputeSettings(Settings):
    """Where and with how many threads a model runs."""

    device: Device = setting(
        "auto",
        "Where the models run; `auto` takes a GPU when there is one.",
        example="cuda:0",
        note="auto | cpu | cuda | cuda:N",
    )
    threads: int | None = setting(
        None,
        "Compute threads, which decide the last bits on a CPU; null takes every core it may use.",
        example=2,
        note="compute threads of each worker; null = every core, or half of them where both compute at once",
        ge=1,
    )


class WorkerSettings(AccessSettings, ComputeSettings):
    """What both workers share. A worker with a certificate speaks TLS; with tls_ca as well, clients need one too."""

    model: Path | None = setting(None, "Folder of a prepared model, or any local Hugging Face model.")
    host: str = setting("127.0.0.1", "Address to listen on.", operates=True)
    port: int = setting(0, "Port to listen on; 0 is any free port.", operates=True, ge=0, le=65535)
    dtype: DraftDtype = setting("float32", "Number format of its weights and its cache.", example="bfloat16")
    engine: Engine = setting(
        "auto",
        "What runs the models: fused is the engine for Llama-type models (Llama, Mistral, Qwen2, Qwen3) on the CPU, "
        "graphs records the passes of any model as CUDA graphs, transformers runs any as it is; auto takes the fast "
        "one of the device where it can.",
        example="transformers",
        note="auto | fused (Llama-type models on the CPU) | graphs (on a GPU) | transformers",
    )
    max_context: int = setting(
        2048,
        "Tokens of KV cache a session: prompt, output and draft together.",
        example=4096,
        note="tokens of KV cache a session",
        ge=16,
    )
    max_sessions: int = setting(
        8,
        "Sessions that a worker keeps at once. The least recently used idle one goes first; while all are in use, who "
        "comes waits in line.",
        example=32,
        operates=True,
        ge=1,
    )
    session_ttl_s: float = setting(
        600.0, "Seconds after which an idle session is dropped.", example=60, operates=True, gt=0
    )
    session_wait_s: float = setting(
        60.0, "Seconds that a stream waits in line for a session, at most.", operates=True, ge=0
    )
    session_slice_s: float = setting(
        10.0,
        "Seconds that a session in use is its stream's while others wait in line. Sessions change hands so seldom that "
        "reading texts anew takes a twentieth of the worker's time at most.",
        operates=True,
        gt=0,
    )
    stream_idle_s: float = setting(
        120.0, "Seconds after which a stream that says nothing is ended.", operates=True, gt=0
    )
    max_calls: int | None = setting(
        None,
        "Calls and streams that are worked on at once, others wait; null: 16 more than twice max_sessions.",
        operates=True,
        ge=1,
    )
    cache_memory_mb: int | None = setting(
        None,
        "MiB for the caches of a worker's sessions: fewer sessions are kept where they do not fit; null is half of "
        "what is free once the model is loaded.",
        example=4096,
        note="for the caches of all sessions; null = half of what is free",
        operates=True,
        ge=1,
    )
    max_tree_nodes: int = setting(256, "Largest tree drafted or verified.", ge=1)
    max_message_mb: int = setting(
        16,
        "MiB of a message, at most; a proxy in between may take less. Clients keep within it.",
        operates=True,
        ge=1,
        le=16,
    )
    seed: int = setting(0, "Seed of torch in this process.")
    drain_s: float = setting(3.0, "Seconds that running calls get to finish after SIGTERM.", operates=True, ge=0)
    metrics_port: int | None = setting(
        None, "Port for Prometheus; 0 is any free port; null: none.", operates=True, ge=0, le=65535
    )
    metrics_host: str = setting("127.0.0.1", "Address to show the metrics on.", operates=True)

    @property
    def call_limit(self) -> int:
        return self.max_calls or 2 * self.max_sessions + 16

    @property
    def stream_limit(self) -> int:
        """Calls and streams that are open at once, those that wait for a place or for their client included."""
        return self.call_limit + WAITING_CALLS

    @property
    def message_bytes(self) -> int:
        return self.max_message_mb << 20


class DraftWorkerConfig(WorkerSettings):
    """The draft worker."""

    prefix = "SPECSPLIT_DRAFT_"

    port: int = setting(50051, "Port to listen on; 0 is any free port.", operates=True, ge=0, le=65535)
    dtype: DraftDtype = setting(
        "auto",
        "Number format of its weights and its cache; `int8` is for the CPU: 8-bit weights, the rest bfloat16. `auto` "
        "is int8 on the CPU and bfloat16 on a GPU, or float16 on one that does not compute in bfloat16.",
        example="bfloat16",
        note="int8 on the CPU, bfloat16 on a GPU",
    )
    skip_layers: list[Layer] = setting([], "Decoder layers to leave out, counted from 0: a cheaper, weaker draft.")
    skip_layers_file: Path | None = setting(None, "Instead of skip_layers: a file that `specsplit pick-layers` wrote.")
    target_tokenizer: Path | None = setting(
        None,
        "Folder of the target, when the draft has another tokenizer: shared tokens are drafted. A head that reads "
        "hidden states takes from it what it lacks: tokenizer, input embedding.",
    )


class TargetWorkerConfig(WorkerSettings):
    """The target worker."""

    prefix = "SPECSPLIT_TARGET_"

    port: int = setting(50052, "Port to listen on; 0 is any free port.", operates=True, ge=0, le=65535)
    dtype: Dtype = setting("float32", "Number format of its weights and its cache.", example="bfloat16")
    ignore_model_settings: bool = setting(
        False,
        "Run a target whose generation_config.json has settings that would change greedy text (repetition_penalty, "
        "suppress_tokens, ...), without them; otherwise it is refused.",
        example=True,
        note="run a target without the penalties of its generation_config.json; else it is refused",
    )
    hidden_states_draft: Path | None = setting(
        None, "Folder of a draft that reads hidden states, whose `fc` this worker is to apply (hidden_states_project)."
    )


class LaunchSettings(Settings):
    """How a worker is started in the background."""

    startup_timeout_s: float = setting(
        300.0, "Seconds that a worker may take to load its model and be ready.", example=900, operates=True, gt=0
    )
    attach: str | None = setting(
        None,
        "Use this running worker instead, host:port or an address file; it is checked and never stopped.",
        operates=True,
    )


ROLES: dict[str, type[WorkerSettings]] = {"draft": DraftWorkerConfig, "target": TargetWorkerConfig}
