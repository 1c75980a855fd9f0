"""Another model runs beside the one in service: both forecast the same windows, settled on the same actuals.

After a switch it is the model before (the bake); before one it is a version that waits (the race).

Owns: which of them goes on (`promotion.json`), the other model's predictor and its own evidence of the
expert layer, which servers are compared, and when the evidence is written. Nothing of it is served or
stored as forecasts. Does not know: when a model is worse or better (`promotion/evidence`), or what
follows (`promotion/bake`, in the retraining daemon).

Both sides are judged by what clients get: each has the layer's evidence as it was when the comparison
began, and learns on. The experts that need no model are computed once, for the model in service. When
the other model comes into service, the layer takes over what it learned of it. Whatever fails here
costs the comparison, never a forecast.
"""

import logging
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fleetcast.clock import monotonic
from fleetcast.errors import BadCheckpoint, FleetcastError
from fleetcast.forecast.encoding import is_percent
from fleetcast.forecast.experts.rules import RuleForecasts
from fleetcast.promotion.audit import Bake
from fleetcast.promotion.bake import read_evidence, write_evidence
from fleetcast.promotion.desk import STATE, Desk
from fleetcast.promotion.race import NEW, OLD, RAW, SERVED, Race
from fleetcast.schema import ClosedBin, Floats32, HistoryWindow, Longs
from fleetcast.serving.corrector import Corrector
from fleetcast.serving.history import BinHistory
from fleetcast.serving.model_loader import Champion, Predictor
from fleetcast.settings import PromotionSettings

logger = logging.getLogger(__name__)

FILE = "feedback_shadow.npz"  # the other model's evidence of the layer, in the buffer's folder
_MOST_FAILURES = 3  # sweeps in a row in which the model before fails until the bake is given up


