"""Drafting: a token tree that continues the context, and trees for the likely outcomes of its verification.

A session keeps every node that its model has computed, and the candidate tokens after it. A draft is grown from those;
only new nodes cost a pass. So a draft for an outcome that was drafted ahead costs nothing, and accepted tokens are
never computed again.

A model that reads the target's hidden states reads accepted tokens a second time, with the true states in place of its
own outputs. Where a draft that was made ahead came true, it does so only before it drafts ahead again, for that draft
is in use. Its cache has no entry for tokens without a state before them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import torch

from specsplit.decoding.forced import force
from specsplit.decoding.growth import CANDIDATES, DraftSettings, Growth, ToFeed, grow, least_log
from specsplit.decoding.sampling import Candidates, candidates
from specsplit.decoding.tree import ROOT, TokenTree
from specsplit.engines.passes import EMPTY, Propose
from specsplit.worker.sessions import Session

if TYPE_CHECKING:
    from specsplit.engines.passes import Steps
    from specsplit.models.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A possible result of a verification, and the draft that continues it."""

    accepted_tokens: list[int]
    next_token: int
    tree: TokenTree


@dataclass
class DraftState:
    """What the model of a session has computed. `nodes` has the target's tokens, everything else the draft's own."""

    ids: list[int] = field(default_factory=list)  # the context
    nodes: TokenTree = field(default_factory=TokenTree)  # after it, in the order of the cache
    node_ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)  # (node, token) -> node
    candidates: dict[int, Candidates] = field(default_factory=dict)  # by node, and ROOT for the context
    made_for: object = None  # sampling and vocabulary that the candidates are for
    overflowed: bool = False  # Numbers of the model were not finite: drafts end there, and the nodes are not kept.

    def add(self, parent: int, token: int, token_id: int, log_prob: float) -> int:
        node = self.nodes.add(token, parent, log_prob)
        self.node_ids.append(token_id)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        self.children[parent, token] = node
        return node

    def below(self, start: int) -> list[int]:
        """The nodes that descend from `start`, in order."""
        inside = {start}
        for node, parent in enumerate(self.nodes.parents):
            if parent in inside:
                inside.add(node)
        return sorted(inside - {start})


