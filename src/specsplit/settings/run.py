"""Settings of the three processes. Each field is a flag of the command line and an environment variable.

Order of precedence: flag, environment variable (SPECSPLIT_DRAFT_*, SPECSPLIT_TARGET_*, SPECSPLIT_ORCH_*), default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from specsplit.decoding.theory import PipelineMode
from specsplit.decoding.tree import TreeShape
from specsplit.errors import UserError

Engine = Literal["auto", "fused", "graphs", "transformers"]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]
SamplingMethod = Literal["coupled", "rejection"]
DraftFailure = Literal["reconnect", "target_alone", "fail"]
MAX_GAMMA = 64
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0  # but for 0: beyond them logits overflow, or say nothing
AUTO_GAMMA_LIMIT = 16  # drafts longer than this pay nowhere that was measured


class Settings(BaseSettings):
    """Reads SPECSPLIT_<ROLE>_<FIELD>; lists and null are written as JSON."""

    model_config = SettingsConfigDict(extra="forbid", env_parse_none_str="null", env_ignore_empty=True)
    short_flags: ClassVar[Mapping[str, str]] = {}  # field -> its flag, where that is not the field's own name

    @classmethod
    def flag(cls, field: str) -> str:
        """The command-line flag of a field."""
        return cls.short_flags.get(field, f"--{field.replace('_', '-')}")

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable of a field."""
        return f"{cls.model_config['env_prefix']}{field.upper()}"

    @classmethod
    def load(cls, flags: Mapping[str, Any] | None = None) -> Self:
        """Settings from flags (None = not given), then the environment, then defaults.

        Raises UserError that names the flag, the variable and what is wanted.
        """
        given = {key: value for key, value in (flags or {}).items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                if not problem["loc"]:  # fields that do not go together
                    lines.append(problem["msg"])
                    continue
                field = str(problem["loc"][0])
                lines.append(f"{cls.flag(field)} / {cls.variable(field)} = {problem['input']!r}: {problem['msg']}")
            raise UserError("\n".join(lines)) from error
        except SettingsError as error:  # a variable that should hold JSON does not
            malformed = [cls.variable(field) for field in cls.model_fields if f'"{field}"' in str(error)]
            raise UserError(f"{', '.join(malformed)}: not JSON; write a list as [1, 2] or null") from error


class AccessSettings(Settings):
    """Who may call a worker, and how a client shows that it may."""

    tls_cert: Path | None = Field(None, description="own certificate, PEM, with those between it and the authority")
    tls_key: Path | None = Field(None, description="key of that certificate, PEM, unencrypted")
    tls_ca: Path | None = Field(
        None, description="certificates, PEM, of the authority that the other side's certificate must be from"
    )
    token_file: Path | None = Field(
        None, description="bearer token; a worker takes any of several, one a line. SPECSPLIT_TOKEN holds one itself"
    )
    insecure: bool = Field(False, description="allow another address than loopback, or a token to one, without TLS")


class WorkerSettings(AccessSettings):
    """What both workers share. A worker with a certificate speaks TLS; with tls_ca as well, clients need one too."""

    model: Path | None = Field(None, description="folder of a prepared model, or any local Hugging Face model")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=65535, description="port to listen on; 0 = any free port")
    dtype: Dtype = Field("float32", description="float32 | bfloat16 | float16 | int8 (CPU)")
    device: str = Field("auto", description="auto | cpu | cuda | cuda:N")
    engine: Engine = Field(
        "auto",
        description="fused (fast, Llama-type models on the CPU) | graphs (CUDA graphs of most models) | "
        "transformers (any) | auto: the fast one of the device where it can",
    )
    threads: int | None = Field(None, ge=1, description="compute threads; default: every core it may use")
    max_context: int = Field(2048, ge=16, description="tokens a session can hold, drafted ones included")
    max_sessions: int = Field(8, ge=1, description="sessions kept; the least recently used idle one goes first")
    session_ttl_s: float = Field(600.0, gt=0, description="seconds after which an idle session is dropped")
    max_calls: int | None = Field(
        None, ge=1, description="calls and streams at once; default: 16 more than twice max_sessions"
    )
    cache_memory_mb: int | None = Field(
        None, ge=1, description="MiB for the caches of all sessions; default: half of what is free after loading"
    )
    max_tree_nodes: int = Field(256, ge=1, description="largest tree drafted or verified")
    seed: int = Field(0, description="seed of torch in this process")
    drain_s: float = Field(3.0, ge=0, description="seconds that running calls get to finish after SIGTERM")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port for Prometheus; 0 = any free port; default: none"
    )
    metrics_host: str = Field("127.0.0.1", description="address to show the metrics on")

    @property
    def call_limit(self) -> int:
        return self.max_calls or 2 * self.max_sessions + 16


