"""Open forecasts on disk, and matching them with actuals; `sweep.py` stores the settled rows in the buffer.

Owns: `ledger.json` (the counters, and per open origin how many forecasts wait for which bin) and
`open_forecasts/` (one immutable file per sweep origin), both in the buffer's folder.
Does not know: where settled rows are stored; the caller stores them, then says so:

    done = ledger.settle(closed); store(done.rows); ledger.mark_settled(done, before_ms)

At every moment, and after a kill at any point: opened = settled + expired + open. A kill between
storing and marking settles the same bin again, with the same keys: the store keeps one of them. So
does a bin that late rows correct: an origin is kept, and what has no actual yet waits, until
`before_ms` has passed its target.

`open_forecasts/<origin_ms>.npz` is written once and read back at each settle horizon. It holds
`format`, `origin_ms`, `bin_ms`, `horizons` (horizon,), `quantiles` (server, metric, horizon,
quantile) float32, `is_model` (server, metric), `model_median` (server, metric, horizon) float32
before feedback (absent in format 1), and the names as UTF-8 lines in byte arrays (`servers`,
`metrics`, `model_version`, empty = fallback). The zip's own CRC-32 guards every array; nothing in
it is pickled.
"""

import io
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast import files
from fleetcast.archive import open_arrays
from fleetcast.errors import CorruptFile, SettingsError, UnknownFormat
from fleetcast.schema import ClosedBin, Codes, FleetForecast, Floats32, SettledForecasts

logger = logging.getLogger(__name__)

