"""What the demo claims, each with the evidence found in the files and answers of the run.

Owns: the claims, the closing table, and the errors in it: the mean absolute error per group of servers,
phase and horizon, of what clients got, of the network alone, and of repeating the last value, on the same
settled forecasts. Does not know: how the run was made.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fleetcast.clock import iso_z, parse_plain_utc, to_ms
from fleetcast.demo import splice
from fleetcast.demo.harness import Seen, decisions, ledger_counts, summary
from fleetcast.demo.sabotage import Sabotage, TakenBack
from fleetcast.files import read_json
from fleetcast.schema import Floats, SettledForecasts

Mask = NDArray[np.bool_]
CONTROL_HOURS = 24.0
HORIZONS = {1: "5 min", 12: "1 h"}
BEFORE, FIRST_HOURS, NEXT_HOURS, LATER = "before", "first 6 h", "to 18 h", "later"
PHASES = {FIRST_HOURS: (0, 6), NEXT_HOURS: (6, 18), LATER: (18, None)}  # hours after the change


@dataclass(frozen=True)
class Phase:
    """Settled forecasts whose target lies in [start, end)."""

    name: str
    start: datetime
    end: datetime


@dataclass(frozen=True)
class ErrorCell:
    """The errors of one group in one phase at one horizon."""

    n: int
    ours: float  # what clients got
    model: float
    last_value: float


def keys_of(rows: SettledForecasts) -> set[tuple[int, int, str, str]]:
    """Return what identifies each forecast."""
    return set(
        zip(
            rows.origin_ms.tolist(),
            rows.horizon.tolist(),
            rows.server_name.tolist(),
            rows.metric.tolist(),
            strict=True,
        )
    )


def last_values(rows: SettledForecasts) -> Floats:
    """Return what each series was when its forecast was made; NaN where that is not settled."""
    known = {
        (target, server, metric): actual
        for target, server, metric, actual in zip(
            rows.target_ms.tolist(),
            rows.server_name.tolist(),
            rows.metric.tolist(),
            rows.actual.tolist(),
            strict=True,
        )
    }
    asked = zip(rows.origin_ms.tolist(), rows.server_name.tolist(), rows.metric.tolist(), strict=True)
    return np.array([known.get(key, np.nan) for key in asked], dtype=np.float64)


def error_table(
    rows: SettledForecasts,
    phases: Iterable[Phase],
    groups: Mapping[str, frozenset[str]],
    horizons: Iterable[int],
) -> dict[tuple[str, int, str], ErrorCell]:
    """Return the errors by (group, horizon, phase)."""
    last = last_values(rows)
    sides = [np.abs(said - rows.actual) for said in (rows.p50, rows.model_p50, last)]
    is_comparable = np.isfinite(np.stack(sides)).all(axis=0)
    table = {}
    for group, servers in groups.items():
        in_group = is_comparable & np.isin(rows.server_name.astype(str), sorted(servers))
        for horizon in horizons:
            for phase in phases:
                chosen = in_group & (rows.horizon == horizon) & in_phase(rows, phase)
                n = int(chosen.sum())
                means = [float(errors[chosen].mean()) if n else float("nan") for errors in sides]
                table[group, horizon, phase.name] = ErrorCell(n, *means)
    return table


def in_phase(rows: SettledForecasts, phase: Phase) -> Mask:
    """Return which rows belong to a phase."""
    inside: Mask = (rows.target_ms >= to_ms(phase.start)) & (rows.target_ms < to_ms(phase.end))
    return inside


@dataclass(frozen=True)
class Claim:
    """One thing that has to have happened."""

    text: str
    is_true: bool
    evidence: str


@dataclass(frozen=True)
class Outcome:
    """Everything a run left behind."""

    seen: Seen
    exit_codes: dict[str, int]
    replay: dict[str, str]
    attempts: list[dict[str, Any]]  # oldest first
    decisions: list[dict[str, Any]]  # one per check, oldest first
    contexts: dict[str, dict[str, Any]]  # training_context.json of each attempt, by its id
    ledger: dict[str, int]
    rows: SettledForecasts
    sabotage: Sabotage | None = None
    taken_back: TakenBack | None = None

    @classmethod
    def read(
        cls, folder: Path, seen: Seen, exit_codes: dict[str, int], contexts: dict[str, dict[str, Any]]
    ) -> Self:
        """Read the state and the settled forecasts of a run that has ended."""
        from fleetcast.storage.store import DataBuffer

        state = read_json(folder / "retraining_state.json")
        buffer = DataBuffer(str(folder / "data_buffer"), expire=False)
        rows = buffer.read_predictions(to_ms(splice.START), to_ms(splice.FINISH))
        return cls(
            seen=seen,
            exit_codes=exit_codes,
            replay=_sum_replays(folder),
            attempts=list(reversed(state["attempts"])),
            decisions=decisions(folder),
            contexts=contexts,
            ledger=ledger_counts(folder),
            rows=rows,
        )

    @property
    def first(self) -> dict[str, Any] | None:
        """Return the initial training."""
        return next((a for a in self.attempts if a["rule"] == "initial" and a["outcome"] == "promoted"), None)

    @property
    def second(self) -> dict[str, Any] | None:
        """Return the first training after the change."""
        return next((a for a in self.attempts if _start_time(a) >= splice.CHANGE), None)

    def served_from(self, attempt: dict[str, Any] | None) -> datetime | None:
        """Return the data time at which an attempt's model was first seen in the predictions."""
        version = attempt["version"] if attempt else None
        return next((r.data_time for r in self.seen.reloads if r.version == version), None)

    def errors(self) -> dict[tuple[str, int, str], ErrorCell]:
        """Return the closing table's cells by (group, horizon, phase)."""
        first = self.served_from(self.first)
        if first is None:
            return {}
        phases = [Phase(BEFORE, first, splice.CHANGE)]
        for name, (since, until) in PHASES.items():
            end = splice.END if until is None else splice.CHANGE + timedelta(hours=until)
            phases.append(Phase(name, splice.CHANGE + timedelta(hours=since), end))
        everyone = frozenset(self.rows.server_name.tolist())
        changed = frozenset(splice.SPLICED)
        return error_table(self.rows, phases, {"changed": changed, "unchanged": everyone - changed}, HORIZONS)


