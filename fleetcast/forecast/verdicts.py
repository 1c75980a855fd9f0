"""What the trainer says about an attempt: `checkpoints/attempts/<id>.json`.

Owns: reading those files. Does not know: how the trainer's process ended (`attempts`), what a
training counts for (`training_log`).
"""

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fleetcast import files
from fleetcast.clock import from_ms
from fleetcast.errors import CorruptFile

logger = logging.getLogger(__name__)

VERDICTS_FOLDER = "attempts"
_ID_TIME = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A training that got as far as a candidate."""

    attempt_id: str
    promoted: bool
    version: str
    why: str
    at: datetime
    changed_loss: float | None = None  # on the series that changed, as a share of what served before


def read_verdict(checkpoint_dir: Path, attempt_id: str) -> Verdict | None:
    """Return the verdict on one attempt; None where there is none, or no candidate was made."""
    path = checkpoint_dir / VERDICTS_FOLDER / f"{attempt_id}.json"
    try:
        raw = files.read_json(path)
        promoted, version, why = raw.get("promoted"), raw.get("version"), raw.get("why")
        if not isinstance(promoted, bool) or not isinstance(version, str):
            return None
        changed_loss = _changed_loss(raw.get("figures"))
        return Verdict(attempt_id, promoted, version, str(why or ""), _made_at(path), changed_loss)
    except FileNotFoundError:
        return None
    except (CorruptFile, OSError) as error:
        logger.warning("a verdict cannot be read error=%s", error)
        return None


def verdicts_besides(checkpoint_dir: Path, known: Container[str]) -> Iterator[Verdict]:
    """Yield the verdicts on attempts that are not known, oldest first."""
    for path in sorted((checkpoint_dir / VERDICTS_FOLDER).glob("*.json")):
        if path.stem not in known and not path.name.startswith("."):
            verdict = read_verdict(checkpoint_dir, path.stem)
            if verdict is not None:
                yield verdict


def _changed_loss(figures: object) -> float | None:
    changed = figures.get("changed") if isinstance(figures, dict) else None
    ratio = changed.get("ratio") if isinstance(changed, dict) else None
    return float(ratio) if isinstance(ratio, int | float) else None


def _made_at(path: Path) -> datetime:
    """Return when an attempt was made: by its id, which is in the Clock's time, else by its file."""
    try:
        return datetime.strptime(path.stem.split("-")[0], _ID_TIME).replace(tzinfo=UTC)
    except ValueError:
        return from_ms(path.stat().st_mtime_ns // 1_000_000)
