"""Hidden states of the target on their way to a draft model that reads them. They are passed on as they come."""

from __future__ import annotations

from collections.abc import Iterator

from specsplit.client.limits import DraftLimits
from specsplit.errors import UserError
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.settings.run import OrchestratorConfig


class PassedStates:
    """Which positions of one text the draft worker's session has, or gets with the next request.

    needed: what the draft worker said. limits: of the text's messages.
    """

    def __init__(self, needed: pb.StatesNeeded, config: OrchestratorConfig, limits: DraftLimits) -> None:
        self._config = config
        self._wanted = pb.WantedStates(
            layers=needed.layers,
            form=config.hidden_states_form,
            projected=config.hidden_states_project == "target",
            message_bytes=limits.states_bytes,
        )
        self._most_bytes = limits.states_bytes
        self._end = -1  # of the positions that came; -1: none since the session began
        self._pending: list[pb.HiddenStates] = []

    def renew(self) -> None:
        """From here on the draft worker has none."""
        self._end = -1
        self._pending.clear()

    def wanted(self, length: int, *, only: bool = False) -> pb.WantedStates:
        """What to ask the target for with a text of `length` tokens: what the draft worker lacks, so after its failure
        all again. only: verify nothing."""
        window = self._config.hidden_states_window
        first = max(length - only - (window or length), 0) if self._end < 0 else self._end
        wanted = pb.WantedStates(first=first, only=only)
        wanted.MergeFrom(self._wanted)
        return wanted

    def lacking(self, length: int) -> bool:
        """Whether a draft for a text of `length` tokens needs states that nobody has asked for."""
        return self._end < length - 1

    def take(self, reply: pb.VerifyDraftsReply) -> None:
        """Keep the states of a reply for the next draft request."""
        if reply.HasField("states"):
            self._pending.append(reply.states)
            self._end = reply.states.first + reply.states.count

    def requests(self, session_id: str) -> Iterator[pb.GenerateDraftsRequest]:
        """Requests to be sent before the next one, with the states that do not fit into it."""
        while len(self._pending) > 1 and sum(each.ByteSize() for each in self._pending) > self._most_bytes:
            part = self._pending.pop(0)
            yield pb.GenerateDraftsRequest(context=pb.Context(session_id=session_id), states=[part], states_only=True)

    def rest(self) -> list[pb.HiddenStates]:
        """The states for the next request."""
        rest, self._pending = self._pending, []
        return rest


def check_states(draft: pb.DescribeReply, target: pb.DescribeReply, config: OrchestratorConfig) -> None:
    """Refuse a draft that reads hidden states which this target does not have. Raises UserError that names both."""
    if not draft.HasField("states_needed"):
        return
    needed, given = draft.states_needed, target.states_given
    pair = f"the draft {draft.model} reads hidden states of its target, and the target {target.model}"
    if not target.HasField("states_given"):
        raise UserError(
            f"{pair} gives none: its worker is of an older version, or its engine cannot (use engine transformers or "
            "fused, and a target with weights)"
        )
    last = max(needed.layers, default=2)
    wrong = []
    if needed.hidden_size != given.hidden_size:
        wrong.append(f"has states of {given.hidden_size} numbers, not {needed.hidden_size}")
    if needed.vocab_size > target.vocab_size:
        wrong.append(f"has {target.vocab_size} tokens, fewer than its {needed.vocab_size}")
    if last >= given.num_layers:
        wrong.append(f"has {given.num_layers} layers, and none numbered {last}")
    if wrong:
        raise UserError(f"{pair} {'; it '.join(wrong)}: it is not the target that this draft was made for")
    form = config.hidden_states_form
    for worker, forms in ((draft, needed.forms), (target, given.forms)):
        if form not in forms:
            raise UserError(f"hidden_states_form {form}: the {worker.role} worker knows {', '.join(forms)}")
    if config.hidden_states_project == "target" and given.projection_sha256 != needed.projection_sha256:
        has = "the fc of another draft" if given.projection_sha256 else "no fc of a draft"
        raise UserError(
            f"hidden_states_project target: the target worker has {has}; start it with --hidden-states-draft and the "
            f"folder of {draft.model}"
        )
