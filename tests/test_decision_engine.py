"""The engine: what it decides, and that no order of events makes it train too often."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from adaptive_retraining_daemon import RetrainingDecisionEngine
from fleetcast.clock import FakeClock, Uptime
from fleetcast.errors import BadData
from fleetcast.retraining.state import RetrainingState, load_state, save_state
from fleetcast.settings import DecisionSettings

DRIFT = {
    "per": 0.2,
    "dss": 0.3,
    "fds": 0.1,
    "anomaly_rate": 0.0,
    "combined_score": 0.2,
    "needs_retraining": True,
}
HEALTHY = {**DRIFT, "needs_retraining": False}


def engine_at(clock: FakeClock, **limits: float) -> RetrainingDecisionEngine:
    return RetrainingDecisionEngine(**limits, clock=clock, wall_clock=clock)  # type: ignore[arg-type]


def says(engine: RetrainingDecisionEngine, **arguments: bool) -> bool:
    return bool(engine.should_retrain(DRIFT, **arguments)["should_retrain"])


def test_drift_in_a_quiet_period_trains() -> None:
    decision = engine_at(FakeClock()).should_retrain(DRIFT)
    assert decision["should_retrain"] is True
    assert decision["reason"].startswith("drift: per 0.200, dss 0.300")


@pytest.mark.parametrize(
    ("drift", "is_quiet", "hours", "reason"),
    [
        (HEALTHY, False, 1, "no drift"),
        (DRIFT, False, 1, "not a quiet period"),
        (DRIFT, True, 1, "1.00 h since the last training, at least 6 h apart"),
    ],
)
def test_the_reason_of_a_refusal_is_the_first_failing_step(
    drift: dict[str, object], is_quiet: bool, hours: float, reason: str
) -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_training()
    clock.advance(hours=hours)
    decision = engine.should_retrain(drift, is_quiet)
    assert decision["should_retrain"] is False
    assert decision["reason"].startswith(reason)


def test_every_safeguard_is_always_reported() -> None:
    for drift, is_quiet in ((DRIFT, True), (DRIFT, False), (HEALTHY, True)):
        found = engine_at(FakeClock()).should_retrain(drift, is_quiet)["safeguards"]
        assert found.keys() == {
            "min_hours_between_training",
            "max_trainings_per_week",
            "failure_backoff",
            "max_days_without_training",
        }
        assert all({"value", "limit", "passed"} <= check.keys() for check in found.values())


def test_six_hours_are_enough_and_a_second_less_is_not() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_training()
    clock.advance(hours=6, seconds=-1)
    assert not says(engine)
    clock.advance(seconds=1)
    assert says(engine)


def test_a_fourth_training_waits_until_the_first_is_a_week_old() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    for _ in range(3):
        engine.record_training(promoted=False)
        clock.advance(hours=12)
    clock.advance(days=7, hours=-36, seconds=-1)
    decision = engine.should_retrain(DRIFT)
    assert decision["reason"].startswith("3 trainings in the last 7 days, limit 3")
    clock.advance(seconds=1)
    assert says(engine)


def test_a_rejected_training_counts_for_the_limits_but_not_as_a_promoted_one() -> None:
    engine = engine_at(FakeClock())
    engine.record_training(promoted=False)
    assert not says(engine)
    assert engine.log.total_promoted == 0


def test_thirty_days_without_training_ask_for_one_but_still_need_quiet() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_training()
    clock.advance(days=30)
    assert engine.should_retrain(HEALTHY)["reason"] == "30.0 days without training, limit 30"
    assert engine.should_retrain(HEALTHY)["should_retrain"] is True
    assert engine.should_retrain(HEALTHY, False)["should_retrain"] is False


def test_without_any_training_the_thirty_days_count_from_the_installation() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.log = replace(engine.log, installed_at=clock.now() - timedelta(days=30))
    assert engine.should_retrain(HEALTHY)["should_retrain"] is True
    engine.log = replace(engine.log, installed_at=clock.now() - timedelta(days=29))
    assert engine.should_retrain(HEALTHY)["should_retrain"] is False


def test_an_initial_training_needs_no_drift_but_the_safeguards() -> None:
    engine = engine_at(FakeClock())
    assert engine.should_retrain(HEALTHY, initial_due=True)["should_retrain"] is True
    engine.record_training(promoted=False)
    assert engine.should_retrain(HEALTHY, initial_due=True)["should_retrain"] is False


def test_a_failed_training_backs_off_from_15_minutes_doubling_to_6_hours() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    waited = []
    for _ in range(7):
        engine.record_failure()
        assert not says(engine)
        waited.append(engine.backoff.remaining_s(clock.now()) / 60)
        clock.advance(minutes=waited[-1])
        assert says(engine)
    assert waited == [15, 30, 60, 120, 240, 360, 360]
    engine.record_training()
    assert engine.backoff.failures == 0


def test_not_enough_data_pauses_without_being_a_failure() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_pause(3600)
    assert not says(engine)
    clock.advance(hours=1)
    assert says(engine)
    assert engine.backoff.failures == 0


def test_the_back_off_is_wall_time_whatever_the_data_clock_does() -> None:
    data, wall = FakeClock(), FakeClock()
    engine = RetrainingDecisionEngine(clock=data, wall_clock=wall)
    engine.record_failure()
    data.advance(days=40)
    assert not says(engine)
    wall.advance(minutes=15)
    assert says(engine)


def test_entries_of_the_future_are_taken_as_made_now_once() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_training()
    clock.advance(days=-2)
    assert not says(engine)
    clock.advance(hours=6)
    assert says(engine), "6 hours after the step, not 2 days and 6 hours"


def test_a_small_step_back_is_no_reason_to_rewrite_history() -> None:
    clock = FakeClock()
    engine = engine_at(clock)
    engine.record_training()
    before = engine.log
    clock.advance(minutes=-4)
    assert not says(engine)
    assert engine.log is before


def test_a_clock_set_forward_does_not_make_a_training_old() -> None:
    clock, seconds = FakeClock(), [1000.0]
    engine = RetrainingDecisionEngine(
        clock=clock, wall_clock=clock, uptime=lambda: Uptime("boot", seconds[0])
    )
    engine.record_training()
    clock.advance(days=1)
    seconds[0] += 60
    assert not says(engine)
    seconds[0] += 6 * 3600
    assert says(engine)


def test_settings_go_before_the_arguments() -> None:
    clock = FakeClock()
    engine = engine_at(clock, min_hours_between_training=6)
    engine.override(DecisionSettings(min_hours_between_training=1.0))
    engine.record_training()
    clock.advance(hours=1)
    assert says(engine)


def test_a_clock_set_forward_after_a_reboot_does_not_either() -> None:
    clock, booted = FakeClock(), [Uptime("first", 1000.0)]
    engine = RetrainingDecisionEngine(clock=clock, wall_clock=clock, uptime=lambda: booted[0])
    engine.record_training()
    clock.advance(hours=1)
    booted[0] = Uptime("second", 30.0)
    engine.settle()
    clock.advance(days=1)
    assert not says(engine)
    booted[0] = Uptime("second", 30.0 + 5 * 3600)
    assert says(engine), "one hour before the reboot, five after it"


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "6", None, True])
def test_a_limit_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(BadData, match="max_trainings_per_week must be a number >= 0"):
        RetrainingDecisionEngine(max_trainings_per_week=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("metrics", [{}, {"needs_retraining": "yes"}, {"needs_retraining": None}, None, [1]])
def test_drift_metrics_of_another_shape_are_refused(metrics: object) -> None:
    with pytest.raises(BadData, match="drift_metrics must hold needs_retraining: true or false"):
        RetrainingDecisionEngine().should_retrain(metrics)  # type: ignore[arg-type]


@dataclass
class World:
    """True time, and a clock that may be set to anything."""

    true_s: float = 0.0
    clock: FakeClock = field(default_factory=FakeClock)
    boot: int = 0
    booted_s: float = -50_000.0

    def uptime(self) -> Uptime:
        return Uptime(f"boot-{self.boot}", self.true_s - self.booted_s)

    def pass_(self, seconds: float) -> None:
        self.true_s += seconds
        self.clock.advance(seconds=seconds)


class TooOften(RuleBasedStateMachine):
    """Any order of drift, quiet, failures, restarts, reboots and clock steps."""

    path: Path

    @initialize()
    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.world = World()
        self.trained_s: list[float] = []
        self._new_engine()

    def _new_engine(self) -> None:
        world = self.world
        self.engine = RetrainingDecisionEngine(clock=world.clock, wall_clock=world.clock, uptime=world.uptime)
        state = load_state(self.path)
        self.engine.log, self.engine.backoff = state.log, state.backoff
        self.engine.settle()
        self._save()  # as the check does that every start begins with

    def _save(self) -> None:
        save_state(self.path, RetrainingState(log=self.engine.log, backoff=self.engine.backoff))

    @rule(
        drift=st.sampled_from([DRIFT, DRIFT, DRIFT, HEALTHY]),
        is_quiet=st.sampled_from([True, True, True, False]),
        initial_due=st.booleans(),
        outcome=st.sampled_from(["promoted", "rejected", "failed", "not enough"]),
        minutes=st.floats(0, 90),
    )
    def check(self, drift: dict, is_quiet: bool, initial_due: bool, outcome: str, minutes: float) -> None:
        if not self.engine.should_retrain(drift, is_quiet, initial_due=initial_due)["should_retrain"]:
            self._save()
            return
        started_s = self.world.true_s
        self.world.pass_(minutes * 60)
        if outcome == "failed":
            self.engine.record_failure()
        elif outcome == "not enough":
            self.engine.record_pause(3600)
        else:
            self.trained_s.append(started_s)
            self.engine.record_training(outcome == "promoted")
        self._save()

    @rule(hours=st.one_of(st.floats(0, 8), st.floats(0, 200)))
    def time_passes(self, hours: float) -> None:
        self.world.pass_(hours * 3600)

    @rule(hours=st.one_of(st.floats(-30, 30), st.floats(-2000, 2000)))
    def the_clock_is_set(self, hours: float) -> None:
        self.world.clock.advance(hours=hours)

    @rule()
    def the_daemon_restarts(self) -> None:
        self._new_engine()

    @rule(hours=st.floats(-30, 0))
    def the_machine_reboots_and_its_clock_loses_time(self, hours: float) -> None:
        """A reboot with a clock set forward is the one thing no program on the machine can know."""
        settled = self.engine.log.without_future(self.world.clock.now())
        ages = [self.world.true_s - at for at in self.trained_s]
        believed = settled.ages_s(self.world.clock.now(), None)
        if any(age < float(claimed) - 1 for age, claimed in zip(reversed(ages), believed, strict=False)):
            return
        self.world.boot += 1
        self.world.booted_s = self.world.true_s
        self.world.clock.advance(hours=hours)
        self._new_engine()

    @invariant()
    def never_two_within_six_hours(self) -> None:
        times = getattr(self, "trained_s", [])
        assert all(late - early >= 6 * 3600 - 1e-3 for early, late in pairwise(times))

    @invariant()
    def never_a_fourth_within_a_week(self) -> None:
        times = getattr(self, "trained_s", [])
        assert all(late - early >= 7 * 86_400 - 1e-3 for early, late in zip(times, times[3:], strict=False))


def test_never_two_in_six_hours_nor_four_in_a_week(tmp_path: Path) -> None:
    TooOften.path = tmp_path / "retraining_state.json"
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        TooOften, settings=settings(deadline=None, max_examples=60, stateful_step_count=40)
    )


@pytest.mark.parametrize("gap_minutes", [5, 17, 61])
def test_constant_drift_trains_three_times_a_week_and_no_more(gap_minutes: int) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    clock = FakeClock(start)
    engine, trained = engine_at(clock), 0
    while clock.now() < start + timedelta(days=28):
        if says(engine):
            trained += 1
            engine.record_training(promoted=trained % 2 == 0)
        clock.advance(minutes=gap_minutes)
    assert trained == 12, "it is blocked no longer than it must be, either"
