"""The gate: a challenger goes into service only if clients get better forecasts on data it never saw.

Owns: the comparison of two sides' losses, and the rule. Does not know: which data are held out
(`holdout`), how the expert layer is replayed (`served`), how a model is trained, versions, files.

The champion is the model in service, or the fallback while there is none.

The rule. On the changed series (on all series, where no change is known) the challenger's *served*
loss, that of its forecasts once the expert layer has mixed them, is lower than the champion's and
stays lower in 9 of 10 resamples. The first model of a fleet has to beat the fallback in the same
way, besides the shipped base. Harm: on the unchanged series neither the served loss nor the raw one
(what the models alone say) is more than 2 % higher in all or, metric by metric, surely more than 5 %
higher. The raw figures are reported beside the served ones; where clients get the model's own
forecasts (`forecast.feedback = "off"`) they decide. Where a change decides, series that both sides
forecast by the very same weights (a specialist's training leaves them alone) are not counted: they
would hide harm to others, and one series that gains among three that stay is a gain, whichever
servers are drawn.

A resample draws blocks of time (up to 2 h of origins) and servers, each with replacement, and
takes every drawn server in every drawn block: one bad hour of the whole fleet and one odd server
both count once. Source: Owen, The pigeonhole bootstrap (Annals of Applied Statistics 1, 2007).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.schema import Floats, Longs
from fleetcast.training.holdout import Losses

MAX_HARM = 1.02
MAX_METRIC_HARM = 1.05
CONFIDENCE = 0.9
MIN_BLOCKS = 3  # with fewer, resampling says nothing
_BLOCK_BINS, _FEWEST_BLOCK_BINS, _USUAL_BLOCKS = 24, 3, 6
_RESAMPLES = 1000
_OF_CHAMPION, _OF_FALLBACK = "the champion's", "the fallback's"


@dataclass(frozen=True)
class GateVerdict:
    """The answer with its figures, as the manifest keeps them."""

    promoted: bool
    why: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One side's losses against another's, on the windows both know.

    The ratio is challenger / other; the two shares say how often it is below and above 1 in resamples.
    """

    windows: int
    blocks: int  # of time
    ratio: float | None  # None: no window
    confidence: float | None  # share of resamples with a lower loss
    doubt: float | None  # share of resamples with a loss above the limit asked about

    def as_figures(self) -> dict[str, Any]:
        """Return what the manifest keeps."""
        return {"windows": self.windows, "ratio": self.ratio, "confidence": self.confidence}


@dataclass(frozen=True, eq=False)
class Sides:
    """What each side's forecasts cost, on the same windows."""

    challenger: Losses
    champion: Losses
    fallback: Losses | None = None  # has to be beaten, too; None = beating the champion is enough


def judge(
    raw: Sides,
    is_changed: NDArray[np.bool_],
    metrics: Sequence[str],
    seed: int,
    served: Sides | None = None,
) -> GateVerdict:
    """Decide by paired losses on the same windows.

    Args:
        raw: of what the models say.
        is_changed: (server, metric) series that are known to have changed.
        served: of what clients get; None = they get what the models say.
    """
    unchanged = ~is_changed
    if is_changed.any():
        touched = ~_is_untouched(raw.challenger, raw.champion)
        is_changed, unchanged = (_if_any(group & touched, group) for group in (is_changed, unchanged))
    question = _Question(is_changed, unchanged, tuple(metrics), seed)
    by_models = by_clients = question.ask("", raw)
    figures = by_models.figures()
    if served is not None:
        by_clients = question.ask("served ", served)
        figures["served"] = by_clients.figures()
    if not raw.challenger.is_finite:
        return GateVerdict(False, "its forecasts are not finite", figures)
    why = by_clients.why_not_better() or by_clients.harm() or by_models.harm()
    return GateVerdict(not why, why or f"better: {by_clients.gain()}", figures)


def compare(
    challenger: Losses, other: Losses, chosen: NDArray[np.bool_], seed: int, limit: float = 1.0
) -> Comparison:
    """Return how a challenger's losses compare on the chosen series (server, metric)."""
    known = np.isfinite(challenger.pinball) & np.isfinite(other.pinball) & chosen
    n_window = int(known.sum())
    if not n_window:
        return Comparison(0, 0, None, None, None)
    blocks = _time_blocks(challenger.origins, np.asarray(known.any(axis=(1, 2))))
    ours, theirs = (_block_sums(side.pinball, known, blocks) for side in (challenger, other))
    total = float(theirs.sum())
    ratio = float(ours.sum()) / total if total > 0 else 1.0
    random = np.random.default_rng(seed)
    lower = _resample(theirs - ours, random) > 0
    beyond = _resample(ours - limit * theirs, random) > 0
    return Comparison(
        n_window, len(ours), round(ratio, 4), round(float(lower.mean()), 3), round(float(beyond.mean()), 3)
    )


@dataclass(frozen=True, eq=False)
class _Question:
    """Which series are compared, and how."""

    is_changed: NDArray[np.bool_]
    unchanged: NDArray[np.bool_]
    metrics: tuple[str, ...]
    seed: int

    def ask(self, kind: str, sides: Sides) -> "_Answers":
        """Compare the sides.

        Args:
            kind: of the losses, as the verdict's words name them.
        """
        ours, theirs = sides.challenger, sides.champion
        by_metric = {
            metric: compare(ours, theirs, _only(self.unchanged, column), self.seed, limit=MAX_METRIC_HARM)
            for column, metric in enumerate(self.metrics)
        }
        everything = np.ones_like(self.is_changed)
        return _Answers(
            kind,
            compare(ours, theirs, self.is_changed, self.seed),
            compare(ours, theirs, self.unchanged, self.seed, limit=MAX_HARM),
            by_metric,
            compare(ours, sides.fallback, everything, self.seed) if sides.fallback else None,
            has_change=bool(self.is_changed.any()),
        )