FOLDER = "open_forecasts"
STATE_FILE = "ledger.json"
FORMAT = 1  # of ledger.json
ORIGIN_FORMAT = 2
_KNOWN_FORMATS = (1, 2)  # format 1: no feedback, the model's median is the one given


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Forecasts since the ledger began, at the settle horizons; due = settled + expired."""

    opened: int
    due: int
    settled: int
    expired: int
    open: int


class Ledger:
    """Open forecasts that survive their process, and counters that always add up.

    Not thread safe but for `counts`: one thread owns a ledger.
    """

    def __init__(
        self, buffer_dir: Path, settle_horizons: tuple[int, ...], bin_ms: int, clock_mode: str = "system"
    ) -> None:
        """Recover the account, or begin one.

        Raises:
            SettingsError: it was kept with the other clock.
            StorageFull, StorageBroken: it cannot be written.
        """
        self._folder = buffer_dir / FOLDER
        self._state_path = buffer_dir / STATE_FILE
        self._settle_horizons = settle_horizons
        self._bin_ms = bin_ms
        self._clock_mode = clock_mode
        self._waiting: dict[int, dict[int, int]] = {}  # origin → target bin → forecasts
        self._opened = self._settled = self._expired = 0
        self.newest_origin_ms: int | None = None
        self.settled_through_ms: int | None = None
        self._recorded_ms: int | None = None  # the newest origin that `ledger.json` counts
        self._counts = LedgerCounts(0, 0, 0, 0, 0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._recover()
        except OSError as error:
            raise files.storage_error(self._folder, error) from error
        self._count()
        if not self._state_path.exists():
            self._write(self._waiting, self._settled, self._expired, self.settled_through_ms)

    @property
    def resume_bin_ms(self) -> int | None:
        """Return the newest bin whose closing was fully worked off, None for a new ledger."""
        return self.newest_origin_ms if self.newest_origin_ms is not None else self.settled_through_ms

    def counts(self) -> LedgerCounts:
        """Return the account; safe from any thread."""
        return self._counts

    def open(self, forecast: FleetForecast) -> int:
        """Keep the settle horizons of one sweep durably; return how many forecasts that are.

        A sweep that is repeated after a restart opens nothing twice.

        Raises:
            StorageFull, StorageBroken: nothing was opened.
        """
        origin = forecast.origin_ms
        if self.newest_origin_ms is not None and origin <= self.newest_origin_ms:
            return 0
        kept = cut_to_horizons(forecast, self._settle_horizons)
        counts = kept.count_by_target()
        if counts:
            write_origin(self._path(origin), kept)
        self._note_opened(origin, counts)
        return sum(counts.values())

    def begin(self, before_ms: int) -> None:
        """Note durably, in a new account only, that bins after this one are to be worked off."""
        if self.resume_bin_ms is None:
            self.newest_origin_ms = before_ms
            self._write(self._waiting, self._settled, self._expired, self.settled_through_ms)

    def pass_over(self, origin_ms: int) -> None:
        """Note that an origin is worked off without a forecast; the next write of the account says so."""
        if self.newest_origin_ms is None or origin_ms > self.newest_origin_ms:
            self.newest_origin_ms = origin_ms

    def settle(self, closed: ClosedBin) -> "Settlement":
        """Return the forecasts for a closed bin that have an actual; changes nothing.

        Args:
            closed: the whole bin, also where only a part of it was corrected.
        """
        found, left = [], {}
        for origin, targets in self._waiting.items():
            if closed.bin_ms not in targets:
                continue
            try:
                kept = read_origin(self._path(origin))
            except (CorruptFile, FileNotFoundError) as error:
                logger.error("open forecasts cannot be read and will expire: %s", error)
                continue
            found.append(match_actuals(kept, closed))
            left[origin] = kept.count_by_target().get(closed.bin_ms, 0) - len(found[-1])
        return Settlement(closed.bin_ms, _concatenate(found) if found else _NO_ROWS, left)

    def mark_settled(self, done: "Settlement", before_ms: int) -> None:
        """Note durably that a bin's rows are stored; what still waits for bins before `before_ms` expires.

        Raises:
            StorageFull, StorageBroken: call it again; until then the bin counts as open.
        """
        waiting = {origin: dict(targets) for origin, targets in self._waiting.items()}
        n_settled = 0
        for origin, left in done.left.items():
            targets = waiting.get(origin, {})
            n_new = max(0, targets.get(done.bin_ms, 0) - left)
            if done.bin_ms in targets:
                targets[done.bin_ms] -= n_new
                n_settled += n_new
        through = max(done.bin_ms, self.settled_through_ms or done.bin_ms)
        self._retire(waiting, min(before_ms, through + 1), n_settled, through)

    def expire(self, before_ms: int) -> int:
        """Give up forecasts for bins that start before `before_ms`; return how many."""
        due = [n for targets in self._waiting.values() for t, n in targets.items() if t < before_ms]
        if due:
            self._retire(self._waiting, before_ms, 0, self.settled_through_ms)
        return sum(due)

    def forget(self, servers: Collection[str]) -> None:
        """Give up what is open of some servers; it counts as expired.

        Raises:
            StorageFull, StorageBroken: call it again; origins that are done are passed over then.
        """
        waiting = {origin: dict(targets) for origin, targets in self._waiting.items()}
        n_before = sum(n for targets in waiting.values() for n in targets.values())
        for origin, targets in waiting.items():
            try:
                kept = read_origin(self._path(origin))
            except (CorruptFile, FileNotFoundError):  # it will expire
                continue
            left = kept.without(servers)
            if left is kept:
                continue
            n_left = left.count_by_target()
            for target, n_made in kept.count_by_target().items():
                if target in targets:
                    targets[target] = max(0, targets[target] - (n_made - n_left.get(target, 0)))
            write_origin(self._path(origin), left)
        n_gone = n_before - sum(n for targets in waiting.values() for n in targets.values())
        if waiting != self._waiting:
            self._write(waiting, self._settled, self._expired + n_gone, self.settled_through_ms)
            self._waiting, self._expired = waiting, self._expired + n_gone
            self._count()

    def _retire(
        self,
        waiting: dict[int, dict[int, int]],
        before_ms: int,
        n_settled: int,
        settled_through_ms: int | None,
    ) -> None:
        """Put `waiting` in force without what waits for bins before `before_ms`, file first."""
        n_waiting = sum(n for targets in waiting.values() for n in targets.values())
        waiting = {
            origin: {target: n for target, n in targets.items() if target >= before_ms}
            for origin, targets in waiting.items()
        }
        n_expired = n_waiting - sum(n for targets in waiting.values() for n in targets.values())
        is_recorded = self._recorded_ms == self.newest_origin_ms
        if waiting == self._waiting and is_recorded:  # a backfill's bins cost no write each
            self.settled_through_ms = settled_through_ms
            return
        done = [origin for origin, targets in waiting.items() if not targets]
        for origin in done:
            del waiting[origin]
        settled, expired = self._settled + n_settled, self._expired + n_expired
        self._write(waiting, settled, expired, settled_through_ms)
        self._waiting, self._settled, self._expired = waiting, settled, expired
        self.settled_through_ms = settled_through_ms
        self._count()
        for origin in done:
            files.remove_leftover(self._path(origin))

    def _note_opened(self, origin: int, counts: dict[int, int]) -> None:
        if counts:
            self._waiting[origin] = counts
        self._opened += sum(counts.values())
        self.newest_origin_ms = origin
        self._count()

    def _count(self) -> None:
        waiting = sum(n for targets in self._waiting.values() for n in targets.values())
        done = self._settled + self._expired
        self._counts = LedgerCounts(self._opened, done, self._settled, self._expired, waiting)

    def _path(self, origin_ms: int) -> Path:
        return self._folder / f"{origin_ms}.npz"

    def _write(
        self, waiting: dict[int, dict[int, int]], settled: int, expired: int, settled_through_ms: int | None
    ) -> None:
        files.write_json(
            self._state_path,
            {
                "format": FORMAT,
                "bin_ms": self._bin_ms,
                "clock_mode": self._clock_mode,
                "newest_origin_ms": self.newest_origin_ms,
                "settled_through_ms": settled_through_ms,
                "opened": self._opened,
                "settled": settled,
                "expired": expired,
                "waiting": {str(o): {str(t): n for t, n in ts.items()} for o, ts in waiting.items()},
            },
        )
        self._recorded_ms = self.newest_origin_ms

    def _recover(self) -> None:
        """Read the account; add what was opened after its last write, drop what it retired."""
        files.remove_stale_temps(self._folder)
        is_foreign = self._load_state() != self._bin_ms
        foreign = set(self._waiting) if is_foreign else set()
        counted_to = self.newest_origin_ms
        for origin in sorted(int(path.stem) for path in self._folder.glob("*.npz") if path.stem.isdigit()):
            if origin in self._waiting:
                continue
            if counted_to is not None and origin <= counted_to:  # retired; the kill came before the unlink
                files.remove_leftover(self._path(origin))
                continue
            try:
                kept = read_origin(self._path(origin))
            except CorruptFile as error:  # no counter includes it yet
                files.set_aside(self._path(origin), error)
                continue
            self._note_opened(origin, kept.count_by_target())
            if kept.bin_ms != self._bin_ms:
                foreign.add(origin)
        if foreign:
            self._expire_origins(foreign)

    def _load_state(self) -> int:
        """Read `ledger.json` and return the bin length it was kept for."""
        try:
            state = files.read_json(self._state_path)
            if state.get("format") != FORMAT:
                raise UnknownFormat(self._state_path, f"format {state.get('format')!r}", hint="expected 1")
            waiting = {int(o): {int(t): int(n) for t, n in ts.items()} for o, ts in state["waiting"].items()}
            opened, settled, expired = (int(state[key]) for key in ("opened", "settled", "expired"))
            newest, through = (_optional_int(state[k]) for k in ("newest_origin_ms", "settled_through_ms"))
            bin_ms, clock_mode = int(state["bin_ms"]), str(state["clock_mode"])
        except FileNotFoundError:
            return self._bin_ms
        except (CorruptFile, KeyError, TypeError, ValueError, AttributeError) as error:
            files.set_aside(self._state_path, error)
            return self._bin_ms
        if clock_mode != self._clock_mode:
            raise SettingsError(
                [f"clock.mode is {self._clock_mode}, but {self._state_path} was kept with {clock_mode}"],
                hint=f"start with --clock {clock_mode}, or take another --data-buffer-dir",
            )
        self._waiting, self._opened, self._settled, self._expired = waiting, opened, settled, expired
        self.newest_origin_ms, self.settled_through_ms = newest, through
        self._recorded_ms = newest
        return bin_ms

    def _expire_origins(self, origins: set[int]) -> None:
        """Give up forecasts made for bins of another length: no bin of ours is their target."""
        n_expired = sum(n for origin in origins for n in self._waiting.get(origin, {}).values())
        logger.warning("open forecasts of another bin length expire n=%d", n_expired)
        self._waiting = {o: targets for o, targets in self._waiting.items() if o not in origins}
        self._expired += n_expired
        self._write(self._waiting, self._settled, self._expired, self.settled_through_ms)
        for origin in origins:
            files.remove_leftover(self._path(origin))


@dataclass(frozen=True, slots=True, eq=False)
class Settlement:
    """A bin's forecasts with their actuals."""

    bin_ms: int
    rows: SettledForecasts
    left: Mapping[int, int]  # origin -> forecasts of this bin that have no actual yet


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


