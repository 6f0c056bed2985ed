"""TargetService: checks requests, keeps sessions, calls the engine on the model thread."""

from __future__ import annotations

import grpc

from specsplit.config import TargetWorkerConfig
from specsplit.decoding.tree import TreeError
from specsplit.rpc.codec import tree_from_message
from specsplit.rpc.v1 import specsplit_pb2 as pb
from specsplit.rpc.v1 import specsplit_pb2_grpc as pb_grpc
from specsplit.workers.errors import InvalidRequest
from specsplit.workers.servicer import WorkerServicer
from specsplit.workers.target.engine import verify_tree


class TargetServicer(WorkerServicer, pb_grpc.TargetServiceServicer):
    """Serves one target model."""

    role = "target"
    config: TargetWorkerConfig

    def VerifyDrafts(self, request: pb.VerifyDraftsRequest, context: grpc.ServicerContext) -> pb.VerifyDraftsReply:
        return self.guard(context, lambda: self._verify(request))

    def _verify(self, request: pb.VerifyDraftsRequest) -> pb.VerifyDraftsReply:
        tree = tree_from_message(request.tree)
        self.check_request(request.context, len(tree))
        try:
            tree.validate(vocab_size=self.model.vocab_size)
        except TreeError as error:
            raise InvalidRequest(f"malformed tree: {error}") from error
        return self.answer(
            request,
            lambda session, tokens: verify_tree(self.model, session, tokens, request.context.prefix_length, tree),
            lambda verdict: pb.VerifyDraftsReply(
                accepted_nodes=verdict.path,
                accepted_tokens=[tree.token_ids[node] for node in verdict.path],
                next_token=verdict.next_token,
            ),
        )
