"""Is a new model worse than the one before it? Hourly losses of both, and a test for each hour.

Owns: the form of a block and of the file of a bake, the e-process, the trip wires, and the sentence that
says why. Pure: the same blocks give the same verdict, so that a crash between a verdict and its act costs
nothing. numpy only. Does not know: who measures (`serving/shadow`), what is done about a verdict (`bake`).

A block's difference is D = (new - old) / (new + old) of the losses, in [-1, 1]. The null is that the new
model's mean D, cut off at a bound, is at most `max_harm`. The e-process is exp(l S - psi(l) V), mixed over
l and over the bounds: S is the sum of the differences beyond `max_harm`, V that of their squared distances
from the mean before them, psi(l) = (-log(1 - c l) - c l) / c^2, c twice the bound. Each is a
supermartingale under the null (Howard, Ramdas, McAuliffe, Sekhon, Annals of Statistics 49, 2021, theorem 4;
for forecasters Choe and Ramdas, arXiv:2110.00115), and so is their mean: P(ever e >= 1 / alpha) <= alpha, and
it may be looked at after each block. A narrow bound sees small lasting harm, a wide one large harm among
large differences. What clients got and the models alone are tested, and share one alpha.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fleetcast.schema import Floats

FORMAT = 1
BLOCK_BINS_MS = 3_600_000  # a block is an hour of the bins that forecasts aimed at
SERVED, RAW = "served", "raw"
BOUNDS = (0.02, 0.05, 0.1, 0.2)  # of a difference; an hour of two real models differs by 0.01 to 0.05
WIRE_RATIO, WIRE_BLOCKS = 1.5, 3  # so many times the old loss, so many blocks in a row
WIRE_SWEEPS = 3  # in a row without a forecast of the new model
_N_LAMBDA = 24
_N_TESTS = 2  # that share alpha
FAR_GUARD = 1.05  # a race is not won by a model whose loss farthest ahead is so many times the other's
GOES_ON, WORSE, PASSED = "goes on", "worse", "passed"
BETTER, INCONCLUSIVE = "better", "inconclusive"  # of a race
_GOT, _WOULD_HAVE_GOT = "got", "would have got"  # a model's forecasts: in a bake, in a race


@dataclass(frozen=True, slots=True)
class Block:
    """What one whole hour showed: losses summed over pairs, in units of each series' moves."""

    start: str  # of its first bin, ISO 8601
    pairs: int
    served: tuple[float, float]  # [new, old], of what clients got or would have got
    raw: tuple[float, float]  # of the models alone
    far: tuple[float, float] | None = None  # served, at the farthest horizon; None: too few pairs


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was measured of one bake."""

    id: str  # of the switch, as the audit has it
    version: str
    against: str
    blocks: tuple[Block, ...] = ()
    void: int = 0  # hours that a restart, a gap or a failure spoiled
    small: int = 0  # whole hours with too few pairs
    failing: int = 0  # newest sweeps in a row without a forecast of the new model
    why_failing: str = ""
    unable: str = ""  # why the older model cannot be compared with any more

    def as_json(self) -> dict[str, Any]:
        """Return the content of its file."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Limits:
    """When a bake or a race ends, and what counts as worse or better."""

    bake_hours: int = 24
    min_hours: int = 24  # of a race
    max_hours: int = 168
    better_alpha: float = 0.01
    alpha: float = 0.05
    max_harm: float = 0.01


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a bake stands."""

    kind: str
    why: str
    figures: Mapping[str, Any]


def parse_evidence(raw: Mapping[str, Any]) -> Evidence:
    """Return what a file holds; KeyError, TypeError, ValueError or OverflowError where it is damaged."""
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r}, this program reads {FORMAT}")
    texts = {name: str(raw[name]) for name in ("id", "version", "against", "why_failing", "unable")}
    counts = {name: int(raw[name]) for name in ("void", "small", "failing")}
    return Evidence(**texts, **counts, blocks=tuple(map(_parse_block, raw["blocks"])))  # type: ignore[arg-type]


def _parse_block(raw: Mapping[str, Any]) -> Block:
    sums = {name: _pair(raw[name]) for name in (SERVED, RAW)}
    far = None if raw["far"] is None else _pair(raw["far"])
    return Block(str(raw["start"]), int(raw["pairs"]), sums[SERVED], sums[RAW], far)


def _pair(raw: Sequence[float]) -> tuple[float, float]:
    new, old = map(float, raw)
    if not (math.isfinite(new + old) and min(new, old) >= 0):
        raise ValueError(f"losses must be finite and >= 0, got {[new, old]}")
    return new, old


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Return whether the new model is worse, has passed, or goes on; the same evidence, the same answer."""
    figures, blocks = _figures(evidence, limits), evidence.blocks
    wire = _trip(evidence, _GOT)
    if wire:
        return Verdict(WORSE, wire, figures)
    if figures["log10_e_worse"] >= figures["log10_e_needed"]:
        return Verdict(WORSE, _say_worse(evidence, figures, limits, _GOT), figures)
    if len(blocks) >= limits.bake_hours:
        shown = f"clients got forecasts {in_words(figures['loss_ratio_served'])}"
        return Verdict(PASSED, f"{shown} over {len(blocks)} hours beside {evidence.against}", figures)
    if evidence.unable:
        return Verdict(PASSED, f"it cannot be compared any more: {evidence.unable}", figures)
    if evidence.small >= limits.bake_hours:
        why = f"in {evidence.small} hours too few forecasts differed from those of {evidence.against}"
        return Verdict(PASSED, why, figures)
    return Verdict(GOES_ON, f"{len(blocks)} of {limits.bake_hours} hours compared", figures)


