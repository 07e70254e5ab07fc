"""Tree rollouts (LATR): some rollouts of a group are made to differ where the model is uncertain.

Requests with the tag "tree" that arrive together and have one prompt share a tree. It follows the
likeliest token, branches where the second is nearly as likely, and drops the branches that stay
close to their parents; ordinary sampling goes on from each. Once a tree is grown its requests are
like any other with a beginning, so weights, budgets, stop strings and nuclei are as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch

from rft.config.keys import Keys
from rft.config.schema import Part
from rft.records import TREE
from rft.rollout.engine import Made, Segment
from rft.rollout.kv_cache import KVCache
from rft.rollout.transformers_engine import COMPACT_AT, TransformersEngine, _Row
from rft.rollout.tree import Branch, Likeliest, Rules, Tree


@dataclass(slots=True)
class _Plot:
    """A tree, the segments that wait for a branch of it, and the root's row, which judges ends."""

    tree: Tree
    segments: list[Segment]
    row: _Row


_Part = tuple[list[_Plot], KVCache, Sequence[int]]
"""Plots, the cache that their branches' is to be taken from, and where in it each `row` is."""


@dataclass(slots=True)
class _Grove:
    """Trees that grow together, a row for each of R branches; some rows' branches have ended.
    `token_R` is each one's last, which is not in the cache, `position_R` where it goes; `mask_RS`
    hides the padding on the left."""

    plots: list[_Plot]
    cache: KVCache
    token_R: torch.Tensor
    position_R: torch.Tensor
    mask_RS: torch.Tensor


