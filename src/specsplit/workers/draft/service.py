"""DraftService: checks requests, keeps sessions, calls the engine on the model thread."""

from __future__ import annotations

import grpc

from specsplit.config import MAX_GAMMA, DraftWorkerConfig
from specsplit.decoding.tree import tree_size
from specsplit.rpc.codec import tree_to_message
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.workers.draft.engine import draft_tree
from specsplit.workers.errors import InvalidRequest
from specsplit.workers.servicer import WorkerServicer


class DraftServicer(WorkerServicer, pb_grpc.DraftServiceServicer):
    """Serves one draft model."""

    role = "draft"
    config: DraftWorkerConfig

    def GenerateDrafts(
        self, request: pb.GenerateDraftsRequest, context: grpc.ServicerContext
    ) -> pb.GenerateDraftsReply:
        return self.guard(context, lambda: self._generate(request))

    def _generate(self, request: pb.GenerateDraftsRequest) -> pb.GenerateDraftsReply:
        gamma, branching = request.max_draft_tokens, list(request.branching)
        if not 1 <= gamma <= MAX_GAMMA:
            raise InvalidRequest(f"max_draft_tokens must be 1 to {MAX_GAMMA}, got {gamma}")
        if any(not 1 <= width <= self.model.vocab_size for width in branching):
            raise InvalidRequest(f"branching {branching}: a level has 1 to {self.model.vocab_size} children")
        self.check_request(request.context, tree_size(branching, gamma))
        return self.answer(
            request,
            lambda session, tokens: draft_tree(
                self.model,
                session,
                tokens,
                request.context.prefix_length,
                gamma=gamma,
                branching=branching,
                stop_token_ids=frozenset(request.stop_token_ids),
            ),
            lambda tree: pb.GenerateDraftsReply(tree=tree_to_message(tree)),
        )