def judge_race(evidence: Evidence, limits: Limits) -> Verdict:
    """Return whether a model that does not serve yet is better than the one that does."""
    found = float(log_e(-differences(evidence.blocks, SERVED)).max(initial=0.0))
    needed, hours = -math.log(limits.better_alpha), len(evidence.blocks)
    logs = {"log10_e_better": found / math.log(10), "log10_e_better_needed": needed / math.log(10)}
    figures = {**_figures(evidence, limits), **{name: round(value, 3) for name, value in logs.items()}}
    ratio, far = figures["loss_ratio_served"], figures["loss_ratio_far"]
    gain = in_words(ratio)
    said = f"clients {_WOULD_HAVE_GOT} forecasts {gain} over {hours} hours beside {evidence.against}"
    worse = evidence.unable or _trip(evidence, _WOULD_HAVE_GOT)
    if worse:
        return Verdict(WORSE, worse, figures)
    if figures["log10_e_worse"] >= figures["log10_e_needed"]:
        return Verdict(WORSE, _say_worse(evidence, figures, limits, _WOULD_HAVE_GOT), figures)
    if found >= needed and hours >= limits.min_hours and (far or 0.0) <= FAR_GUARD:
        rate = 100 * limits.better_alpha
        chance = f"which chance does for a model that is no better in at most {rate:g}% of races"
        return Verdict(BETTER, f"{said}, {chance}", figures)
    if hours >= limits.max_hours or evidence.small >= limits.max_hours:
        return Verdict(INCONCLUSIVE, f"neither is proven better: {said}", figures)
    return Verdict(GOES_ON, f"{hours} hours compared, {limits.min_hours} needed at least", figures)


def log_e(differences: Floats, bounds: Sequence[float] = BOUNDS) -> Floats:
    """Return the natural logarithm of the e-process after each block.

    Args:
        differences: (block,) whose mean is at most 0 under the null.
        bounds: at which they are cut off; the mean of the processes is taken.
    """
    return _log_mean(np.stack([_log_e(np.clip(differences, -bound, bound), bound) for bound in bounds]))


