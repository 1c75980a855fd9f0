"""The alerts of one retraining daemon: facts in, messages out, after each check and beside it.

Owns: which facts a check and the inference daemon's answers hold, the order of a round (judge, save,
send, save what was taken), the threads: one for the rounds and one for each channel at work, so that no
channel delays a check, and none another. Does not know: when an alert fires (`rules`), what a message
says (`messages`), how it travels (`channels`).

Each message is sent at least once: what a channel took is saved right after, so only a kill in between
sends one twice. A channel that takes too long counts as failed; if it answers later, that still counts.
"""

import contextlib
import logging
import queue
import shutil
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from fleetcast.alerts.channels import AlertmanagerChannel, Channel, HeartbeatChannel, make_channels
from fleetcast.alerts.messages import Notice, note_told, plan, within_limit
from fleetcast.alerts.rules import PENDING, Alert, Facts, Sample, judge, parse_rules
from fleetcast.alerts.state import (
    ALERTS_FILE,
    SILENCES_FILE,
    AlertState,
    Silence,
    read_silences,
    save_state,
    state_at_start,
)
from fleetcast.clock import Clock, SystemClock, monotonic, parse_plain_utc
from fleetcast.errors import DaemonAway, FleetcastError, NotDelivered, OwnershipLost
from fleetcast.outbound import cause
from fleetcast.settings import Settings
from fleetcast.sources.client import DaemonClient
from fleetcast.workers import Workers, WorkerThread

logger = logging.getLogger(__name__)

CAPACITY = "/capacity?limit=90&min_p=0.05&rows=1000"
DATES = "/capacity/dates?rows=1000"
_OVER, _FULL = "over", "it was over the limit"  # state of a row; why a row has no date
_READY = "ready"
_PAGE, _MOST_SILENT = 200, 1000  # servers of an answer, and in all
_NOT_KNOWN = (DaemonAway, KeyError, TypeError, ValueError)  # an older daemon, or one that says less
_DAY_S, _GB = 86_400.0, 1e9
_LOST_S = 600.0  # a thread that still hangs then is given up
_SLACK_S = 0.5  # beyond a channel's limit, for what it does itself
_POLL_S = 0.05

_Parcel = tuple[Notice | None, Callable[[], str]]  # None: everything, to an Alertmanager


@dataclass(frozen=True, slots=True)
class CheckFigures:
    """What a check of the retraining daemon knows."""

    drift_score: float | None  # combined; None: no verdict
    training_failures: int
    trainings_7d: int
    held_since: datetime | None = None  # or paused
    error_ratio: float | None = None  # of what clients got, to repeating the last value
    taken_back: tuple[datetime, str] | None = None  # when a new model was, without a person, and why
    failure: str = ""  # why there was no check: then nothing else is known


@dataclass(frozen=True, slots=True)
class _Outcome:
    channel: str
    notice: Notice | None  # None: a channel that is sent everything
    error: NotDelivered | None
    at: datetime
    said: str = ""  # by the other side; "" = there was nothing to send