@dataclass
class _Session:
    """One comparison, as it goes on in this process."""

    bake: Bake
    serves: int  # the side that is in service: NEW in a bake, OLD in a race
    race: Race
    predictor: Predictor
    corrector: Corrector | None = None
    parts: list["_Part"] = field(default_factory=list)  # of the present sweep
    n_failures: int = 0  # of the other model, in a row

    @property
    def other(self) -> int:
        """Return the side that runs beside."""
        return OLD if self.serves == NEW else NEW

    @property
    def other_version(self) -> str:
        """Return the version that runs beside."""
        return self.bake.against if self.serves == NEW else self.bake.version


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What the model in service said of some servers of one part of the fleet."""

    window: HistoryWindow
    rows: Longs  # that are compared
    raw: Floats32  # (row, metric, settled horizon, quantile)
    served: Floats32
    experts: RuleForecasts | None


class Shadow:
    """Runs beside the sweeps, on their thread; not thread safe, but for `seconds` and `is_comparing`."""

    def __init__(
        self,
        desk: Desk,
        history: BinHistory,
        load: Callable[[Path], Predictor],
        settings: PromotionSettings,
        horizons: Sequence[int],
        note_error: Callable[[str, Exception], None],
    ) -> None:
        self._desk, self._history = desk, history
        self._load = load
        self._settings = settings
        self._horizons = tuple(sorted(set(horizons)))
        self._note_error = note_error
        self._signature: tuple[int, int] | None = None
        self._bake: Bake | None = None
        self._race: Bake | None = None
        self._newest: Champion | None = None  # as of the last sweep
        self._session: _Session | None = None
        self._returning: Corrector | None = None  # the older model's, which is in service again
        self._kept: Corrector | None = None  # the older model's, with which the next one is compared, too
        self.seconds = 0.0  # that the newest comparison took

    @property
    def is_comparing(self) -> bool:
        """Whether another model runs beside the one in service."""
        return self._session is not None

    def follow(self, champion: Champion | None, corrector: Corrector | None, load_problem: str = "") -> None:
        """Begin, go on or end, before the layer hears of another model.

        Args:
            load_problem: why the version that should be in service cannot be loaded, or "".
        """
        try:
            self._follow(champion, corrector, load_problem)
        except Exception as error:  # nothing that a forecast needs
            self._end()
            self._note_error("shadow", error)
        self._newest = champion or self._newest

    def _follow(self, champion: Champion | None, corrector: Corrector | None, load_problem: str) -> None:
        self._read_standing()
        bake, race, session = self._bake, self._race, self._session
        version = champion.info.version if champion else None
        wanted = bake or race
        serving = None if wanted is None else wanted.version if bake else wanted.against
        if session and (wanted != session.bake or version not in (None, serving)):
            if version == session.other_version:
                self._returning = session.corrector
            goes_on = bake is not None and bake.against == session.other_version
            self._kept = session.corrector if goes_on else None
            self._end()
        if wanted is None:
            return
        if version == serving and self._session is None:
            self._session = self._begin(wanted, NEW if bake else OLD, corrector)
        elif bake and version != bake.version and load_problem:
            self._note_not_loaded(bake, load_problem)

    def return_evidence(self, corrector: Corrector) -> None:
        """Give the layer what was learned of the model that ran beside, after it came into service."""
        returning, self._returning = self._returning, None
        if returning is not None and returning.version == corrector.version:
            corrector.take_model_evidence(returning)

    def collect(
        self, window: HistoryWindow, raw: Floats32, served: Floats32, experts: RuleForecasts | None
    ) -> None:
        """Keep what the model in service said of one part of the fleet: of what is compared.

        Args:
            raw: (server, metric, horizon, quantile) the model's own, NaN where it made none.
            served: the same, as clients get them.
            experts: what went into them; None: the layer failed or is off.
        """
        session = self._session
        if session is None:
            return
        chosen = [row for row, name in enumerate(window.server_names) if name in session.race.rows]
        rows, places = np.array(chosen, np.int64), np.array(self._horizons) - 1
        if len(rows):
            series = (rows[:, None] * len(window.metrics) + np.arange(len(window.metrics))).ravel()
            own, given = (values[rows][:, :, places] for values in (raw, served))
            session.parts.append(
                _Part(window, rows, own, given, experts.of(series, places) if experts else None)
            )

    def compare(self, origin_ms: int, why_failed: str = "") -> None:
        """Let the other model forecast the same windows, once the others are published.

        Args:
            why_failed: why the model in service made no forecasts in this sweep, or "".
        """
        session = self._session
        if session is None:
            return
        started = monotonic()
        parts, session.parts = session.parts, []
        try:
            self._compare(session, parts, origin_ms, why_failed)
        except Exception as error:  # nothing that a forecast needs
            session.race.void()
            session.n_failures += 1
            self._note_error("shadow", error)
            if session.other == NEW and session.race.note_failing(str(error) or type(error).__name__):
                self._write(session.race)
            elif session.n_failures >= _MOST_FAILURES:
                self._give_up(session.race, f"{session.bake.against} fails: {error}")
                self._end()
        self.seconds = monotonic() - started

    def settle(self, closed: ClosedBin) -> None:
        """Take in a closed bin."""
        session = self._session
        if session is None:
            return
        try:
            if session.corrector:
                session.corrector.learn(closed)
            if session.race.settle(closed):
                self._write(session.race)
        except Exception as error:  # nothing that a forecast needs
            session.race.void()
            self._note_error("shadow", error)

    def forget(self, servers: Collection[str]) -> None:
        """Forget what forecasts of some servers taught about either model."""
        of_session = self._session.corrector if self._session else None
        for corrector in (of_session, self._kept, self._returning):
            if corrector:
                corrector.forget(servers)

    def save(self, *, at_once: bool = False) -> None:
        """Keep what the older model's layer learned, as `Corrector.save` does."""
        if self._session and self._session.corrector:
            self._session.corrector.save(at_once=at_once)

    def _read_standing(self) -> None:
        """Find out what should go on; the file is read again when it changed."""
        try:
            found = (self._desk.folder / STATE).stat()
            signature = (found.st_mtime_ns, found.st_ino)
        except FileNotFoundError:  # nothing stands, or the file was lost: the audit knows
            signature = self._desk.audit.signature()
        if signature != self._signature:
            standing = self._desk.standing()
            self._bake, self._race = standing.bake, standing.race
            self._signature = signature

    def _begin(self, bake: Bake, serves: int, corrector: Corrector | None) -> _Session | None:
        evidence = read_evidence(self._desk.folder, bake)
        if evidence.unable:
            return None
        history = self._history
        names = self._choose(bake, history.server_names())
        race = Race(
            evidence, names, history.metrics, self._horizons, history.bin_ms, self._settings.min_pairs
        )
        other_version = bake.against if serves == NEW else bake.version
        try:
            predictor = self._predictor(other_version)
        except Exception as error:  # its file is damaged, or its settings are others
            self._note_error("shadow", error)
            self._give_up(race, f"{other_version} cannot be loaded: {error}")
            return None
        session = _Session(bake, serves, race, predictor)
        if corrector:
            session.corrector = self._own_corrector(session, corrector, names)
        logger.info(
            "%s version=%s against=%s servers=%d hours=%d",
            "bake" if serves == NEW else "race",
            *(bake.version, bake.against, len(names), len(evidence.blocks)),
        )
        return session

    def _predictor(self, version_id: str) -> Predictor:
        """Return a model: as it served until now, or loaded."""
        if self._newest and self._newest.info.version == version_id:
            return self._newest.predictor
        version = self._desk.registry.version(version_id)
        version.verify()
        return self._load(version.model_path)

    def _own_corrector(self, session: _Session, corrector: Corrector, names: Sequence[str]) -> Corrector:
        """Return the other model's side of the layer: as kept, or as the layer stands now."""
        kept, self._kept = self._kept, None
        if kept is not None and kept.version == session.other_version:
            return kept
        if corrector.version != session.other_version:  # a restart, or a race
            kept = corrector.beside(FILE)
            if kept.version == session.other_version:
                return kept
        own = corrector.fork(names, FILE)
        own.note_version(session.other_version)
        return own

    def _choose(self, bake: Bake, server_names: Sequence[str]) -> list[str]:
        """Return the servers that are compared: those with weights of their own, then a fixed sample."""
        most = self._settings.shadow_max_servers
        if len(server_names) <= most:
            return list(server_names)
        own = set()
        for version_id in (bake.version, bake.against):
            try:
                specialists = self._desk.registry.version(version_id).manifest.get("specialists") or ()
                own |= {series[0] for covered in specialists for series in covered}
            except (BadCheckpoint, TypeError, IndexError):
                continue
        chance = {name: zlib.crc32(f"{bake.id} {name}".encode()) for name in server_names}
        return sorted(server_names, key=lambda name: (name not in own, chance[name], name))[:most]

    def _compare(self, session: _Session, parts: Sequence[_Part], origin_ms: int, why_failed: str) -> None:
        race = session.race
        if why_failed:
            race.void()
            if (
                session.serves == NEW
                and self._is_other_well(session, parts)
                and race.note_failing(why_failed)
            ):
                self._write(race)
            return
        shape = (2, 2, len(race.rows), len(race.metrics), len(self._horizons), 3)
        said = np.full(shape, np.nan, np.float32)
        for part in parts:
            self._say(session, part, said)
        session.n_failures = 0
        race.open(origin_ms // self._history.bin_ms, said)
        made = np.isfinite(said[:, RAW]).all(axis=(-1, -2)).sum(axis=(1, 2))  # (side,) series
        few = f"it forecasts {made[NEW]} series of the {made[OLD]} that {session.bake.against} forecasts"
        if race.note_failing(few if 2 * made[NEW] < made[OLD] else ""):
            self._write(race)

    def _is_other_well(self, session: _Session, parts: Sequence[_Part]) -> bool:
        """Return whether the other model does what the one in service could not; else neither is to blame."""
        try:
            made = [session.predictor.predict(part.window.of(part.rows)) for part in parts]
        except Exception as error:  # nothing that a forecast needs
            self._note_error("shadow", error)
            return False
        return any(np.isfinite(said).any() for said in made)

    def _say(self, session: _Session, part: _Part, said: Floats32) -> None:
        """Fill in what both models say of one part of the fleet."""
        race, window = session.race, part.window.of(part.rows)
        own = np.array([race.rows[name] for name in window.server_names])
        percents = np.array([is_percent(metric) for metric in window.metrics], np.bool_)
        race.note_moves(own, window.values, percents)
        places, serves, other = np.array(self._horizons) - 1, session.serves, session.other
        made = session.predictor.predict(window)[:, :, places]
        said[serves, RAW, own], said[serves, SERVED, own] = part.raw, part.served
        said[other, RAW, own] = made
        if session.corrector and part.experts:
            session.corrector.mix(window, made := made.copy(), part.experts, places + 1)
        said[other, SERVED, own] = made

    def _note_not_loaded(self, bake: Bake, problem: str) -> None:
        """Write down that the new version cannot even be loaded, once a sweep.

        Where the older one cannot be loaded either, as after other bins were set, the new one is no worse.
        """
        known = read_evidence(self._desk.folder, bake)
        if known.unable:
            return
        try:
            self._predictor(bake.against)
        except Exception as error:
            found = replace(known, unable=f"neither of them can be loaded: {error}", failing=0)
        else:
            why = f"it cannot be loaded: {problem}"
            found = replace(known, failing=known.failing + 1, why_failing=why)
        write_evidence(self._desk.folder, found)

    def _give_up(self, race: Race, why: str) -> None:
        race.evidence = replace(race.evidence, unable=why)
        self._write(race)

    def _write(self, race: Race) -> None:
        try:
            write_evidence(self._desk.folder, race.evidence)
        except FleetcastError as error:  # a full disk; the next hour's has it all
            self._note_error("shadow", error)

    def _end(self) -> None:
        session, self._session = self._session, None
        if session and session.corrector:
            session.corrector.forget_file()
