"""The state file: what people read in it, and that nothing is lost on the way through it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetcast.clock import Uptime
from fleetcast.errors import CorruptFile, UnknownFormat
from fleetcast.retraining.decision import Backoff, TrainingLog, TrainingStamp
from fleetcast.retraining.state import Attempt, RetrainingState, load_state, save_state

NOON = datetime(2025, 10, 17, 14, 23, 15, 250_000, tzinfo=UTC)
moments = st.integers(0, 4_000_000_000).map(lambda s: datetime.fromtimestamp(s, UTC).replace(microsecond=7))
stamps = st.builds(
    TrainingStamp,
    at=moments,
    promoted=st.booleans(),
    uptime=st.none() | st.builds(Uptime, boot=st.just("b-1"), seconds=st.floats(0, 1e9)),
    attempt=st.none() | st.text("abc-123", min_size=1, max_size=9),
)
states = st.builds(
    RetrainingState,
    log=st.builds(
        TrainingLog,
        stamps=st.lists(stamps, max_size=6).map(tuple),
        total_promoted=st.integers(0, 99),
        installed_at=st.none() | moments.map(lambda t: t.replace(microsecond=0)),
    ),
    backoff=st.builds(
        Backoff, failures=st.integers(0, 9), since=st.none() | moments, length_s=st.floats(0, 1e6)
    ),
    clock_mode=st.sampled_from([None, "system", "data"]),
    attempts=st.lists(
        st.builds(
            Attempt,
            id=st.text("abc", min_size=1, max_size=5),
            rule=st.just("drift"),
            reason=st.text(max_size=20),
            started_at=st.just("2026-01-01T00:00:00"),
            pid=st.none() | st.integers(1, 99_999),
            outcome=st.sampled_from(["running", "promoted", "failed"]),
        ),
        max_size=3,
    ).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(states)
def test_what_is_saved_is_loaded(state: RetrainingState) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "retraining_state.json"
        save_state(path, state)
        assert load_state(path) == state


def test_people_read_utc_times_newest_first_and_promoted_trainings_only(tmp_path: Path) -> None:
    log = TrainingLog()
    for age_h, promoted in ((48, True), (24, True), (0, False)):
        log = log.with_training(TrainingStamp(NOON - timedelta(hours=age_h), promoted))
    save_state(tmp_path / "s.json", RetrainingState(log=log, clock_mode="system"))
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["last_training_time"] == "2025-10-17T14:23:15", "what the 6 hours count from"
    assert found["training_history"] == ["2025-10-16T14:23:15", "2025-10-15T14:23:15"]
    assert (found["total_trainings"], found["timezone"]) == (2, "UTC")


def test_no_file_is_a_fresh_state(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none.json") == RetrainingState()


def test_the_printed_example_is_accepted_and_its_trainings_count(tmp_path: Path) -> None:
    example = {
        "last_training_time": "2025-10-17T14:23:15",
        "training_history": ["2025-10-17T14:23:15", "2025-10-14T03:12:45", "2025-10-10T22:45:33"],
        "total_trainings": 3,
    }
    (tmp_path / "s.json").write_text(json.dumps(example))
    state = load_state(tmp_path / "s.json")
    assert [stamp.at.isoformat()[:19] for stamp in state.log.stamps] == example["training_history"]
    assert state.log.total_promoted == 3


def test_an_unknown_format_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"format": 99}')
    with pytest.raises(UnknownFormat, match=r"state format 99 \(this program reads 1\)"):
        load_state(tmp_path / "s.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"training_history": 5}',
        '{"training_history": ["yesterday"]}',
        '{"total_trainings": "many"}',
        '{"trainings": [{"at": "2026-01-01T00:00:00"}]}',
        '{"trainings": [3]}',
        '{"backoff": {"since": 5}}',
        '{"clock_mode": 7}',
        '{"attempts_ended": {"failed": "many"}}',
        '{"attempts_ended": [3]}',
        '{"attempts": [{"id": "a"}]}',
        '{"attempts": [{"id": "a", "rule": "r", "reason": "", "started_at": "", "outcome": "odd"}]}',
        '{"attempts": [{"id": "a", "rule": "r", "reason": "", "started_at": "", "unknown": 1}]}',
    ],
)
def test_a_damaged_file_is_told_from_an_empty_state(content: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(CorruptFile):
        load_state(tmp_path / "s.json")


def test_an_attempt_is_replaced_by_its_id_and_the_newest_stands_first() -> None:
    old, new = (Attempt(id_, "drift", "", "2026-01-01T00:00:00") for id_ in ("a", "b"))
    state = RetrainingState().with_attempt(old).with_attempt(new)
    assert [attempt.id for attempt in state.attempts] == ["b", "a"]
    ended = Attempt("a", "drift", "", "2026-01-01T00:00:00", outcome="failed")
    assert [attempt.outcome for attempt in state.with_attempt(ended).attempts] == ["running", "failed"]
