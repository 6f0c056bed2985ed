"""TargetService: checks requests, keeps sessions, calls the engine on the model thread."""

from __future__ import annotations

import time

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
        arrived = time.perf_counter()
        tree = tree_from_message(request.tree)
        self.check_request(request.context, len(tree))
        try:
            tree.validate(vocab_size=self.model.vocab_size)
        except TreeError as error:
            raise InvalidRequest(f"malformed tree: {error}") from error
        raw = request.SerializeToString(deterministic=True)
        with self.sessions.use(request.context) as session:
            if (reply := session.replay(request.context.round, raw)) is not None:
                return reply
            tokens = session.context_for(request.context)
            done = self.thread.run(
                lambda: verify_tree(self.model, session, tokens, request.context.prefix_length, tree)
            )
            path = done.value.path
            reply = pb.VerifyDraftsReply(
                accepted_nodes=path,
                accepted_tokens=[tree.token_ids[node] for node in path],
                next_token=done.value.next_token,
                timings=self.timings(done, arrived),
            )
            session.remember(request.context.round, raw, reply)
            return reply
