"""One run: what it is measured with, what its run.json says, and what of that decides its rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specsplit.experiment.baselines import Beside
from specsplit.experiment.records import Request, deciding
from specsplit.io import combined_sha256, json_sha256
from specsplit.launch.endpoint import description_dict
from specsplit.models.tokenizer import TextCodec
from specsplit.provenance.capture import hash_tree
from specsplit.provenance.closure import PACKAGE, code_sha256
from specsplit.provenance.git import capture_git
from specsplit.provenance.redaction import redact_arguments
from specsplit.provenance.run_file import describe_here
from specsplit.provenance.steps import workflow_command
from specsplit.rpc.connection import Connection
from specsplit.rpc.v1.specsplit_pb2 import DescribeReply
from specsplit.settings.run import OrchestratorConfig

RUN_SCHEMA_VERSION = 2
_LIMITS_OPERATION = ("sessions", "calls", "streams", "waiting_messages")  # the others decide how long drafts are


def worker_identity(description: DescribeReply) -> dict[str, Any]:
    """What of a worker's description decides results: not its process, nor limits that only operate it."""
    identity = {key: value for key, value in description_dict(description).items() if key != "pid"}
    limits = {name: limit for name, limit in identity["limits"].items() if name not in _LIMITS_OPERATION}
    return {**identity, "limits": limits}


@dataclass(frozen=True)
class Run:
    """What a run is measured with; the fields are explained at `runner.run_requests`."""

    requests: Sequence[Request]
    draft: Connection | None
    target: Connection
    codec: TextCodec
    config: OrchestratorConfig
    warmup: int
    repeats: int
    inputs: Mapping[str, Any]
    origins: Mapping[str, Mapping[str, Any]]
    beside: Beside | None

    @property
    def workers(self) -> dict[str, Connection]:
        """The workers by role."""
        return {worker.role: worker for worker in (self.draft, self.target) if worker is not None}

    def describe(self) -> dict[str, Any]:
        """What run.json says before anything is measured."""
        workers = {
            role: {"address": worker.address, **self.origins.get(role, {}), **description_dict(worker.description)}
            for role, worker in self.workers.items()
        }
        here, beside = describe_here(), self.beside
        return {
            "schema_version": RUN_SCHEMA_VERSION,
            **here,
            "argv": redact_arguments(["specsplit", *sys.argv[1:]]),
            "workflow": workflow_command(),
            "gamma": self.config.gamma,
            "seeds": {
                "orchestrator": self.config.seed,
                **{
                    f"{role}_worker": int(w["runtime"]["seed"]) for role, w in workers.items() if "seed" in w["runtime"]
                },
            },
            "warmup_requests": self.warmup,
            "repeats": self.repeats,
            "beside": None if beside is None else {"setups": list(beside.setups), "left_out": dict(beside.left_out)},
            "orchestrator": self.config.model_dump(mode="json"),
            "workers": workers,
            "inputs": self.inputs,
            "tokenizer_sha256": self.codec.sha256,
            "software_sha256": here["software"]["sha256"],
            "source_sha256": combined_sha256(hash_tree(PACKAGE)),
            "run_code_sha256": code_sha256("bench"),
            "git": capture_git(PACKAGE),
        }

    def decides(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """What the rows depend on: those of another run with the same may stand beside them. described: `describe`."""
        return {
            "requests_sha256": json_sha256([_identity(request) for request in self.requests]),
            "orchestrator": deciding(self.config),
            "workers": {role: worker_identity(worker.description) for role, worker in self.workers.items()},
            **{key: described[key] for key in ("repeats", "warmup_requests", "tokenizer_sha256", "machine")},
            **{key: described[key] for key in ("environment", "software_sha256", "run_code_sha256", "beside")},
        }


def _identity(request: Request) -> list[Any]:
    """What a request is, as far as it is known before the run."""
    later = [request.prompt.prompt, request.previous.id] if request.prompt and request.previous else []
    return [request.id, request.category, request.token_ids, *later]