class Drafter:
    """Makes drafts that continue `context` in one session, which it brings to that context at once.

    abandoned: asked before every pass; once it is true, drafts end where they are. reads_states: the model reads hidden
    states of the target; those that came are in `session.hidden`, and without them drafts are empty.
    drafted_ahead: what was drafted ahead for this context is in use, so the draft is the same.
    """

    def __init__(
        self,
        model: Steps,
        vocabulary: Vocabulary,
        session: Session,
        context: Sequence[int],
        settings: DraftSettings,
        abandoned: Callable[[], bool] = lambda: False,
        *,
        reads_states: bool = False,
        drafted_ahead: bool = True,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.session = session
        self.context = list(context)
        self.settings = settings
        self.abandoned = abandoned
        self.reads_states, self.drafted_ahead = reads_states, drafted_ahead
        if session.state is None:
            session.state = DraftState()
        self.state: DraftState = session.state
        self._move_to_context()

    def draft(self) -> TokenTree:
        """The draft that follows the context; empty when the draft model cannot read the context."""
        if self.unreadable:
            return TokenTree()
        growth = self._growth(ROOT, self.settings.gamma, len(self.context))
        return self._run([growth], [ROOT])[0]

    def ahead(self, tree: TokenTree, gamma: int, fan_out: int, *, full_acceptance: bool = False) -> list[Outcome]:
        """Drafts of depth `gamma` for the `fan_out` likeliest outcomes of verifying `tree`, which `draft` returned.

        An outcome is the last accepted node of the tree (or none) and a next token that is not drafted under it. Its
        probability, as the draft model sees it, is that of its path and next token.
        full_acceptance: only the path of first choices and the likeliest token after it.
        """
        hidden = self.session.hidden
        if hidden is not None and not self.unreadable and hidden.true_length < len(self.state.ids):
            self._read(self.state.ids, hidden.true_length, self.state.made_for)
        place_to_node = None if self.unreadable else self._feed_tree(tree)
        if place_to_node is None:
            return []
        costs, lengths = {ROOT: 0.0}, {ROOT: len(self.context) + 1}  # of the path; of the text with a next token
        drafted: dict[int, list[int]] = {}  # under each place
        first_leaf = ROOT  # the end of the path of first choices
        for place, parent in enumerate(tree.parents):
            costs[place], lengths[place] = costs[parent] - tree.log_probs[place], lengths[parent] + 1
            if parent == first_leaf and parent not in drafted:
                first_leaf = place
            drafted.setdefault(parent, []).append(tree.token_ids[place])
        options = []
        for end in [first_leaf] if full_acceptance else [ROOT, *range(len(tree))]:
            if end not in place_to_node or lengths[end] >= self.settings.length_limit:  # the text ends there
                continue
            best = self.state.candidates[place_to_node[end]]
            for token, log_prob in zip(best.token_ids, best.log_probs, strict=True):
                if token not in drafted.get(end, ()) and token not in self.settings.stop_token_ids:
                    options.append((costs[end] - log_prob, end, token, log_prob))
        chosen = sorted(options)[: 1 if full_acceptance else fan_out]
        starts = self._feed([(place_to_node[end], token, log_prob) for _, end, token, log_prob in chosen])
        if starts is None:
            return []
        growths = [self._growth(node, gamma, lengths[end]) for node, (_, end, *_) in zip(starts, chosen, strict=True)]
        return [
            Outcome([tree.token_ids[place] for place in _path(tree, end)], token, drafted_tree)
            for (_, end, token, _), drafted_tree in zip(chosen, self._run(growths, starts), strict=True)
        ]

    def _growth(self, start: int, gamma: int, length: int) -> Growth:
        depth = min(gamma, self.settings.length_limit - length - 1)
        return grow(self.settings, depth, start, self.state.candidates)

    def _run(self, growths: list[Growth], starts: Sequence[int]) -> list[TokenTree]:
        """Run growths, which begin at these nodes, side by side: each pass computes the nodes that all want next."""
        trees: dict[int, TokenTree] = {}
        answers: dict[int, list[int] | None] = dict.fromkeys(range(len(growths)))  # None begins each
        while answers:
            wants: dict[int, list[ToFeed]] = {}
            for i, nodes in answers.items():
                try:
                    wants[i] = growths[i].send(nodes)
                except StopIteration as end:
                    trees[i] = end.value
            fed = self._feed([want for each in wants.values() for want in each])
            places = iter(fed or ())
            answers = {i: None if fed is None else list(islice(places, len(each))) for i, each in wants.items()}
        for i, start in enumerate(starts):  # ROOT is the last token of the context
            source = self.session.cache.source_after(len(self.state.ids) + start + 1)
            trees[i].source = "none" if source and not len(trees[i]) else source
        return [trees[i] for i in range(len(growths))]

    def _feed_tree(self, tree: TokenTree) -> dict[int, int] | None:
        """Compute the new nodes of a draft: its leaves, or all where the context was read again. Returns place in the
        draft -> node, without stop tokens."""
        nodes = {ROOT: ROOT}
        while True:
            new: list[tuple[int, ToFeed]] = []
            for place, (token, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True)):
                if place in nodes or parent not in nodes or token in self.settings.stop_token_ids:
                    continue
                node = self.state.children.get((nodes[parent], token))
                if node is None:
                    new.append((place, (nodes[parent], token, tree.log_probs[place])))
                else:
                    nodes[place] = node
            fed = self._feed([want for _, want in new])
            if fed is None:
                return None
            if not new:
                return nodes
            nodes |= dict(zip([place for place, _ in new], fed, strict=True))

    def _feed(self, wants: Sequence[ToFeed]) -> list[int] | None:
        """One pass over the new ones among the wanted nodes; None when the cache is full or the draft is abandoned."""
        state, cache = self.state, self.session.cache
        new = [want for want in dict.fromkeys((w[0], w[1]) for w in wants) if want not in state.children]
        if new:
            if cache.length + len(new) > cache.capacity or self.abandoned():
                return None
            scores = {(node, token): log_prob for node, token, log_prob in wants}
            before = len(state.nodes)
            for node, token in new:
                state.add(node, token, self.vocabulary.token(token), scores[node, token])
            try:
                tree = TokenTree(state.node_ids, state.nodes.parents, state.nodes.log_probs)
                self._compute(range(before, len(state.nodes)), (), tree, before)
            except BaseException:
                self._forget()
                raise
        return [state.children[node, token] for node, token, _ in wants]

    def _compute(
        self,
        nodes: Sequence[int],
        tokens: Sequence[int],
        tree: TokenTree = EMPTY,
        cached: int = 0,
        **states: torch.Tensor,
    ) -> None:
        """One pass, as CausalLM.step, whose last rows are of `nodes`; keep the candidates after them. states: as there,
        for a model that reads them."""
        settings, hidden = self.settings, self.session.hidden
        model: Any = self.model  # whose passes may have a `then`
        vocab_size = min(settings.vocab_size, self.vocabulary.size)
        offset = 0 if hidden is None else hidden.first + 1
        then = Propose(settings.sampling, vocab_size, self.vocabulary.targets, offset=offset)
        of_logits = not self.vocabulary.same_ids or bool(settings.forced.tokens) or not hasattr(model, "decides")
        if of_logits or not model.decides(then):
            self._learn(nodes, model.step(self.session.cache, tokens, tree, cached, **states)[-len(nodes) :])
            return
        # A chain is one launch: what follows the context is drafted in the pass over its last tokens.
        steps = 0
        if not settings.shape.branching and not settings.shape.nodes and not len(tree):
            depth = min(settings.gamma, settings.length_limit - len(self.context) - 1)
            room = self.session.cache.capacity - self.session.cache.length - len(tokens)
            steps = max(0, min(depth - 1, room))
        then = replace(then, steps=steps, least=least_log(settings.p_min))
        found = model.step(self.session.cache, tokens, tree, cached, then, **states)
        if steps:  # or fewer: the chain is too improbable, or goes on pass by pass
            steps = len(found) - len(nodes)
        found = found[-len(nodes) - steps :]
        at = nodes[-1]
        for best, _ in found[len(nodes) - 1 : len(found) - 1] if steps else ():
            # What was fed after numbers that are not finite is no candidate; it is in the cache all the same.
            token, log_prob = (best.token_ids[0], best.log_probs[0]) if best.token_ids else (0, 0.0)
            at = self.state.add(at, token, token, log_prob)
        fed = [*nodes, *range(len(self.state.nodes) - steps, len(self.state.nodes))]
        self.state.candidates.update(zip(fed, (best for best, _ in found), strict=True))
        if any(overflowed and not best.token_ids for best, overflowed in found):
            self.state.overflowed = True

    def _learn(self, nodes: Sequence[int], logits: torch.Tensor) -> None:
        """Keep the candidates after computed nodes; logits: [len(nodes), vocabulary of the draft]."""
        sampling, below = self.settings.sampling, self.settings.vocab_size
        depths = [0 if node == ROOT else self.state.depths[node] for node in nodes]
        positions = [len(self.context) + depth for depth in depths]
        if self.settings.forced.tokens:
            logits = self._force(nodes, self.vocabulary.outward(logits)[:, :below])
            found = candidates(logits, positions, sampling, CANDIDATES)
        else:
            found = self.vocabulary.candidates(logits, positions, sampling, CANDIDATES, below=below)
        self.state.candidates.update(zip(nodes, found, strict=True))
        if not all(each.token_ids for each in found) and bool((logits.isnan() | logits.isposinf()).any()):
            self.state.overflowed = True

    def _force(self, nodes: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """The logits after nodes that the target would choose, made right or wrong as asked; others as they are."""
        forced, logits = self.settings.forced, logits.clone()
        for row, node in enumerate(nodes):
            path = [self.state.nodes.token_ids[place] for place in _path(self.state.nodes, node)]
            depth = len(path)
            if depth < len(forced.tokens) and tuple(path) == forced.tokens[:depth]:
                token, right = forced.tokens[depth], forced.right[depth]
                if token < logits.shape[1] and not (right and self.vocabulary.lacks(token)):
                    force(logits[row], token, right)
        return logits

    def _move_to_context(self) -> None:
        """Keep what is still valid: the context, the accepted path and everything below its end."""
        if self.state.overflowed:
            log.warning("the draft model overflows on a text: drafts end there, the text goes on")
            self._forget()
            self.session.cache.clean()
        session, state, cache, hidden = self.session, self.state, self.session.cache, self.session.hidden
        ids = self.vocabulary.context(self.context)
        if hidden is not None:
            ids = ids[hidden.first + 1 :]
        made_for = (self.settings.sampling, self.settings.vocab_size)
        # In the draft's own tokens a text may be longer than in the target's.
        self.unreadable = len(ids) > cache.capacity
        if self.reads_states:
            self.unreadable = self.unreadable or hidden is None or not hidden.covers(len(self.context))
        if self.unreadable:
            session.tokens = list(self.context)
            cache.rollback(0)
            if hidden is not None:
                hidden.true_length = 0
            session.state = self.state = DraftState()
            return
        path = self._accepted_path(ids) if state.made_for == made_for else None
        # Set now, so that the session is consistent when something below fails.
        session.tokens, session.state = [], DraftState(ids=state.ids)
        complete = path is not None and len(state.ids) + len(path) == len(ids)
        if complete and (hidden is None or self.drafted_ahead or hidden.true_length == len(ids)):
            self._keep_below(path or [], ids)
        else:
            if path and hidden is None:
                cache.keep(len(state.ids), path)
                held = cache.length
            else:  # the last token is always computed: its logits are needed
                same = takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], state.ids, strict=False))
                held = sum(1 for _ in same)
            self._read(ids, held if hidden is None else min(held, hidden.true_length), made_for)
        session.tokens = list(self.context)

    def _read(self, ids: list[int], held: int, made_for: object) -> None:
        """Have the context in the cache, which holds its first `held` tokens rightly."""
        cache, hidden = self.session.cache, self.session.hidden
        cache.rollback(held)
        self.session.state = self.state = DraftState(ids=ids[:held], made_for=made_for)
        if hidden is None:
            self._compute([ROOT], ids[held:])
        else:
            hidden.true_length = held
            self._compute([ROOT], ids[held:], states=hidden.of_entries(held, len(ids)))
            hidden.true_length = len(ids)
        self.state.ids = ids

    def _accepted_path(self, ids: list[int]) -> list[int] | None:
        """The nodes of the tokens after the old context, as far as they were drafted; None without that context."""
        old = len(self.session.tokens)
        if ROOT not in self.state.candidates or self.context[:old] != self.session.tokens:
            return None
        if ids[: len(self.state.ids)] != self.state.ids:
            return None
        path: list[int] = []
        for token in self.context[old:]:
            node = self.state.children.get((path[-1] if path else ROOT, token))
            place = len(self.state.ids) + len(path)
            if node is None or place >= len(ids) or ids[place] != self.state.node_ids[node]:
                break
            path.append(node)
        return path

    def _keep_below(self, path: list[int], ids: list[int]) -> None:
        old = self.state
        root = path[-1] if path else ROOT
        kept = old.below(root)
        self.session.cache.keep(len(old.ids), [*path, *kept])
        new = DraftState(ids=ids, made_for=old.made_for)
        places = {root: ROOT}
        new.candidates[ROOT] = old.candidates[root]
        for node in kept:
            parent = places[old.nodes.parents[node]]
            places[node] = new.add(parent, old.nodes.token_ids[node], old.node_ids[node], old.nodes.log_probs[node])
            new.candidates[places[node]] = old.candidates[node]
        self.session.state = self.state = new

    def _forget(self) -> None:
        """Drop all nodes, after a failed pass for example: only the context is certain to be in the cache."""
        self.session.cache.rollback(min(self.session.cache.length, len(self.state.ids)))
        self.session.state = self.state = DraftState(ids=self.state.ids)


def _path(tree: TokenTree, node: int) -> list[int]:
    """Places from the root to `node`."""
    path = []
    while node != ROOT:
        path.append(node)
        node = tree.parents[node]
    return path[::-1]