class LatrEngine(TransformersEngine):
    """Lookahead tree-based rollouts (LATR), arXiv 2510.24302, section 3, beside ordinary ones.

    A branch takes its likeliest token. The second opens another, while the tree has fewer than it
    has requests, if its probability at temperature 1 is above `tau_abs` and less than `tau_rel`
    below that of the first. Of a child's tokens r after its birth, and its parent's since then, the
    edit distance is taken, for each r of `lookahead`; it is dropped where that is below
    `tau_ed` r. A tree is grown when `fill` of its slots are taken, less `fill_decay` times the
    share of `rollout.max_tokens` that is over, and all branches are past their last comparison; or
    after `step_limit` tokens. Slots without a branch continue the first.

    The tokens of a tree are no draws from the policy. They are forced, with the policy's own
    log-prob at the temperature of sampling, and not trained on; `train_tree` has them trained on as
    if they were sampled. While trees grow there are up to `max_sequences` rows of theirs beside
    those of ordinary sampling.

    Deviations from the authors' code, which trains on all tokens as if they were sampled:
    each tree ends by itself, not all of a batch at once, so that its rollouts do not depend on its
    neighbours; new weights end the tree phase of those that are being grown; two branches a token
    at most, and none is exempt from pruning for the symbol that it was born with; what ended stays
    when the branch it came from is dropped; where the first branch has ended, the first that has
    not is continued, and with none left, slots are sampled from the prompt; a tree of one slot is
    ordinary sampling.

    Raises RftError as `TransformersEngine` does, and for thresholds out of range.
    """

    grows_trees: ClassVar[bool] = True

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        attention: str = "sdpa",
        max_length: int,
        max_sequences: int = 256,
        threads: int = 0,
        budget: Part | None = None,
        tau_abs: float = 0.25,
        tau_rel: float = 0.15,
        tau_ed: float = 0.4,
        lookahead: Sequence[int] = (20, 30, 50),
        step_limit: int = 512,
        fill: float = 0.98,
        fill_decay: float = 0.05,
        train_tree: bool = False,
    ) -> None:
        keys = Keys("rollout.engine", self)
        keys.number("[0, 1)", tau_abs=tau_abs)
        keys.number("(0, 1]", tau_rel=tau_rel, fill=fill)
        keys.number("[0, 1]", tau_ed=tau_ed, fill_decay=fill_decay)
        keys.whole("[1, inf)", step_limit=step_limit)
        ages = tuple(lookahead)
        good = bool(ages) and all(isinstance(age, int) and age > 0 for age in ages)
        keys.require(good, "it must be whole numbers of tokens, at least 1", lookahead=ages)
        super().__init__(
            model_path,
            dtype=dtype,
            device=device,
            attention=attention,
            max_length=max_length,
            max_sequences=max_sequences,
            threads=threads,
            budget=budget,
        )
        self._rules = Rules(tau_abs, tau_rel, tau_ed, ages, step_limit, fill, fill_decay)
        self._train_tree = train_tree
        self._seeds: list[_Plot] = []
        """Trees that wait for room in the grove."""
        self._grove: _Grove | None = None

    # ---- segments

    def _begin(self, segments: Sequence[Segment]) -> None:
        groups: dict[object, list[Segment]] = {}
        for segment in filter(self._is_new, segments):
            request = self._live[segment.id].request
            key = (request.task, request.sampling, *segment.ids)
            groups.setdefault(key, []).append(segment)
        shared = [group for group in groups.values() if len(group) > 1]
        for group in shared:
            slots = min(len(group), self._max_sequences)
            longest = self._live[group[0].id].request.sampling.max_tokens
            tree = Tree(self._rules, slots, longest)
            self._seeds.append(_Plot(tree, [*group], self._row(group[0])))
        taken = {segment.id for group in shared for segment in group}
        super()._begin([segment for segment in segments if segment.id not in taken])

    def _is_new(self, segment: Segment) -> bool:
        """Whether it is the start of a response that is to be of a tree."""
        request = self._live[segment.id].request
        if request.tag != TREE:
            return False
        put = 0
        if self._budget is not None:
            stretch = self._budget.next((), request.sampling.max_tokens)
            put = 0 if stretch is None else len(stretch.forced)
        return segment.made == put

    def _step(self) -> list[Made]:
        return super()._step() + self._grow()

    def _interrupt(self) -> list[Made]:
        plots = self._grove.plots if self._grove is not None else []
        for plot in plots + self._seeds:
            self._hand_out(plot)
        self._grove, self._seeds = None, []
        return super()._interrupt()

    # ---- the tree phase

    @torch.inference_mode()
    def _grow(self) -> list[Made]:
        """A token more for each branch; the segments whose part of the tree is made by it."""
        grove, new = self._grove, self._joining()
        computed: list[tuple[list[_Plot], torch.Tensor, KVCache, Sequence[int]]] = []
        if grove is not None:
            logits_RV = self._advance_grove(grove)
            computed.append((grove.plots, logits_RV, grove.cache, range(len(grove.token_R))))
        if new:
            logits_RV, fresh, places = self._prefill([plot.row for plot in new])
            for i, plot in enumerate(new):
                plot.tree.branches[0].row = i
            computed.append((new, logits_RV, fresh, places))
        made: list[Made] = []
        parts: list[_Part] = []
        for plots, logits_BV, cache, rows in computed:
            made += self._extend(plots, logits_BV)
            left = [plot for plot in plots if not plot.tree.grown()]
            if left:
                parts.append((left, cache, rows))
            for plot in plots:
                if plot.tree.grown():
                    made += [Made(id, [], [], "length") for id in self._hand_out(plot)]
                    super()._begin(plot.segments)
        if not parts:
            self._grove = None
        elif grove is None or new or _moved(_branches(parts[0][0]), len(grove.token_R)):
            self._grove = self._arranged_grove(parts)
        else:
            grove.plots = parts[0][0]
            tokens = [0] * len(grove.token_R)
            for branch in _branches(grove.plots):
                tokens[branch.row] = branch.ids[-1]
            grove.token_R = self._tensor(tokens)
        return made

    def _joining(self) -> list[_Plot]:
        """The trees that begin to grow now."""
        free = self._max_sequences
        if self._grove is not None:
            free -= sum(len(plot.segments) for plot in self._grove.plots)
        count = 0
        for plot in self._seeds:
            free -= min(len(plot.segments), self._max_sequences)
            if free < 0:
                break
            count += 1
        joined, self._seeds = self._seeds[:count], self._seeds[count:]
        return joined

    def _advance_grove(self, grove: _Grove) -> torch.Tensor:
        """Logits [R, V] after each row's last token."""
        mask_RS = grove.mask_RS[:, : grove.cache.length + 1]
        logits_RV = self._forward(
            grove.token_R[:, None], mask_RS, grove.position_R[:, None], grove.cache
        )
        # The clamp is for rows whose branch has ended.
        grove.position_R = (grove.position_R + 1).clamp(max=self._max_length - 1)
        return logits_RV

    def _extend(self, plots: Sequence[_Plot], logits_RV: torch.Tensor) -> list[Made]:
        """Grow each tree by a token and prune it; the segments of the branches that ended."""
        branches = _branches(plots)
        scales = [plot.row.segment.temperature or 1.0 for plot in plots for _ in plot.tree.branches]
        logits_BV = logits_RV[self._tensor([branch.row for branch in branches])].float()
        p_B2, ids_B2 = torch.softmax(logits_BV, dim=-1).topk(2)
        scale_B = self._tensor(scales).float()
        logp_B2 = torch.log_softmax(logits_BV / scale_B[:, None], dim=-1).gather(1, ids_B2)
        likeliest = map(Likeliest, ids_B2.tolist(), p_B2.tolist(), logp_B2.tolist())
        made = []
        for plot in plots:
            tree = plot.tree
            tree.grow([*islice(likeliest, len(tree.branches))])
            for branch in [*tree.branches]:
                plot.row.ids = branch.ids
                why = self._why(plot.row)
                if why is not None:
                    tree.end(branch)
                    made.append(Made(self._answer(plot, branch), [], [], why))
            tree.prune()
        return made

    def _hand_out(self, plot: _Plot) -> list[int]:
        """Give each segment that waits a branch; their ids. None is left, or no branch is."""
        branches = plot.tree.branches
        ids = [self._answer(plot, branch) for branch in branches]
        if branches:
            ids += [self._answer(plot, branches[0]) for _ in [*plot.segments]]
        return ids

    def _answer(self, plot: _Plot, branch: Branch) -> int:
        """Put a branch into the response of the next segment that waits for one; its id."""
        segment = plot.segments.pop(0)
        live = self._live[segment.id]
        live.add(branch.ids, branch.logp, self._version, forced=not self._train_tree)
        return segment.id

    def _arranged_grove(self, parts: Sequence[_Part]) -> _Grove:
        """A grove of the branches that grow, whose rows become their own."""
        plots, branches, caches = [], [], []
        cached: list[int] = []
        left = 0
        for some, cache, places in parts:
            plots += some
            rows = [places[branch.row] for branch in _branches(some)]
            caches.append((cache, self._tensor(rows)))
            for plot in some:
                segment, tree = plot.row.segment, plot.tree
                made = len(tree.branches[0].ids)
                cached += [len(segment.ids) + made - 1] * len(tree.branches)
                branches += tree.branches
                left = max(left, min(segment.max_tokens, self._rules.step_limit) - made)
        for row, branch in enumerate(branches):
            branch.row = row
        width = max(cached)
        position_R = self._tensor(cached)
        slot_S = torch.arange(width + left, device=self._device)
        return _Grove(
            plots,
            KVCache.merge(caches, width, width + left),
            self._tensor([branch.ids[-1] for branch in branches]),
            position_R,
            slot_S >= (width - position_R)[:, None],
        )


def _branches(plots: Iterable[_Plot]) -> list[Branch]:
    """The branches that grow."""
    return [branch for plot in plots for branch in plot.tree.branches]


def _moved(branches: Sequence[Branch], rows: int) -> bool:
    """Whether keys and values must be copied: for a branch that was born, or as too many of the
    `rows` have lost theirs."""
    used = {branch.row for branch in branches}
    return len(used) < len(branches) or len(used) <= rows * (1 - COMPACT_AT)