@dataclass(frozen=True, slots=True, eq=False)
class OpenForecasts:
    """The forecasts of one origin at the settle horizons."""

    origin_ms: int
    bin_ms: int
    horizons: Codes  # (horizon,)
    server_names: tuple[str, ...]
    metrics: tuple[str, ...]
    quantiles: Floats32  # (server, metric, horizon, quantile)
    is_model: NDArray[np.bool_]  # (server, metric)
    model_version: str | None
    model_median: Floats32  # (server, metric, horizon)

    def count_by_target(self) -> dict[int, int]:
        """Return how many forecasts there are for each target bin."""
        n_made = np.isfinite(self.quantiles[..., 1]).sum(axis=(0, 1))
        targets = self.origin_ms + self.horizons.astype(np.int64) * self.bin_ms
        return {int(target): int(n) for target, n in zip(targets, n_made, strict=True) if n}

    def without(self, servers: Collection[str]) -> "OpenForecasts":
        """Return the forecasts of all other servers; itself where none is of these."""
        rows = [row for row, name in enumerate(self.server_names) if name not in servers]
        if len(rows) == len(self.server_names):
            return self
        return replace(
            self,
            server_names=tuple(self.server_names[row] for row in rows),
            quantiles=self.quantiles[rows],
            is_model=self.is_model[rows],
            model_median=self.model_median[rows],
        )