def _sum_replays(folder: Path) -> dict[str, str]:
    """Return the figures of all replays together, {} where one ended without any."""
    found = [summary(path.read_text()) for path in sorted(folder.glob("replay*.out"))]
    names = ("records", "sent", "accepted", "rejected", "requests")
    if not all(found):
        return {}
    return {name: str(sum(int(figures[name]) for figures in found)) for name in names}


def _start_time(attempt: dict[str, Any]) -> datetime:
    return parse_plain_utc(attempt["started_at"])


def claims(outcome: Outcome) -> list[Claim]:
    """Return every claim with its evidence."""
    return [
        _everything_arrived(outcome),
        _first_training(outcome),
        _control(outcome),
        _drift_names_them(outcome),
        _second_training(outcome),
        _hot_reload(outcome),
        _recovery(outcome),
        _taken_out(outcome),
        _ledger(outcome),
        Claim(
            "all processes ended with exit code 0",
            all(code == 0 for code in outcome.exit_codes.values()),
            ", ".join(f"{name} {code}" for name, code in outcome.exit_codes.items()),
        ),
    ]


def _everything_arrived(outcome: Outcome) -> Claim:
    figures = outcome.replay
    is_true = bool(figures) and figures["records"] == figures["accepted"] and figures["rejected"] == "0"
    evidence = " ".join(
        f"{key}={figures.get(key)}" for key in ("records", "accepted", "rejected", "requests")
    )
    return Claim("the inference daemon accepted every record", is_true, evidence)


def _first_training(outcome: Outcome) -> Claim:
    first, served = outcome.first, outcome.served_from(outcome.first)
    evidence = (
        f"the training of {first['started_at']} made {first['version']}, which serves since {served}"
        if first
        else "none"
    )
    return Claim(
        "the retraining daemon started a first training, and its model serves", served is not None, evidence
    )


def _control(outcome: Outcome) -> Claim:
    served = outcome.served_from(outcome.first)
    between = [a for a in outcome.attempts if served and served <= _start_time(a) < splice.CHANGE]
    judged = [
        parse_plain_utc(line["at"])
        for line in outcome.decisions
        if line["drift_status"] == "ready" and line["at"] < iso_z(splice.CHANGE)
    ]
    judged_h = splice.hours(judged[0], judged[-1]) if judged else 0.0
    served_h = splice.hours(served, splice.CHANGE) if served else 0.0
    evidence = (
        f"the model served {served_h:.1f} h of unchanged data; {len(judged)} checks judged {judged_h:.1f} h "
        f"of them; the daemon started {len(between)} trainings"
    )
    return Claim(
        f"the retraining daemon trains nothing while no server changes ({CONTROL_HOURS:.0f} h)",
        judged_h >= CONTROL_HOURS and not between,
        evidence,
    )


def _drift_names_them(outcome: Outcome) -> Claim:
    """One of 24 series may be over its limit by chance; not two, and none before what changed."""
    second = outcome.second
    context = outcome.contexts.get(second["id"], {}) if second else {}
    scores: dict[str, float] = {}
    for item in context.get("drifting", []):
        if item["is_drifting"]:
            scores[item["server"]] = max(item["score"], scores.get(item["server"], 0.0))
    named = sorted(scores, key=lambda server: -scores[server])
    changed = set(splice.SPLICED)
    told = ", ".join(f"{server} ({scores[server]:.1f} times a limit)" for server in named)
    return Claim(
        "the drift check names the changed servers first, and at most one other",
        set(named[: len(changed)]) == changed and len(named) <= len(changed) + 1,
        f"it named {told or 'no server'}",
    )


