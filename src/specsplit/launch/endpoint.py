"""The endpoint file: where a worker is and what it is, as JSON, readable by its owner only."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from specsplit.errors import UserError, counted
from specsplit.io import read_json, read_json_object, replace_file
from specsplit.launch.heartbeat import Pulse
from specsplit.launch.process import ProcessIdentity
from specsplit.rpc.credentials import TLS_SCHEME, join_address, split_address
from specsplit.rpc.v1 import specsplit_pb2 as pb

EVERY_ADDRESS = ("0.0.0.0", "[::]", "::")
ATTACHED = "attached to: whoever started the worker knows"


def resolve_address(address: str) -> str:
    """host:port as it is; of an address file (the path of a .json file) the `address` in it.

    An endpoint file is one, and so is {"address": "gpu-1:50051"} written by hand. Raises UserError when the file is
    missing or holds no address.
    """
    if not address.endswith(".json"):
        return address
    found = read_json_object(Path(address)).get("address")
    if not isinstance(found, str):
        raise UserError(f'{address}: holds no address; wanted an endpoint file or {{"address": "host:port"}}')
    return found


def worker_origin(address: str) -> dict[str, Any]:
    """Who started the worker at an address or address file: {attached, host, process_started, log, reason}.

    What is not known, as of a worker that was attached to, is null.
    """
    if address.endswith(".json"):
        with suppress(UserError):  # an address written by hand
            return Endpoint.read(Path(address)).origin()
    return {"attached": True, "host": None, "process_started": None, "log": None, "reason": ATTACHED}


@dataclass(frozen=True)
class Endpoint:
    """A worker that serves.

    address: host:port. attached: it was running before and is never stopped by the workflow.
    pid, started: its process on `host` (null when attached). holder: the process whose lease it holds.
    worker: what Describe says. shared: others may use this process too, and it ends after the last of them.
    log: the file with what it prints (null when attached). birth, holder_birth: see ProcessIdentity.
    heartbeat: a file that the worker touches, for other hosts; an absolute path.
    """

    address: str
    attached: bool
    host: str
    pid: int | None
    started: float | None
    holder_pid: int | None
    holder_started: float | None
    worker: dict[str, Any]
    shared: bool = False
    log: str | None = None
    birth: str = ""
    holder_birth: str = ""
    heartbeat: str | None = None

    @classmethod
    def local(
        cls,
        host: str,
        port: int,
        description: pb.DescribeReply,
        holder: ProcessIdentity | Pulse | None,
        *,
        tls: bool = False,
        heartbeat: Path | None = None,
    ) -> Endpoint:
        """The endpoint of this process. When it listens on every address, its host name is the one to use."""
        me = ProcessIdentity.of(os.getpid())
        assert me is not None  # it runs
        near = holder if isinstance(holder, ProcessIdentity) else None
        reached = socket.gethostname() if host in EVERY_ADDRESS else host
        return cls(
            address=f"{TLS_SCHEME if tls else ''}{join_address(reached, port)}",
            attached=False,
            host=socket.gethostname(),
            pid=me.pid,
            started=me.started,
            holder_pid=near.pid if near else None,
            holder_started=near.started if near else None,
            worker=description_dict(description),
            birth=me.birth,
            holder_birth=near.birth if near else "",
            heartbeat=str(heartbeat.absolute()) if heartbeat else None,
        )

    @classmethod
    def of_running(cls, address: str, description: pb.DescribeReply) -> Endpoint:
        """The endpoint of a worker that was attached to."""
        return cls(address, True, split_address(address)[1], None, None, None, None, description_dict(description))

    @classmethod
    def read(cls, path: Path) -> Endpoint:
        """Read an endpoint file; UserError when it is missing or is not one."""
        try:
            return cls(**read_json(path))
        except TypeError as error:
            message = f"{path} is not an endpoint file: {error}. Delete it and start the worker again."
            raise UserError(message) from error

    def write(self, path: Path) -> None:
        """Write atomically, mode 0600."""
        replace_file(path, json.dumps(asdict(self), indent=2) + "\n", mode=0o600)

    @staticmethod
    def remove(path: Path, *, pid: int) -> None:
        """Delete the file if it is (still) that of process `pid`."""
        with suppress(UserError):  # gone, or not ours
            if Endpoint.read(path).pid == pid:
                path.unlink(missing_ok=True)

    def process(self) -> ProcessIdentity | None:
        """The worker's process when it is one of this machine."""
        if self.pid is None or self.started is None or self.host != socket.gethostname():
            return None
        return ProcessIdentity(self.pid, self.started, self.birth)

    def origin(self) -> dict[str, Any]:
        """Who started the worker, as `worker_origin` says it."""
        unknown = ATTACHED if self.attached else "its endpoint file names no log"
        return {
            "attached": self.attached,
            "host": self.host,
            "process_started": self.started,
            "log": self.log,
            "reason": unknown if self.log is None or self.started is None else None,
        }

    def stale(self) -> bool:
        """True when the worker is known to be gone, or about to go because its holder is."""
        process = self.process()
        if process is None or not process.alive():
            return process is not None
        holder = ProcessIdentity(self.holder_pid or 0, self.holder_started or -1.0, self.holder_birth)
        return self.holder_pid is not None and not holder.alive()


def description_dict(description: pb.DescribeReply) -> dict[str, Any]:
    """Describe's reply as a plain dict with every field present; `packages`, of the worker's process, as one too."""
    whole = pb.DescribeReply()
    whole.CopyFrom(description)
    whole.limits.SetInParent()
    data: dict[str, Any] = MessageToDict(
        whole, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    data["parameters"] = int(data["parameters"])  # 64-bit integers are strings in protobuf's JSON
    if packages := data["runtime"].pop("packages", None):  # of a worker of this version
        data["packages"] = json.loads(packages)
    return data


def describe_identity(description: pb.DescribeReply) -> str:
    """One line that names a worker: role, model, dtype, parameters, device, threads."""
    skipped = f" without layers {list(description.skip_layers)}" if description.skip_layers else ""
    return (
        f"{description.role} {description.model}{skipped} ({description.dtype}, "
        f"{description.parameters / 1e6:.1f}M parameters, {description.device}, "
        f"{counted(description.threads, 'thread')})"
    )
