"""Series of exporters: their numbers, the terms they take part in, and the rates of counters.

Owns: numbering series and servers, how many living series each term of a server has, the order of
samples, what a counter's fall means, staleness marks. Does not know: what a term is for.
Not thread safe.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.errors import SettingsError
from fleetcast.ingest.rules import is_server_name
from fleetcast.prometheus.rules import Term
from fleetcast.schema import Codes, Floats, Longs
from fleetcast.settings import RemoteWriteSettings

NEVER = int(np.iinfo(np.int64).min)
STALE_BITS = 0x7FF0000000000002  # the NaN by which Prometheus says that a series has ended


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Samples in columns."""

    series: Codes  # (sample,)
    timestamps_ms: Longs  # (sample,)
    values: Floats  # (sample,) any double, staleness marks too

    def __len__(self) -> int:
        return len(self.series)

    def where(self, chosen: NDArray[np.bool_] | Longs | slice) -> "Samples":
        """Return some of the samples."""
        return Samples(self.series[chosen], self.timestamps_ms[chosen], self.values[chosen])

    @property
    def are_stale_marks(self) -> NDArray[np.bool_]:
        """Return which samples say that their series has ended."""
        return np.equal(self.values.view(np.int64), STALE_BITS)


class CounterMemory:
    """The newest sample of every series, by which the next one's rate is known."""

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_ms = max_gap_s * 1000.0
        self.last_ms: Longs = np.full(64, NEVER, dtype=np.int64)
        self._last_value: Floats = np.full(64, np.nan)

    def ensure(self, n_series: int) -> None:
        """Make room for series 0 to n_series - 1."""
        have = len(self.last_ms)
        if n_series > have:
            n_more = max(n_series - have, have // 2)
            self.last_ms = np.concatenate((self.last_ms, np.full(n_more, NEVER, dtype=np.int64)))
            self._last_value = np.concatenate((self._last_value, np.full(n_more, np.nan)))

    def keep(self, old_numbers: Longs) -> None:
        """Forget all series but these, which are numbered anew in this order."""
        self.last_ms = self.last_ms[old_numbers]
        self._last_value = self._last_value[old_numbers]
        self.ensure(64)

    def take(self, samples: Samples) -> tuple[Samples, Floats]:
        """Return the samples that are news, by series and time, and each one's rate per second.

        A sample no newer than its series' newest is a repetition or too late, and left out.
        Where a counter fell it began again at 0 in between, as Prometheus reads it. There is no
        rate (NaN) without a sample before, over more than the longest gap, or from a value that
        is no number.
        """
        news = self._news(samples)
        series, times = news.series, news.timestamps_ms
        is_first = np.ones(len(news), dtype=np.bool_)
        is_first[1:] = series[1:] != series[:-1]
        before_ms = np.where(is_first, self.last_ms[series], np.roll(times, 1))
        before = np.where(is_first, self._last_value[series], np.roll(news.values, 1))
        with np.errstate(invalid="ignore", over="ignore"):
            increase = news.values - before
            increase = np.where(increase < 0, news.values, increase)
            elapsed_ms = times.astype(np.float64) - before_ms
            rates = increase / (elapsed_ms / 1000.0)
        usable = (before_ms != NEVER) & (elapsed_ms <= self._max_gap_ms) & (increase >= 0)
        is_last = np.roll(is_first, -1)
        self.last_ms[series[is_last]] = times[is_last]
        self._last_value[series[is_last]] = news.values[is_last]
        return news, np.where(usable, rates, np.nan)

    def _news(self, samples: Samples) -> Samples:
        """Return the samples newer than what is known, sorted, one per series and time."""
        samples = samples.where(samples.timestamps_ms > self.last_ms[samples.series])
        series, times = samples.series, samples.timestamps_ms
        samples = samples.where(np.lexsort((times, series)))
        series, times = samples.series, samples.timestamps_ms
        is_other = np.ones(len(samples), dtype=np.bool_)
        is_other[1:] = (series[1:] != series[:-1]) | (times[1:] != times[:-1])
        return samples.where(is_other)


IGNORED = -1  # the number of a series that no rule wants
REFUSED = -2  # of one that has no room
_LABEL_MAX_CHARS = 1024  # bounds the work of the operator's pattern on a sender's text


class ExporterSeries:
    """Series by number; the same labels always get the same number."""

    def __init__(self, terms: Sequence[Term], settings: RemoteWriteSettings) -> None:
        self._terms = tuple(terms)
        self._settings = settings
        self._server_pattern = _compile(settings.server_pattern)
        self._unshared = {settings.server_label, *settings.ignored_labels}
        self._by_name: dict[str, list[int]] = {}
        for place, term in enumerate(self._terms):
            self._by_name.setdefault(term.series_name, []).append(place)
        self._numbers: dict[bytes, int] = {}
        self._servers: dict[str, int] = {}
        self._server_names: list[str] = []  # by number
        self._places: dict[tuple[int, ...], int] = {}
        self._terms_of_place: Codes = np.zeros((0, 1), dtype=np.int32)
        self.server_of: Codes = np.zeros(64, dtype=np.int32)  # (series,)
        self._place_of: Codes = np.zeros(64, dtype=np.int32)  # (series,)
        self._is_alive: NDArray[np.bool_] = np.zeros(64, dtype=np.bool_)  # (series,)
        self.n_alive: Codes = np.zeros((16, len(self._terms)), dtype=np.int32)  # (server, term)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def n_servers(self) -> int:
        """Return how many servers have a number."""
        return len(self._server_names)

    def names_of(self, servers: Longs) -> list[str]:
        """Return the names of servers by their numbers."""
        return [self._server_names[server] for server in servers.tolist()]

    def number(self, labels: Mapping[str, str]) -> int:
        """Return the number of a series, a new one where needed, IGNORED or REFUSED."""
        wanted_by = self._by_name.get(labels.get("__name__", ""), ())
        places = tuple(place for place in wanted_by if self._terms[place].matches(labels))
        server_name = self._server_name(labels) if places else None
        if server_name is None:
            return IGNORED
        identity = self._identity(server_name, labels)
        number = self._numbers.get(identity)
        if number is None:
            if len(self._numbers) >= self._settings.max_series:
                return REFUSED
            number = self._numbers[identity] = len(self._numbers)
            self._note(number, server_name, places)
        return number

    def members(self, series: Codes | Longs) -> tuple[Longs, Codes]:
        """Return (row, term) pairs: which terms the series of each row takes part in."""
        terms = self._terms_of_place[self._place_of[series]]
        rows, columns = np.nonzero(terms >= 0)
        return rows, terms[rows, columns]

    def set_alive(self, series: Codes | Longs, is_alive: NDArray[np.bool_]) -> None:
        """Note of distinct series which live and which have ended."""
        changed = self._is_alive[series] != is_alive
        series, is_alive = series[changed], is_alive[changed]
        self._is_alive[series] = is_alive
        rows, terms = self.members(series)
        np.add.at(self.n_alive, (self.server_of[series[rows]], terms), np.where(is_alive[rows], 1, -1))

    def alive(self) -> Longs:
        """Return the numbers of the living series."""
        return np.flatnonzero(self._is_alive[: len(self)])

    def keep(self, old_numbers: Longs) -> Longs:
        """Forget all series but these and every server without one.

        Returns:
            the old numbers of the servers that stay, in their new order.
        """
        new_of_old = {int(old): new for new, old in enumerate(old_numbers.tolist())}
        self._numbers = {
            identity: new_of_old[old] for identity, old in self._numbers.items() if old in new_of_old
        }
        servers, new_server_of = np.unique(self.server_of[old_numbers].astype(np.int64), return_inverse=True)
        self._server_names = self.names_of(servers)
        self._servers = {name: number for number, name in enumerate(self._server_names)}
        self.server_of = new_server_of.astype(np.int32)
        self._place_of = self._place_of[old_numbers]
        self._is_alive = self._is_alive[old_numbers]
        self.n_alive = self.n_alive[servers]
        return servers

    def _note(self, number: int, server_name: str, places: tuple[int, ...]) -> None:
        server = self._servers.setdefault(server_name, len(self._servers))
        if server == len(self._server_names):
            self._server_names.append(server_name)
        self.server_of = roomy(self.server_of, number)
        self._place_of = roomy(self._place_of, number)
        self._is_alive = roomy(self._is_alive, number)
        self.n_alive = roomy(self.n_alive, server)
        if places not in self._places:
            self._places[places] = len(self._places)
            width = max(map(len, self._places))
            rows = [(*known, *[IGNORED] * (width - len(known))) for known in self._places]
            self._terms_of_place = np.array(rows, dtype=np.int32)
        self.server_of[number] = server
        self._place_of[number] = self._places[places]
        self._is_alive[number] = False

    def _server_name(self, labels: Mapping[str, str]) -> str | None:
        text = labels.get(self._settings.server_label, "")
        found = self._server_pattern.fullmatch(text) if len(text) <= _LABEL_MAX_CHARS else None
        name = found[1] if found else None
        return name if is_server_name(name) else None

    def _identity(self, server_name: str, labels: Mapping[str, str]) -> bytes:
        """Return a digest of all that tells this series from others, instance included."""
        own = sorted(item for item in labels.items() if item[0] not in self._unshared)
        text = repr((server_name, labels.get(self._settings.server_label), own))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def roomy(array: NDArray[Any], place: int) -> NDArray[Any]:
    """Return the array, longer where it has no such place."""
    if place < len(array):
        return array
    more = np.zeros((max(64, len(array) // 2, place + 1 - len(array)), *array.shape[1:]), dtype=array.dtype)
    return np.concatenate((array, more))


def _compile(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise SettingsError([f"remote_write.server_pattern is no regular expression: {error}"]) from error
    if pattern.groups < 1:
        raise SettingsError([f"remote_write.server_pattern needs a group ( ), got {text!r}"])
    return pattern