def _second_training(outcome: Outcome) -> Claim:
    second = outcome.second
    if second is None:
        return Claim("the decision engine started a training because of drift", False, "it started none")
    late_h = splice.hours(splice.CHANGE, _start_time(second))
    evidence = (
        f"{late_h:.1f} h after the change: {second['reason']}; verdict {second['outcome']} ({second['why']})"
    )
    is_true = second["rule"] == "drift" and second["outcome"] in ("promoted", "rejected")
    return Claim("the decision engine started a training because of drift", is_true, evidence)


def _hot_reload(outcome: Outcome) -> Claim:
    promoted = [attempt for attempt in outcome.attempts if attempt["outcome"] == "promoted"]
    served = [outcome.served_from(attempt) for attempt in promoted]
    seen = outcome.seen
    evidence = (
        f"{len(promoted)} trained models were promoted, {len(served) - served.count(None)} of them served; "
        f"a watcher sent {seen.requests} requests, {seen.failed} failed"
    )
    return Claim(
        "the inference daemon loaded every promoted model without a failed request",
        bool(served) and None not in served and not seen.failed,
        evidence,
    )


def _recovery(outcome: Outcome) -> Claim:
    cells = outcome.errors()
    text = "what clients get of the changed servers recovers (5 min ahead)"
    if not cells:
        return Claim(text, False, "no trained model ever served")
    first, later = cells["changed", 1, FIRST_HOURS], cells["changed", 1, LATER]
    evidence = (
        f"mean absolute error {first.ours:.2f} in the first 6 h after the change, {later.ours:.2f} after "
        f"18 h; repeating the last value: {later.last_value:.2f}"
    )
    return Claim(text, later.ours < min(first.ours, later.last_value), evidence)


def _taken_out(outcome: Outcome) -> Claim:
    """The bad model goes by itself, the model it was compared with serves, and no request failed."""
    text = "a bad model that a person put in is taken out by the daemons"
    sabotage, found = outcome.sabotage, outcome.taken_back
    if sabotage is None or found is None:
        return Claim(text, False, "it still serves")
    in_service = outcome.seen.status.get("model", {}).get("version")
    evidence = (
        f"after {found.hours} whole hours {found.by} put {found.serves} back: {found.why}; "
        f"{in_service} serves, {outcome.seen.failed} requests failed"
    )
    is_back = found.serves == sabotage.elder == in_service
    return Claim(text, is_back and not outcome.seen.failed, evidence)


def _ledger(outcome: Outcome) -> Claim:
    counts = outcome.ledger
    n_keys, n_rows = len(keys_of(outcome.rows)), len(outcome.rows)
    is_exact = counts.get("due") == counts.get("settled", 0) + counts.get("expired", 0)
    is_stored = n_rows == n_keys == counts.get("settled")
    evidence = (
        f"due {counts.get('due')}, settled {counts.get('settled')}, expired {counts.get('expired')}; "
        f"stored {n_rows}, doubled {n_rows - n_keys}"
    )
    return Claim(
        "the ledger accounts for every forecast that was due, and for none twice",
        is_exact and is_stored,
        evidence,
    )


def table(outcome: Outcome) -> str:
    """Return the closing table: errors before and after the change, and what became of the training."""
    cells, phases = outcome.errors(), (BEFORE, *PHASES)
    lines = [
        "Mean absolute error in points: what clients got / the network alone / repeating the last value",
        f"{'servers':<10} {'ahead':<6}" + "".join(f"{phase:>21}" for phase in phases),
    ]
    for group in ("changed", "unchanged"):
        for horizon, name in HORIZONS.items():
            shown = [f"{_show(cells.get((group, horizon, phase))):>21}" for phase in phases]
            lines.append(f"{group:<10} {name:<6}" + "".join(shown))
    lines.append(_training_line(outcome))
    failed = outcome.seen.failed + int(outcome.replay.get("rejected", 0))
    sent = outcome.seen.requests + int(outcome.replay.get("requests", 0))
    lines.append(f"The watcher and the replay sent {sent} requests; {failed} failed.\n")
    return "\n".join(lines)


def _training_line(outcome: Outcome) -> str:
    """Return in words what became of the trainings after the change."""
    since = [attempt for attempt in outcome.attempts if _start_time(attempt) >= splice.CHANGE]
    told = []
    for attempt in since:
        started_h = splice.hours(splice.CHANGE, _start_time(attempt))
        served = outcome.served_from(attempt)
        fate = "its model serves since" if served else "the gate kept the model in service"
        when = f" {splice.hours(splice.CHANGE, served):.1f} h" if served else ""
        told.append(f"Training {started_h:.1f} h after the change: {fate}{when} ({attempt['why']}).")
    return "\n".join(told) or "No training was started after the change."


def _show(cell: ErrorCell | None) -> str:
    if cell is None or math.isnan(cell.ours):
        return "-"
    return f"{cell.ours:.2f} / {cell.model:.2f} / {cell.last_value:.2f}"