def _log_e(steps: Floats, bound: float) -> Floats:
    """Return (block,) the logarithm of one process, mixed over l."""
    sums = np.cumsum(steps)
    means = np.concatenate([[0.0], sums / np.arange(1, len(steps) + 1)])[:-1]  # before each block
    spread = np.cumsum(np.square(steps - means))
    c = 2 * bound
    lambdas = (np.geomspace(0.02, 0.95, _N_LAMBDA) / c)[:, None]
    psi = (-np.log1p(-c * lambdas) - c * lambdas) / c**2
    return _log_mean(lambdas * sums - psi * spread)


def _log_mean(logs: Floats) -> Floats:
    """Return the logarithm of the mean over the first axis."""
    top = logs.max(axis=0)
    return np.asarray(top + np.log(np.exp(logs - top).mean(axis=0)))


def differences(blocks: Sequence[Block], what: str) -> Floats:
    """Return (block,) by how much the new model's loss was larger, as a share of both."""
    sums = np.array([getattr(block, what) for block in blocks], np.float64).reshape(-1, 2)
    return np.asarray((sums[:, 0] - sums[:, 1]) / np.maximum(sums.sum(axis=1), 1e-12))


def _figures(evidence: Evidence, limits: Limits) -> dict[str, Any]:
    blocks, highest = evidence.blocks, {}
    for what in (SERVED, RAW):
        beyond = differences(blocks, what) - limits.max_harm
        highest[what] = float(log_e(beyond).max(initial=0.0))
    return {
        "hours": len(blocks),
        "hours_needed": limits.bake_hours,
        "hours_void": evidence.void,
        "pairs": sum(block.pairs for block in blocks),
        "loss_ratio_served": _ratio([block.served for block in blocks]),
        "loss_ratio_raw": _ratio([block.raw for block in blocks]),
        "loss_ratio_far": _ratio([block.far for block in blocks if block.far]),
        "log10_e_worse": round(max(highest.values()) / math.log(10), 3),
        "worst": max(highest, key=lambda what: highest[what]),
        "log10_e_needed": round(math.log10(_N_TESTS / limits.alpha), 3),
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    new, old = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return round(new / old, 4) if old > 0 else None


def _trip(evidence: Evidence, got: str) -> str:
    """Return which wire was tripped, or ""; `got` is what clients did with the new model's forecasts."""
    if evidence.failing >= WIRE_SWEEPS:
        return f"it made no forecasts in {evidence.failing} sweeps in a row: {evidence.why_failing}"
    newest = evidence.blocks[-WIRE_BLOCKS:]
    if len(newest) < WIRE_BLOCKS:
        return ""
    named = {SERVED: f"what clients {got}", RAW: "its own forecasts", "far": "farthest ahead"}
    for what, words in named.items():
        pairs = [getattr(block, what) for block in newest]
        if all(pair is not None and pair[0] > WIRE_RATIO * pair[1] for pair in pairs):
            ratio = _ratio(pairs) or 0.0
            return (
                f"{WIRE_BLOCKS} hours in a row its loss was over {WIRE_RATIO:g} times that of "
                f"{evidence.against} (now {ratio:.2f} times; {words})"
            )
    return ""


def _say_worse(evidence: Evidence, figures: Mapping[str, Any], limits: Limits, got: str) -> str:
    clients = f"clients {got} forecasts {in_words(figures['loss_ratio_served'])}"
    by_clients = figures["worst"] == SERVED
    worst = clients if by_clients else f"its own forecasts were {in_words(figures['loss_ratio_raw'])}"
    return (
        f"{worst} over {figures['hours']} hours beside {evidence.against}, which chance does to a model "
        f"that is no worse in at most {100 * limits.alpha:g}% of {'bakes' if got == _GOT else 'races'}"
        f"{'' if by_clients else f'; {clients}'}"
    )


def in_words(ratio: float | None) -> str:
    """Return a loss over another in words.

    >>> in_words(1.23), in_words(0.98), in_words(None)
    ('23.0 % further off', '2.0 % closer', 'as good')
    """
    if ratio is None or abs(ratio - 1) < 0.0005:
        return "as good"
    return f"{100 * abs(ratio - 1):.1f} % " + ("further off" if ratio > 1 else "closer")