class AlertEngine:
    """Notes checks; a thread judges and sends. Only the owner of the folder may call `note`."""

    def __init__(self, settings: Settings, folder: Path = Path(), clock: Clock | None = None) -> None:
        """Prepare it; nothing is read, and nothing started.

        Raises:
            SettingsError: rules or addresses are wrong.
        """
        self._settings, self._retraining = settings.alerts, settings.retraining
        self._clock = clock or SystemClock()
        self._rules = parse_rules(settings.alerts.rules)
        self._channels = make_channels(settings.alerts, settings.retraining.interval_s, self._clock)
        paths = settings.paths
        self._folders = (Path(paths.data_buffer_dir), Path(paths.checkpoint_dir), folder)
        self._path, self._silences = folder / ALERTS_FILE, folder / SILENCES_FILE
        self._state = AlertState()
        self._is_loaded, self._is_saved = False, True
        self._lock = threading.Lock()
        self._waiting: CheckFigures | None = None  # under the lock
        self._is_busy = False  # under the lock
        self._thread: WorkerThread | None = None
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._at_work: dict[str, tuple[WorkerThread, float]] = {}  # and since when

    def load(self) -> None:
        """Read what was told before, where that is needed and not done yet.

        Raises:
            UnknownFormat: a newer program wrote the file, which stays as it is.
        """
        if self._channels and not self._is_loaded:
            self._state, self._is_loaded = state_at_start(self._path), True

    def note(self, figures: CheckFigures) -> None:
        """Take a check in and return at once; while a round still runs, only the newest check waits."""
        if not self._channels:
            return
        with self._lock:
            self._waiting = figures
            if self._is_busy:
                return
            self._is_busy = True
        self._thread = Workers().thread("alerts", self._work, once=True)
        self._thread.start()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note a check that fails inside, and let the error go on."""
        try:
            yield
        except OwnershipLost:  # nothing may be written any more
            raise
        except Exception as error:
            why = str(error) if isinstance(error, FleetcastError) else type(error).__name__
            self.note(CheckFigures(None, 0, 0, failure=why))
            raise

    def finish(self, limit_s: float) -> bool:
        """Wait for what was noted to be sent; return whether it was dealt with in time."""
        return self._thread is None or self._thread.join(limit_s)

    def _work(self) -> None:
        try:
            while (figures := self._take()) is not None:
                self._round(figures)
        except BaseException:
            with self._lock:
                self._is_busy = False
            raise

    def _take(self) -> CheckFigures | None:
        with self._lock:
            figures, self._waiting = self._waiting, None
            self._is_busy = figures is not None
            return figures

    def _round(self, figures: CheckFigures) -> None:
        """Judge, save, send, and save what each channel took."""
        self.load()
        wanted = {rule.fact for rule in self._rules}
        disks = {"free_disk_gb": tuple(_free_disks(self._folders))}
        facts = {**facts_of_check(figures, self._clock.now()), **disks, **self._ask(wanted)}
        self._drain()  # of channels that took longer than they may
        now, names = self._clock.now(), [channel.name for channel in self._channels]
        before = self._state.settle(names, now)
        alerts = judge(self._rules, facts, before.alerts, now)
        _log_changes(before.alerts, alerts)
        self._keep(replace(before, alerts=alerts).settle(names, now))
        self._send(now, read_silences(self._silences, now), is_good=not figures.failure)

    def _ask(self, wanted: Container[str]) -> Facts:
        url, timeout_s = self._retraining.daemon_url, self._retraining.request_timeout_s
        with DaemonClient(url, timeout_s=timeout_s) as client:
            return facts_of_daemon(client, wanted, self._clock.now())

    def _send(self, now: datetime, silences: Sequence[Silence], *, is_good: bool) -> None:
        """Let all channels work at once, and wait for them within the limit."""
        begun: dict[str, WorkerThread] = {}
        for channel in self._channels:
            parcels = self._pack(channel, now, silences)
            if parcels and self._may_send(channel, now, is_good):
                work = partial(self._deliver, channel.name, parcels)
                thread = Workers().thread(f"alerts to {channel.name}", work, once=True)
                self._at_work[channel.name] = (thread, monotonic())
                begun[channel.name] = thread
                thread.start()
        limit_s = self._settings.timeout_s + _SLACK_S
        until = monotonic() + limit_s
        while monotonic() < until and any(thread.is_alive for thread in begun.values()):
            if self._drain(_POLL_S):  # a channel with much to say has the limit for each message
                until = monotonic() + limit_s
        late = [name for name, thread in begun.items() if thread.is_alive]
        self._drain()
        for name in late:
            why = NotDelivered(f"no answer within {self._settings.timeout_s:g} s")
            self._note(_Outcome(name, None, why, self._clock.now()))

    def _pack(self, channel: Channel, now: datetime, silences: Sequence[Silence]) -> list[_Parcel]:
        """Return what a channel is to be sent."""
        alerts, state = self._state.alerts, self._state.of(channel.name)
        if isinstance(channel, AlertmanagerChannel):
            send_all = partial(channel.send_all, alerts, silences, now)
            return [(None, send_all)] if any(alert.fired_at for alert in alerts) else []
        if isinstance(channel, HeartbeatChannel):
            return [(None, channel.beat)]
        notices = plan(alerts, state, silences, now, timedelta(hours=self._settings.repeat_hours))
        most = self._settings.messages_per_hour
        due = within_limit(notices, state.n_sent(now), most, can_sum_up=channel.can_sum_up)
        return [(notice, partial(channel.send, notice)) for notice in due]

    def _may_send(self, channel: Channel, now: datetime, is_good: bool) -> bool:
        """Return whether a channel is to be tried; only those for people are left alone after a failure."""
        thread, since = self._at_work.get(channel.name, (None, 0.0))
        if thread is not None and thread.is_alive and monotonic() - since <= _LOST_S:
            return False
        if isinstance(channel, HeartbeatChannel):
            return is_good
        return isinstance(channel, AlertmanagerChannel) or self._state.of(channel.name).may_try(now)

    def _deliver(self, name: str, parcels: Sequence[_Parcel]) -> None:
        """Send one after another, on the channel's own thread; the first that fails ends it."""
        for notice, send in parcels:
            error, said = None, ""
            try:
                said = send()
            except NotDelivered as failure:
                error = failure
            except Exception as failure:  # the boundary: its text may hold an address, so it goes no further
                error = NotDelivered(f"failed: {cause(failure)}")
            self._outcomes.put(_Outcome(name, notice, error, self._clock.now(), said))
            if error is not None:
                return

    def _drain(self, wait_s: float = 0.0) -> int:
        """Note what channels have done, and return how much that was; wait for the first of it."""
        n_noted = 0
        with contextlib.suppress(queue.Empty):
            self._note(self._outcomes.get(timeout=wait_s) if wait_s else self._outcomes.get_nowait())
            n_noted = 1
            while True:
                self._note(self._outcomes.get_nowait())
                n_noted += 1
        return n_noted

    def _note(self, outcome: _Outcome) -> None:
        """Keep what one channel took, or that it failed, before anything else is done."""
        channel = self._state.of(outcome.channel)
        if outcome.error is not None:
            logger.warning("alert not sent channel=%s error=%s", outcome.channel, outcome.error)
            channel = channel.after_failure(outcome.at, str(outcome.error), outcome.error.retry_after_s)
        else:
            counts = outcome.notice is not None and bool(outcome.said)
            channel = channel.after_success(outcome.at, counts=counts)
            if counts and outcome.notice:
                logger.info("alert sent channel=%s rule=%s", outcome.channel, outcome.notice.rule)
        if outcome.error is None and outcome.notice is not None:
            channel = note_told(channel, outcome.notice, outcome.at)
        self._keep(self._state.with_channel(outcome.channel, channel))

    def _keep(self, state: AlertState) -> None:
        """Hold the state, and save it; a full disk must not keep its own alert from being sent."""
        self._state = state
        try:
            save_state(self._path, state, self._settings.fleet)
            self._is_saved = True
        except FleetcastError as error:
            if self._is_saved:
                logger.error("state of alerts not saved, a restart may send some again: %s", error)
            self._is_saved = False