@dataclass(frozen=True)
class _Answers:
    """How a challenger compares by one kind of loss."""

    kind: str
    changed: Comparison
    unchanged: Comparison
    by_metric: Mapping[str, Comparison]
    fallback: Comparison | None
    has_change: bool

    @property
    def _deciding(self) -> tuple[Comparison, str]:
        if self.has_change:
            return self.changed, "changed series"
        return self.unchanged, "all series"

    def figures(self) -> dict[str, Any]:
        """Return what the manifest keeps."""
        found = {"changed": self.changed.as_figures(), "unchanged": self.unchanged.as_figures()}
        found["unchanged"]["by_metric"] = {metric: item.ratio for metric, item in self.by_metric.items()}
        if self.fallback:
            found["fallback"] = self.fallback.as_figures()
        return found

    def gain(self) -> str:
        """Return the gain that decides, in words."""
        found, where = self._deciding
        return _describe(found, f"{self.kind}loss on {where}", _OF_CHAMPION)

    def why_not_better(self) -> str:
        """Return why the other sides are not beaten, "" where they are."""
        found, where = self._deciding
        why = _not_better(found, self.kind, where, _OF_CHAMPION)
        if not why and self.fallback:
            why = _not_better(self.fallback, self.kind, "all series", _OF_FALLBACK)
        return why

    def harm(self) -> str:
        """Return what would be harmed, "" where nothing."""
        ratio = self.unchanged.ratio
        if ratio is not None and ratio > MAX_HARM:
            return f"harms: {self.kind}loss on unchanged series is {ratio:.3f}, limit {MAX_HARM}"
        for metric, found in self.by_metric.items():
            if found.ratio is None or found.doubt is None or found.blocks < MIN_BLOCKS:
                continue
            if found.ratio > MAX_METRIC_HARM and found.doubt >= CONFIDENCE:
                what = f"{self.kind}loss on unchanged {metric}"
                return f"harms: {what} is {found.ratio:.3f}, limit {MAX_METRIC_HARM}"
        return ""


def _if_any(chosen: NDArray[np.bool_], otherwise: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return chosen if chosen.any() else otherwise


def _is_untouched(challenger: Losses, champion: Losses) -> NDArray[np.bool_]:
    """Return the series (server, metric) whose every window costs both sides the same.

    The same weights in passes of other windows differ in the last digits.
    """
    same = np.isclose(challenger.pinball, champion.pinball, rtol=1e-4, atol=1e-6, equal_nan=True)
    return np.asarray(same.all(axis=0))


def _only(mask: NDArray[np.bool_], column: int) -> NDArray[np.bool_]:
    chosen = np.zeros_like(mask)
    chosen[:, column] = mask[:, column]
    return chosen


def _not_better(found: Comparison, kind: str, where: str, whom: str) -> str:
    """Return why a challenger does not beat the other side, "" where it does."""
    if found.ratio is None or found.confidence is None:
        return f"nothing to judge by: the held-out tail holds no window of {where}"
    if found.blocks < MIN_BLOCKS:
        return (
            f"too little is held out of {where}: {found.windows} windows in {found.blocks} blocks "
            f"of time, needed {MIN_BLOCKS}"
        )
    if found.ratio >= 1 or found.confidence < CONFIDENCE:
        told = _describe(found, f"{kind}loss on {where}", whom)
        return f"not better: {told}, needed < 1 and {CONFIDENCE}"
    return ""


def _describe(found: Comparison, what: str, whom: str) -> str:
    return f"{what} is {found.ratio:.3f} of {whom}, confidence {found.confidence:.3f}"


def _time_blocks(origins: Longs, has_window: NDArray[np.bool_]) -> Longs:
    """Return the block of each origin: 2 h, or a sixth of a shorter span, down to 15 min."""
    used = origins[has_window]
    span = int(used[-1] - used[0]) + 1
    length = max(_FEWEST_BLOCK_BINS, min(_BLOCK_BINS, span // _USUAL_BLOCKS))
    return np.asarray(np.maximum(origins - used[0], 0) // length, np.int64)


def _block_sums(losses: Floats, known: NDArray[np.bool_], blocks: Longs) -> Floats:
    """Return summed losses (block, server), of blocks and servers that hold a window."""
    kept = np.where(known, losses, 0.0).sum(axis=2)  # (origin, server)
    counts = known.sum(axis=2)
    sums, seen = (np.zeros((int(blocks.max()) + 1, kept.shape[1])) for _ in range(2))
    np.add.at(sums, blocks, kept)
    np.add.at(seen, blocks, counts)
    return np.asarray(sums[seen.any(axis=1)][:, seen.any(axis=0)])


def _resample(gains: Floats, random: np.random.Generator) -> Floats:
    """Return the summed gain (resample,) of redrawn blocks and servers."""
    n_block, n_server = gains.shape
    times = random.multinomial(n_block, np.full(n_block, 1 / n_block), size=_RESAMPLES)
    servers = random.multinomial(n_server, np.full(n_server, 1 / n_server), size=_RESAMPLES)
    return np.asarray(((times @ gains) * servers).sum(axis=1))
