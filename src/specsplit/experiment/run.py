"""One run: what it is measured with, what its run.json says, and what of that decides its rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specsplit.experiment.baselines import Beside
from specsplit.experiment.records import Request, deciding, requests_sha256
from specsplit.io import combined_sha256
from specsplit.launch.endpoint import description_dict
from specsplit.models.tokenizer import TextCodec
from specsplit.provenance.capture import hash_tree
from specsplit.provenance.closure import PACKAGE, code_sha256
from specsplit.provenance.git import capture_git
from specsplit.provenance.redaction import redact_arguments
from specsplit.provenance.run_file import describe_here
from specsplit.provenance.steps import workflow_command
from specsplit.rpc.connection import Connection
from specsplit.settings.run import OrchestratorConfig

RUN_SCHEMA_VERSION = 2
_LIMITS_OPERATION = ("sessions", "calls", "streams", "waiting_messages")  # the others decide how long drafts are


def worker_identities(workers: Mapping[str, Connection]) -> dict[str, dict[str, Any]]:
    """What of the workers' descriptions, by role, decides results: no process, nor limits that only operate one."""
    identities = {role: description_dict(worker.description) for role, worker in workers.items()}
    for identity in identities.values():
        del identity["pid"]
        for name in _LIMITS_OPERATION:
            del identity["limits"][name]
    return identities


def describe_workers(
    workers: Mapping[str, Connection], origins: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """What a run file says of workers, by role. origins: of each, as `worker_origin` gives it."""
    return {
        role: {"address": worker.address, **(origins or {}).get(role, {}), **description_dict(worker.description)}
        for role, worker in workers.items()
    }


@dataclass(frozen=True)
class Run:
    """What a run is measured with.

    workers: by role; no draft worker where gamma is 0. config.seed: each text gets a seed of its own, from it and the
    request's id. warmup: requests run first and not recorded. repeats: how often all requests are written; a request
    has the same seed each time. inputs: what run.json says of files read (path, sha256). origins: what it says of each
    role's worker beside Describe's reply, as worker_origin gives it. beside: what is measured in turn with each
    request, the target alone included; None: nothing, and no reference.csv.
    """

    requests: Sequence[Request]
    workers: Mapping[str, Connection]
    codec: TextCodec
    config: OrchestratorConfig
    warmup: int = 1
    repeats: int = 1
    inputs: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    beside: Beside | None = None

    def describe(self) -> dict[str, Any]:
        """What run.json says before anything is measured."""
        workers = describe_workers(self.workers, self.origins)
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
            "requests_sha256": requests_sha256(self.requests),
            "orchestrator": deciding(self.config),
            "workers": worker_identities(self.workers),
            **{key: described[key] for key in ("repeats", "warmup_requests", "tokenizer_sha256", "machine")},
            **{key: described[key] for key in ("environment", "software_sha256", "run_code_sha256", "beside")},
        }