def _log_changes(before: Iterable[Alert], after: Iterable[Alert]) -> None:
    states = {alert.fingerprint: alert.state for alert in before}
    for alert in after:
        if alert.state != states.get(alert.fingerprint, PENDING):
            about = f" {alert.subject}" if alert.subject else ""
            logger.info("alert %s rule=%s%s: %s", alert.state, alert.rule, about, alert.sentence)


def facts_of_check(figures: CheckFigures, now: datetime) -> dict[str, tuple[Sample, ...]]:
    """Return what a check knows; without a verdict on drift there is no score, so nothing drifts."""
    failed: dict[str, tuple[Sample, ...]]
    failed = {"check_failed": (Sample.of(float(bool(figures.failure)), figures.failure),)}
    if figures.failure:
        return failed
    held, back = figures.held_since, figures.taken_back
    held_h = 0.0 if held is None else _hours(now - held)
    return {
        **failed,
        "drift_score": _known(figures.drift_score),
        "error_ratio": _known(figures.error_ratio),
        "training_failures": _known(figures.training_failures),
        "trainings_7d": _known(figures.trainings_7d),
        "held_h": _known(held_h),
        "taken_back_h": () if back is None else (Sample.of(_hours(now - back[0]), back[1]),),
    }


def _hours(length: timedelta) -> float:
    return length.total_seconds() / 3600


def _known(value: float | None) -> tuple[Sample, ...]:
    return () if value is None else (Sample.of(value),)


