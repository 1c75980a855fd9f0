"""What the retraining daemon left in its files, as people read it: drift, trainings, verdicts in words.

Owns: reading those files again when they changed, and the sentences about them. They may be missing,
older, or of another version: whatever is not there is left out. Does not know: how drift is measured,
who decides to train; the formats are in docs/formats-retraining.md.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fleetcast.alerts.state import ALERTS_FILE, SILENCES_FILE, load_state, read_silences, report
from fleetcast.clock import iso_z, parse_plain_utc
from fleetcast.errors import CorruptFile
from fleetcast.files import read_json, read_json_lines

DRIFT_FILE, STATE_FILE, DECISIONS_FILE = "drift_metrics.json", "retraining_state.json", "decisions.jsonl"
SCORES = ("per", "dss", "fds", "anomaly_rate", "combined_score")
MOST_POINTS = 400  # of the scores over time
_MOST_TRAININGS = 50
_CALIBRATED = (
    "waiting_for",
    "compared_series",
    "series_in_alarm",
    "enough_days",
    "data_quality",
    "reference",
)
_OUTCOMES = {
    "promoted": "Went into service",
    "rejected": "Did not go into service",
    "running": "Is running",
    "failed": "Failed",
    "not_enough_data": "Found too little data",
    "busy": "Did not begin: another training was at work",
    "interrupted": "Was interrupted before it began",
}
_CAUSES = {
    "initial": "The first training on this fleet",
    "drift": "The fleet drifted",
    "follow_up": "A follow-up, now that more of the change is known",
    "max_days_without_training": "The last training was too long ago",
}
Document = dict[str, Any]
Point = dict[str, Any]  # "at" and a number or None for each of SCORES
_Stamp = tuple[tuple[int, int] | None, ...]  # time and size of each file


class Journal:
    """Reads the files; one thread asks at a time."""

    def __init__(self, folder: Path = Path()) -> None:
        """Read what lies in the working directory, which both daemons share, or in another folder."""
        self._drift, self._state = folder / DRIFT_FILE, folder / STATE_FILE
        self._decisions = folder / DECISIONS_FILE
        self._alerts, self._silences = folder / ALERTS_FILE, folder / SILENCES_FILE
        self._read: dict[str, tuple[_Stamp, Any]] = {}

    def newest_check(self) -> Document:
        """Return `drift_metrics.json`, empty where there is none."""
        return self._document(self._drift)

    def check_age_s(self, now: datetime) -> float | None:
        """Return how old the newest drift check is; None where there is none."""
        made_at = _moment(self.newest_check().get("made_at"))
        return None if made_at is None else max(0.0, (now - made_at).total_seconds())

    def drifting(self) -> list[Document]:
        """Return the series in alarm that the newest check names, worst first."""
        named = _dicts(self.newest_check().get("top_drifting"))
        return [{**item, "sentence": _say_drift(item)} for item in named if item.get("is_drifting")]

    def drift(self, days: float) -> Document:
        """Return the newest check and the scores of the days before it, oldest first."""
        check = self.newest_check()
        kept = ("current_metrics", "thresholds", "weights", "trends", "status", "status_reason", "basis")
        seasonal = _dict(check.get("calibrated"))
        return {
            **{name: check.get(name) for name in (*kept, "recommendation", "made_at", "window", "baseline")},
            "calibrated": {name: seasonal.get(name) for name in _CALIBRATED},
            "drifting": self.drifting(),
            "points": thin(_since(self._points(), days), MOST_POINTS),
        }

    def trainings(self) -> Document:
        """Return the attempts with their verdicts in words, newest first, and the last decision."""
        state = self._document(self._state)
        attempts = _dicts(state.get("attempts"))[:_MOST_TRAININGS]
        decision = state.get("last_decision")
        return {
            "total_promoted": state.get("total_trainings"),
            "last_training": _z(state.get("last_training_time")),
            "trainings": [_say_training(attempt) for attempt in attempts],
            "decision": _say_decision(decision) if isinstance(decision, dict) else None,
        }

    def trainings_mark(self) -> str | None:
        """Return what changes whenever a training began or ended."""
        newest = (_dicts(self._document(self._state).get("attempts")) or [{}])[0]
        return f"{newest['id']} {newest.get('outcome')}" if "id" in newest else None

    def alerts(self, now: datetime) -> Document | None:
        """Return what fires, the channels and the silences; None where no alerts are sent.

        Args:
            now: by the host's clock, as the retraining daemon's alerts are.
        """
        if not self._alerts.exists():
            return None
        try:
            return report(load_state(self._alerts), read_silences(self._silences, now), now)
        except (OSError, CorruptFile):
            return None

    def complaints(self) -> list[str]:
        """Return sentences about trainings that failed last, and about sensors that look broken."""
        state = self._document(self._state)
        found = []
        failures = _dict(state.get("backoff")).get("failures")
        if isinstance(failures, int) and failures:
            found.append(
                "The last training failed." if failures == 1 else f"The last {failures} trainings failed."
            )
        for event in _dicts(_dict(self.newest_check().get("calibrated")).get("data_quality"))[:5]:
            series = " ".join(str(event[key]) for key in ("server", "metric") if event.get(key))
            found.append(f"Data quality: {series}: {event.get('kind')} since {event.get('since')}.")
        return found

    def _points(self) -> list[Point]:
        path = self._decisions
        older = path.with_name(path.name + ".1")

        def read() -> list[Point]:
            lines: list[dict[str, Any]] = []
            for file in (older, path):
                try:
                    lines += read_json_lines(file)
                except (OSError, CorruptFile):  # the page shows the rest
                    continue
            return [point for line in lines if (point := _point(line)) is not None]

        points: list[Point] = self._kept("points", (older, path), read)
        return points

    def _document(self, path: Path) -> Document:
        def read() -> Document:
            try:
                return read_json(path)
            except (OSError, CorruptFile):
                return {}

        document: Document = self._kept(str(path), (path,), read)
        return document

    def _kept(self, name: str, paths: Sequence[Path], read: Callable[[], Any]) -> Any:
        """Return what was read of these files, and read them again if they changed."""
        stamp = tuple(_stamp(path) for path in paths)
        known = self._read.get(name)
        if known is None or known[0] != stamp:
            known = (stamp, read())
            self._read[name] = known
        return known[1]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points: of each run the last one's time, and the highest of every score.

    >>> thin([{"at": "a", "per": 0.3}, {"at": "b", "per": 0.1}], 1)
    [{'at': 'b', 'per': 0.3, 'dss': None, 'fds': None, 'anomaly_rate': None, 'combined_score': None}]
    """
    if len(points) <= most:
        return list(points)
    runs = [points[place * len(points) // most : (place + 1) * len(points) // most] for place in range(most)]
    return [
        {
            "at": run[-1]["at"],
            **{
                name: max((value for point in run if (value := point.get(name)) is not None), default=None)
                for name in SCORES
            },
        }
        for run in runs
    ]


def _since(points: Sequence[Point], days: float) -> list[Point]:
    """Return the points of the last `days` before the newest one."""
    newest = _moment(points[-1]["at"]) if points else None
    if newest is None:
        return []
    first = newest - timedelta(days=days)
    return [point for point in points if (at := _moment(point["at"])) is not None and at >= first]


def _point(line: Mapping[str, Any]) -> Point | None:
    """Return the scores of one line of `decisions.jsonl`; None where nothing was measured yet."""
    drift = line.get("drift")
    if not isinstance(drift, dict) or _moment(line.get("at")) is None:
        return None
    scores = {name: _number(drift.get(name)) for name in SCORES}
    return None if all(value is None for value in scores.values()) else {"at": line["at"], **scores}


def _say_training(attempt: Document) -> Document:
    outcome, why = str(attempt.get("outcome")), str(attempt.get("why") or "")
    started, ended = _z(attempt.get("started_at")), _z(attempt.get("ended_at"))
    verdict = _OUTCOMES.get(outcome, outcome)
    return {
        "id": attempt.get("id"),
        "started_at": started,
        "ended_at": ended,
        "outcome": outcome,
        "cause": _CAUSES.get(str(attempt.get("rule")), str(attempt.get("rule"))),
        "reason": attempt.get("reason"),
        "verdict": f"{verdict}: {why}." if why else f"{verdict}.",
        "version": attempt.get("version"),
        "version_before": attempt.get("version_before"),
    }


def _say_decision(decision: Document) -> Document:
    checks = _dict(decision.get("safeguards"))
    return {
        "at": _z(decision.get("at")),
        "should_retrain": decision.get("should_retrain") is True,
        "reason": decision.get("reason"),
        "not_quiet": decision.get("not_quiet") or "",  # states of before have none
        "safeguards": [{"name": name, **check} for name, check in checks.items() if isinstance(check, dict)],
    }


def _say_drift(item: Document) -> str:
    """Return one series in alarm as a sentence, in either basis."""
    says = item.get("says") or "differs from the data its model was trained on"
    usual, actual = _number(item.get("usual")), _number(item.get("actual"))
    change = "" if usual is None or actual is None else f": usually {usual:.4g}, now {actual:.4g}"
    return f"{says}{change}"


def _dict(value: object) -> Document:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[Document]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _moment(text: object) -> datetime | None:
    try:
        return parse_plain_utc(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _z(text: object) -> str | None:
    moment = _moment(text)
    return None if moment is None else iso_z(moment)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