def cut_to_horizons(forecast: FleetForecast, settle_horizons: tuple[int, ...]) -> OpenForecasts:
    """Return the part of a forecast that will be settled."""
    horizons = np.array(sorted(set(settle_horizons)), dtype=np.int32)
    horizons = horizons[horizons <= forecast.quantiles.shape[2]]
    median = forecast.quantiles[..., 1] if forecast.model_median is None else forecast.model_median
    return OpenForecasts(
        forecast.origin_ms,
        forecast.bin_ms,
        horizons,
        forecast.server_names,
        forecast.metrics,
        np.ascontiguousarray(forecast.quantiles[:, :, horizons - 1]),
        forecast.sources,
        forecast.model_version,
        np.ascontiguousarray(median[:, :, horizons - 1]),
    )


def write_origin(path: Path, kept: OpenForecasts) -> None:
    """Write one origin durably.

    Raises:
        StorageFull, StorageBroken: no file of that name was left.
    """
    stream = io.BytesIO()
    np.savez(
        stream,
        format=np.int64(ORIGIN_FORMAT),
        origin_ms=np.int64(kept.origin_ms),
        bin_ms=np.int64(kept.bin_ms),
        horizons=kept.horizons,
        quantiles=kept.quantiles,
        is_model=kept.is_model,
        model_median=kept.model_median,
        servers=pack_lines(kept.server_names),
        metrics=pack_lines(kept.metrics),
        model_version=pack_lines([kept.model_version or ""]),
    )
    files.write_atomic(path, stream.getvalue())