def _free_disks(folders: Sequence[Path]) -> Iterator[Sample]:
    """Yield the free space of each file system, named by the first folder on it."""
    seen: set[int] = set()
    for folder in folders:
        try:
            device, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        except OSError:  # not made yet
            continue
        if device not in seen:
            seen.add(device)
            yield Sample.of(free / _GB, folder=str(folder))


def facts_of_daemon(client: DaemonClient, wanted: Container[str], now: datetime) -> Facts:
    """Return what the inference daemon says; where it is away, only that is known."""
    try:
        status = client.status()
    except DaemonAway as error:
        return {"daemon_away": (Sample.of(1.0, str(error)),)}
    facts = {"daemon_away": _known(0.0), **_facts_of_status(status)}
    if "silent_h" in wanted:
        with contextlib.suppress(*_NOT_KNOWN):
            facts["silent_h"] = tuple(_silent_servers(client, parse_plain_utc(status["clock"]["now"])))
    questions: dict[str, tuple[str, Callable[[Any], Iterator[Sample]]]] = {
        "capacity_p": (CAPACITY, _near_limits),
        "disk_full_days": (DATES, partial(_dates, now=now)),
    }
    for fact, (path, read) in questions.items():
        if fact in wanted:
            with contextlib.suppress(*_NOT_KNOWN):
                facts[fact] = tuple(read(client.get(path)["rows"]))
    return facts


def _facts_of_status(status: Mapping[str, Any]) -> dict[str, tuple[Sample, ...]]:
    facts: dict[str, tuple[Sample, ...]] = {}
    with contextlib.suppress(*_NOT_KNOWN):
        is_ready = status["status"] == _READY
        facts["not_ready"] = (Sample.of(float(not is_ready), "" if is_ready else str(status["detail"])),)
        problems = [str(text) for text in status["model"]["problems"]]
        facts["model_problems"] = (Sample.of(float(len(problems)), "; ".join(problems[:1])),)
        facts["backlog"] = _known(float(status["backlog"]))
        newest, at = status["newest_record_time"], status["clock"]["now"]
        age = (parse_plain_utc(at) - parse_plain_utc(newest)).total_seconds() if newest else None
        facts["data_age_s"] = _known(age)
    return facts


def _silent_servers(client: DaemonClient, now: datetime) -> Iterator[Sample]:
    """Yield each silent server; after `forecast.gone_after_s` it is none any more."""
    for offset in range(0, _MOST_SILENT, _PAGE):
        rows = client.get(f"/ui/api/fleet?state=silent&sort=name&limit={_PAGE}&offset={offset}")["rows"]
        for row in rows:
            yield Sample.of(_hours(now - parse_plain_utc(row["seen"])), server=str(row["server"]))
        if len(rows) < _PAGE:
            return


def _near_limits(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sample]:
    """Yield each series' probability; a silent one and one over the limit keep an alert, and begin none.

    The threshold of an ordinary monitor tells of a limit that was passed; this tells of it before.
    """
    for row in rows:
        labels = {"server": str(row["server"]), "metric": str(row["metric"])}
        if row.get("silent_since"):
            yield Sample.of(None, f"its server is silent since {row['silent_since']}", **labels)
        elif row["state"] == _OVER:
            before = " or before" if row.get("since_or_before") else ""
            since = f"{row['since'] or 'some time'}{before}"
            yield Sample.of(None, f"it is over the limit since {since}", **labels)
        elif row["p"] is None:
            yield Sample.of(None, "it is not known at the moment", **labels)
        else:
            when = f"possible from {row['first_possible']}" if row["first_possible"] else ""
            yield Sample.of(float(row["p"]), when, **labels)


def _dates(rows: Sequence[Mapping[str, Any]], now: datetime) -> Iterator[Sample]:
    """Yield the days until each disk is full, at the earliest; a full one keeps an alert, and begins none."""
    for row in rows:
        if row["why_no_date"] == _FULL:
            yield Sample.of(None, "it was full on the newest whole day", server=str(row["server"]))
        elif row["full_between"]:
            early, late = row["full_between"]
            days = (parse_plain_utc(early) - now).total_seconds() / _DAY_S
            yield Sample.of(max(0.0, days), f"full between {early} and {late}", server=str(row["server"]))
