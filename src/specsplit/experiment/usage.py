"""CPU time of the client and both workers, and energy of the workers' machines, for each text of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import grpc

from specsplit.client.result import USAGE
from specsplit.rpc.connection import Connection
from specsplit.rpc.v1 import specsplit_pb2 as pb

ANSWER_S = 2.0


class Meter:
    """What was used since the last look. connections: to the workers."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._stubs = {connection.role: connection.stub for connection in connections}
        self._used = self._look()

    def told(self) -> dict[str, Any]:
        """For run.json: which counters the energy is of, and why others are not in it."""
        found = {role: usage for role, usage in self._used.items() if isinstance(usage, pb.Usage)}
        reasons = {role: usage.no_energy for role, usage in found.items() if usage.no_energy}
        silent = {role: "it does not tell its usage" for role in self._stubs if role not in found}
        domains = sorted({domain for usage in found.values() for domain in usage.energy_j})
        return {"of": domains, "left_out": {**reasons, **silent}}

    def spent(self) -> dict[str, Any]:
        """The columns USAGE since the last call. Empty: a worker that does not tell, or was started anew; energy where
        a worker tells of none. Without a draft worker its time is 0."""
        before, now = self._used, self._look()
        self._used = now
        row = {"client_cpu_ms": now["client"] - before["client"], "draft_cpu_ms": 0.0}
        joules: dict[str, float] | None = {}
        for role in self._stubs:
            old, new = before[role], now[role]
            known = old is not None and new is not None and new.cpu_ms >= old.cpu_ms
            row[f"{role}_cpu_ms"] = new.cpu_ms - old.cpu_ms if known else None
            if joules is not None and known and new.energy_j and set(new.energy_j) == set(old.energy_j):
                joules |= {domain: joule - old.energy_j[domain] for domain, joule in new.energy_j.items()}
            else:
                joules = None
        row["energy_j"] = sum(joules.values()) if joules else None
        assert set(row) == set(USAGE)
        return row

    def _look(self) -> dict[str, Any]:
        return {"client": time.process_time() * 1e3, **{role: _ask(stub) for role, stub in self._stubs.items()}}


def _ask(stub: Any) -> pb.Usage | None:
    try:
        reply = stub.Describe(pb.DescribeRequest(usage=True), timeout=ANSWER_S)
    except grpc.RpcError:
        return None
    return reply.usage if reply.HasField("usage") else None