def read_origin(path: Path) -> OpenForecasts:
    """Return what `write_origin` wrote.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: it is damaged or not ours.
    """
    with open_arrays(path, "a file of open forecasts") as arrays:
        if int(arrays["format"]) not in _KNOWN_FORMATS:
            raise UnknownFormat(path, f"format {int(arrays['format'])}", hint=f"expected {ORIGIN_FORMAT}")
        quantiles = arrays["quantiles"]
        kept = OpenForecasts(
            int(arrays["origin_ms"]),
            int(arrays["bin_ms"]),
            arrays["horizons"],
            unpack_lines(arrays["servers"]),
            unpack_lines(arrays["metrics"]),
            quantiles,
            arrays["is_model"],
            arrays["model_version"].tobytes().decode() or None,
            arrays["model_median"] if "model_median" in arrays else quantiles[..., 1],
        )
    shape = (len(kept.server_names), len(kept.metrics), len(kept.horizons), 3)
    if kept.quantiles.shape != shape or kept.is_model.shape != shape[:2]:
        raise CorruptFile(path, f"quantiles of shape {kept.quantiles.shape}, expected {shape}")
    if kept.model_median.shape != shape[:3]:
        raise CorruptFile(path, f"medians of shape {kept.model_median.shape}, expected {shape[:3]}")
    found = (kept.horizons, kept.quantiles, kept.is_model, kept.model_median)
    if (kinds := "".join(array.dtype.kind for array in found)) != "ifbf":
        raise CorruptFile(path, f"arrays of kinds {kinds}, expected ifbf")
    return kept


def match_actuals(kept: OpenForecasts, closed: ClosedBin) -> SettledForecasts:
    """Return the forecasts for `closed` that have an actual value, one row each."""
    row_of = {name: row for row, name in enumerate(closed.server_names)}
    column_of = {name: column for column, name in enumerate(closed.metrics)}
    rows = np.array([row_of.get(name, -1) for name in kept.server_names], dtype=np.int64)
    columns = np.array([column_of.get(name, -1) for name in kept.metrics], dtype=np.int64)
    targets = kept.origin_ms + kept.horizons.astype(np.int64) * kept.bin_ms
    step = int(np.flatnonzero(targets == closed.bin_ms)[0])
    actual = np.full(kept.is_model.shape, np.nan)
    known = np.ix_(rows >= 0, columns >= 0)
    actual[known] = closed.values[np.ix_(rows[rows >= 0], columns[columns >= 0])]
    quantiles = kept.quantiles[:, :, step].astype(np.float64)  # (server, metric, quantile)
    server, metric = np.nonzero(np.isfinite(actual) & np.isfinite(quantiles[..., 1]))
    versions = np.full(kept.is_model.shape, None, dtype=object)
    versions[kept.is_model] = kept.model_version
    return SettledForecasts(
        origin_ms=np.full(len(server), kept.origin_ms, dtype=np.int64),
        target_ms=np.full(len(server), closed.bin_ms, dtype=np.int64),
        horizon=np.full(len(server), kept.horizons[step], dtype=np.int32),
        server_name=np.array(kept.server_names, dtype=object)[server],
        metric=np.array(kept.metrics, dtype=object)[metric],
        p10=quantiles[server, metric, 0],
        p50=quantiles[server, metric, 1],
        p90=quantiles[server, metric, 2],
        actual=actual[server, metric],
        model_version=versions[server, metric],
        model_p50=kept.model_median[server, metric, step].astype(np.float64),
    )


def pack_lines(lines: Iterable[str]) -> NDArray[np.uint8]:
    """Return lines as an array that an npz file holds without pickling."""
    return np.frombuffer("\n".join(lines).encode(), dtype=np.uint8)


def unpack_lines(array: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return what `pack_lines` was given; nothing for an empty array."""
    text = array.tobytes().decode()
    return tuple(text.split("\n")) if text else ()


def _concatenate(parts: list[SettledForecasts]) -> SettledForecasts:
    """Return all rows in one; no parts give no rows."""
    empty = SettledForecasts(
        *(np.empty(0, dtype=np.int64),) * 2,
        np.empty(0, dtype=np.int32),
        *(np.empty(0, dtype=object),) * 2,
        *(np.empty(0, dtype=np.float64),) * 4,
        np.empty(0, dtype=object),
    )
    columns = (
        np.concatenate([getattr(part, column.name) for part in (empty, *parts)])
        for column in fields(SettledForecasts)
    )
    return SettledForecasts(*columns)


_NO_ROWS = _concatenate([])  # of most bins of a history that is brought in