class DraftWorkerConfig(WorkerSettings):
    """The draft worker. Environment: SPECSPLIT_DRAFT_*."""

    model_config = SettingsConfigDict(env_prefix="SPECSPLIT_DRAFT_")

    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0 = any free port")
    dtype: Dtype = Field("bfloat16", description="float32 | bfloat16 | float16 | int8 (CPU)")
    skip_layers: list[int] = Field(default_factory=list, description="decoder layers to leave out")
    target_tokenizer: Path | None = Field(
        None, description="folder of the target's tokenizer, when the draft has another one: shared tokens are drafted"
    )


class TargetWorkerConfig(WorkerSettings):
    """The target worker. Environment: SPECSPLIT_TARGET_*."""

    model_config = SettingsConfigDict(env_prefix="SPECSPLIT_TARGET_")

    port: int = Field(50052, ge=0, le=65535, description="port to listen on; 0 = any free port")


class OrchestratorConfig(AccessSettings):
    """The draft -> verify loop. Environment: SPECSPLIT_ORCH_*."""

    model_config = SettingsConfigDict(env_prefix="SPECSPLIT_ORCH_")
    short_flags = {"draft_address": "--draft-addr", "target_address": "--target-addr", "max_draft_tokens": "--gamma"}

    draft_address: str = Field("127.0.0.1:50051", description="host:port of the draft worker; grpcs:// before it: TLS")
    target_address: str = Field("127.0.0.1:50052", description="host:port of the target worker, likewise")
    tokenizer: Path | None = Field(None, description="folder of the tokenizer: a prepared or local model")
    mode: PipelineMode = Field(
        "sync", description="sync | overlap | lookahead: what is drafted while the target verifies"
    )
    max_draft_tokens: Annotated[int, Field(ge=0, le=MAX_GAMMA)] | Literal["auto"] = Field(
        5, description="gamma: depth of each draft; 0 = no draft; auto = chosen in every round from what was measured"
    )
    tree: str = Field("chain", description="shape of the draft: chain | 3x2 (children per level) | dynamic-16x4")
    draft_name: str = Field(
        "draft", pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$", description="name of the draft in tables and run folders"
    )
    fan_out: int = Field(16, ge=1, le=64, description="outcomes of a verification that lookahead prepares drafts for")
    temperature: float = Field(0.0, ge=0, le=MAX_TEMPERATURE, description="0 = greedy")
    top_k: int = Field(0, ge=0, description="sample from the k likeliest tokens; 0 = from all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability")
    sampling: SamplingMethod = Field("coupled", description="coupled | rejection: how sampled drafts are verified")
    rtt_ms: float = Field(0.0, ge=0, description="simulated round-trip time to the target worker, added by the client")
    jitter_ms: float = Field(0.0, ge=0, description="simulated jitter: each message is late by up to this much more")
    max_output_tokens: int = Field(128, ge=1, description="tokens after which a text ends")
    max_rounds: int | None = Field(None, ge=1, description="rounds after which a text ends; default: no limit")
    use_chat_template: bool = Field(True, description="apply the model's chat template when it has one")
    ignore_eos: bool = Field(False, description="write on after the end-of-text token")
    stop_token_ids: list[int] | None = Field(
        None, description="tokens that end a text; default: those that the target names"
    )
    max_context: int | None = Field(
        None, ge=2, description="longest text, prompt included; default: what the target can hold"
    )
    tls_name: str | None = Field(
        None, description="name in a worker's certificate, where it is not that of the address, as behind a tunnel"
    )
    connect_timeout_s: float = Field(10.0, gt=0, description="seconds to wait for a worker to answer")
    rpc_timeout_s: float = Field(120.0, gt=0, description="deadline of one call")
    recovery_timeout_s: float = Field(
        60.0, ge=0, description="seconds that a worker that failed gets to be back; 0 = give up at once"
    )
    on_draft_failure: DraftFailure = Field(
        "reconnect",
        description="when a draft worker fails: reconnect | target_alone (it finishes the text) | fail",
    )
    seed: int = Field(
        0, ge=0, lt=1 << 32, description="of the text: decides what is sampled; greedy text does not depend on it"
    )

    @field_validator("tree")
    @classmethod
    def _tree_shape(cls, value: str) -> str:
        return str(TreeShape.parse(value))

    @field_validator("temperature")
    @classmethod
    def _temperature_in_range(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"write 0 for greedy, or {MIN_TEMPERATURE:g} at least")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sampling == "rejection" and self.temperature and self.shape.nodes:
            raise ValueError(
                "a dynamic tree keeps drafted tokens by their probability, which biases rejection sampling: "
                "use sampling coupled, or a chain or static tree"
            )
        return self

    @property
    def shape(self) -> TreeShape:
        return TreeShape.parse(self.tree)

    @property
    def gamma_limit(self) -> int:
        """The deepest draft that may be asked for."""
        return AUTO_GAMMA_LIMIT if self.max_draft_tokens == "auto" else self.max_draft_tokens
