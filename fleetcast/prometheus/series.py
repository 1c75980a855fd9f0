"""Series of exporters: their numbers, their scrape targets, the terms they take part in, and which live.

Owns: numbering series, targets and servers; which labels are a series' own and which its target's; the
newest sample of each, what one sample more makes of a counter, when a series began and ended, silence.
A series lives from its first sample until Prometheus marks its end, or until its target was heard for
`max_gap_s` without it. Silence is measured by the clock of arrivals, and that clock stands still while
nothing arrives from a target: after an outage, one half of a backlog says nothing about the other.
Does not know: sums, records. Not thread safe.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.errors import SettingsError, quote
from fleetcast.ingest.rules import RecordRules
from fleetcast.prometheus.rules import Term
from fleetcast.schema import Codes, Flags, Floats, Longs, increases
from fleetcast.settings import RemoteWriteSettings

Label = tuple[str, str]
_NAMES = RecordRules(None)  # case and domain are settled where records are taken
NEVER = -(2**62)  # far enough from the end of the numbers to calculate with
STALE_BITS = 0x7FF0000000000002  # the NaN by which Prometheus says that a series has ended
IGNORED = -1  # the number of a series that no rule wants
REFUSED = -2  # of one that has no room
INVALID = -3  # of one whose labels are not usable
NAMELESS = -4  # of one that a rule wants, and whose labels name no server
_UNINDEXED_MAX = 256  # series that may come before the index of targets is made anew
_LABEL_MAX_CHARS = 1024  # bounds the work of the operator's pattern on a sender's text
FOREVER = 2**62
_LOOKS_PER_GAP = 4  # how often silent series are looked for; no pause counts for more than one look
_FORGET_AFTER_SWEEPS = 12  # a series from which nothing came for so many of them may be forgotten

# What an exporter itself puts on its series; every other label came with the scrape target.
_OWN_LABELS = {
    "node_cpu_": {"cpu", "core", "mode", "package"},
    "node_memory_": {"node"},
    "node_disk_": {"device"},
    "node_network_": {"device"},
    "node_filesystem_": {"device", "device_error", "fstype", "mountpoint"},
    "node_load": set(),
    "windows_cpu_": {"core", "mode", "state"},
    "windows_logical_disk_": {"volume", "disk"},
    "windows_net_": {"nic"},
    "windows_memory_": set(),
    "windows_os_": set(),
    "windows_cs_": set(),
    "system_cpu_": {"cpu", "state"},
    "system_disk_": {"device", "direction"},
    "system_network_": {"device", "direction", "protocol", "state"},
    "system_memory_": {"state"},
    "system_filesystem_": {"device", "mode", "mountpoint", "state", "type"},
}


def own_labels(series_name: str) -> set[str] | None:
    """Return the labels that an exporter itself puts on a series; None: the exporter is not known."""
    return next((own for start, own in _OWN_LABELS.items() if series_name.startswith(start)), None)


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


class ExporterSeries:
    """Series by number; the same labels always get the same number.

    A series belongs to a scrape target: the server and all labels that are not the series' own. Two
    exporters on one host, or two scrapers of it, are two targets of one server.
    """

    def __init__(self, terms: Sequence[Term], settings: RemoteWriteSettings) -> None:
        self._terms = tuple(terms)
        self._settings = settings
        self._server_pattern = _compile(settings.server_pattern)
        self._unshared = {"__name__", *settings.ignored_labels}
        self._by_name: dict[str, list[int]] = {}
        for place, term in enumerate(self._terms):
            self._by_name.setdefault(term.series_name, []).append(place)
        self._numbers: dict[tuple[int, int], int] = {}  # (target, own labels) -> series
        self._targets: dict[tuple[Label, ...], int] = {}
        self._own: dict[tuple[Label, ...], int] = {}  # the labels by which series of a target differ
        self._servers: dict[str, int] = {}
        self._server_names: list[str] = []  # by number
        self._places: dict[tuple[int, ...], int] = {}
        self._terms_of_place: Codes = np.zeros((0, 1), dtype=np.int32)
        self._server_of: Codes = np.zeros(16, dtype=np.int32)  # (target,)
        self.target_of: Codes = np.zeros(64, dtype=np.int32)  # (series,)
        self.home_of: Codes = np.zeros(64, dtype=np.int32)  # (series,) its first term, where it is counted
        self._own_of: Codes = np.zeros(64, dtype=np.int32)  # (series,)
        self._place_of: Codes = np.zeros(64, dtype=np.int32)  # (series,)
        self._groups = _Groups()

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def n_targets(self) -> int:
        """Return how many scrape targets have a number."""
        return len(self._targets)

    def servers_of(self, targets: Longs) -> Longs:
        """Return the numbers of the targets' servers."""
        return self._server_of[targets].astype(np.int64)

    def server_names(self, servers: Longs) -> list[str]:
        """Return the names of servers by their numbers."""
        return [self._server_names[server] for server in servers.tolist()]

    def number(self, labels: Mapping[str, str]) -> int:
        """Return the number of a series, a new one where needed, IGNORED, NAMELESS or REFUSED."""
        wanted_by = self._by_name.get(labels.get("__name__", ""), ())
        places = tuple(place for place in wanted_by if self._terms[place].matches(labels))
        server_name = self.server_name(labels) if places else None
        if server_name is None:
            return NAMELESS if places else IGNORED
        own, of_target = self._split(labels, server_name)
        target = self._targets.get(of_target, len(self._targets))
        key = (target, self._own.get(own, len(self._own)))
        number = self._numbers.get(key)
        if number is None:
            if len(self._numbers) >= self._settings.max_series:
                return REFUSED
            number = self._numbers[key] = len(self._numbers)
            self._targets[of_target], self._own[own] = key
            self._note(number, key, server_name, places)
        return number

    def server_name(self, labels: Mapping[str, str]) -> str | None:
        """Return the server that a series is of, None where its label names none."""
        text = labels.get(self._settings.server_label, "")
        found = self._server_pattern.fullmatch(text) if len(text) <= _LABEL_MAX_CHARS else None
        name = found[1] if found else None
        return _NAMES.server_name(name)

    def members(self, series: Codes | Longs) -> tuple[Longs, Codes]:
        """Return (row, term) pairs: which terms the series of each row takes part in."""
        terms = self._terms_of_place[self._place_of[series]]
        if terms.shape[1] == 1:  # no series is in two terms, as with the default rules
            return np.arange(len(series)), terms[:, 0]
        rows, columns = np.nonzero(terms >= 0)
        return rows, terms[rows, columns]

    def of_targets(self, targets: Longs) -> tuple[Longs, Longs]:
        """Return (row, series) pairs: all series of the target of each row."""
        return self._groups.find(self.target_of[: len(self)], targets)

    def label_between(self, some: Longs, others: Longs) -> str:
        """Return the label that tells all of some series of a target from all the others, or ""."""
        owns = list(self._own)
        mine = [dict(owns[self._own_of[number]]) for number in some.tolist()]
        theirs = [dict(owns[self._own_of[number]]) for number in others.tolist()]
        names: list[str] = sorted({name for one in (*mine, *theirs) for name in one} - {"__name__"})
        for name in names:
            here = {one.get(name, "") for one in mine}
            if here and theirs and here.isdisjoint(one.get(name, "") for one in theirs):
                return name
        return ""

    def keep(self, old_numbers: Longs) -> Longs:
        """Forget all series but these, and every target and server without one.

        Returns:
            the old numbers of the targets that stay, in their new order.
        """
        targets, new_target_of = np.unique(self.target_of[old_numbers], return_inverse=True)
        owns, new_own_of = np.unique(self._own_of[old_numbers], return_inverse=True)
        servers, new_server_of = np.unique(self._server_of[targets], return_inverse=True)
        self._targets = _renumber(self._targets, targets)
        self._own = _renumber(self._own, owns)
        self._servers = _renumber(self._servers, servers)
        self._server_names = list(self._servers)
        self._server_of = new_server_of.astype(np.int32)
        self.target_of = new_target_of.astype(np.int32)
        self._own_of = new_own_of.astype(np.int32)
        self._place_of = self._place_of[old_numbers]
        self.home_of = self.home_of[old_numbers]
        keys = zip(self.target_of.tolist(), self._own_of.tolist(), strict=True)
        self._numbers = {key: number for number, key in enumerate(keys)}
        self._groups = _Groups()
        return targets.astype(np.int64)

    def _note(self, number: int, key: tuple[int, int], server_name: str, places: tuple[int, ...]) -> None:
        target, own = key
        self._server_of = roomy(self._server_of, target)
        self._server_of[target] = server = self._servers.setdefault(server_name, len(self._servers))
        if server == len(self._server_names):
            self._server_names.append(server_name)
        if places not in self._places:
            self._places[places] = len(self._places)
            width = max(map(len, self._places))
            rows = [(*known, *[IGNORED] * (width - len(known))) for known in self._places]
            self._terms_of_place = np.array(rows, dtype=np.int32)
        self.target_of = roomy(self.target_of, number)
        self.home_of = roomy(self.home_of, number)
        self._own_of = roomy(self._own_of, number)
        self._place_of = roomy(self._place_of, number)
        self.target_of[number], self._own_of[number] = target, own
        self.home_of[number] = places[0]
        self._place_of[number] = self._places[places]

    def _split(
        self, labels: Mapping[str, str], server_name: str
    ) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
        """Return the labels that are the series' own, its name among them, and those of its target."""
        name = labels["__name__"]
        own = own_labels(name)
        always = {"instance", self._settings.server_label}
        given = [item for item in sorted(labels.items()) if item[0] not in self._unshared]
        is_own = [
            label not in always and (own is None or label in own or label in self._settings.own_labels)
            for label, _ in given
        ]
        mine = (("__name__", name), *(item for item, yes in zip(given, is_own, strict=True) if yes))
        others = (item for item, yes in zip(given, is_own, strict=True) if not yes)
        return mine, (("", server_name), *others)


class _Groups:
    """Which series each target has: an index of most series, and a look at those that came since."""

    def __init__(self) -> None:
        self._order: Longs = np.empty(0, dtype=np.int64)
        self._starts: Longs = np.zeros(1, dtype=np.int64)

    def find(self, target_of: Codes, targets: Longs) -> tuple[Longs, Longs]:
        """Return (row, series) pairs: all series of the target of each row."""
        n_indexed = len(self._order)
        if len(target_of) - n_indexed > _UNINDEXED_MAX + n_indexed // _UNINDEXED_MAX:
            n_indexed = len(target_of)
            self._order = np.argsort(target_of, kind="stable")
            self._starts = np.concatenate(([0], np.cumsum(np.bincount(target_of))))
        known = np.minimum(targets, len(self._starts) - 1)  # a target that came since has none there
        first, end = self._starts[known], self._starts[np.minimum(known + 1, len(self._starts) - 1)]
        rows, places = _spread(first, end)
        since = target_of[n_indexed:]
        by_target = np.argsort(targets, kind="stable")
        in_order = targets[by_target]
        some, at = _spread(np.searchsorted(in_order, since), np.searchsorted(in_order, since, "right"))
        return np.concatenate((rows, by_target[at])), np.concatenate((self._order[places], some + n_indexed))


def _spread(starts: Longs, ends: Longs) -> tuple[Longs, Longs]:
    """Return (row, place) pairs: each place from a row's start up to its end.

    >>> [found.tolist() for found in _spread(np.array([5, 0, 2]), np.array([7, 0, 3]))]
    [[0, 0, 2], [5, 6, 2]]
    """
    sizes = ends - starts
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return rows, np.arange(len(rows)) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)


def first_of_runs(*columns: Longs | Codes) -> Longs:
    """Return the first place of each run of equal rows.

    >>> first_of_runs(np.array([3, 3, 5, 3])).tolist()
    [0, 2, 3]
    """
    is_first = np.ones(len(columns[0]), dtype=np.bool_)
    if len(is_first):
        is_first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return np.flatnonzero(is_first)


def scrapes_of(targets: Codes, times: Longs) -> tuple[Longs, Longs, Longs]:
    """Return the targets and times of scrapes, sorted, and which scrape each sample is of."""
    begin = first_of_runs(targets, times)
    firsts, first_times = targets[begin].astype(np.int64), times[begin]
    is_next = (firsts[1:] > firsts[:-1]) | (
        (firsts[1:] == firsts[:-1]) & (first_times[1:] > first_times[:-1])
    )
    if is_next.all():  # as senders put them
        of_sample = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(targets)))
        return firsts, first_times, of_sample
    order = np.lexsort((times, targets))
    by_target, by_time = targets[order], times[order]
    begin = first_of_runs(by_target, by_time)
    of_sample = np.empty(len(order), dtype=np.int64)
    of_sample[order] = np.repeat(np.arange(len(begin)), np.diff(begin, append=len(order)))
    return by_target[begin].astype(np.int64), by_time[begin], of_sample


def ranks_of(groups: Longs) -> Longs:
    """Return the place of each row within its run of equal groups.

    >>> ranks_of(np.array([3, 3, 3, 5, 7, 7])).tolist()
    [0, 1, 2, 0, 0, 1]
    """
    starts = first_of_runs(groups)
    ranks: Longs = np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
    return ranks


def roomy(array: NDArray[Any], place: int, fill: Any = 0) -> NDArray[Any]:
    """Return the array, longer where it has no such place."""
    if place < len(array):
        return array
    n_more = max(64, len(array) // 2, place + 1 - len(array))
    more = np.full((n_more, *array.shape[1:]), fill, dtype=array.dtype)
    return np.concatenate((array, more))


def longer(array: Any, n_more: int) -> Any:
    """Return the array with so many rows of zeros more; they take no memory before they are written."""
    more = np.zeros((len(array) + n_more, *array.shape[1:]), dtype=array.dtype)
    more[: len(array)] = array
    return more


def _renumber(numbers: dict[Any, int], kept: Longs | Codes) -> dict[Any, int]:
    """Return the entries whose numbers are kept, numbered in the order of those."""
    names = list(numbers)  # in the order of their numbers
    return {names[old]: new for new, old in enumerate(kept.tolist())}


def _compile(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise SettingsError([f"remote_write.server_pattern is no regular expression: {error}"]) from error
    if pattern.groups < 1:
        raise SettingsError([f"remote_write.server_pattern needs a group ( ), got {quote(text)}"])
    return pattern


def rates_between(
    before_ms: Longs, before: Floats, times_ms: Longs, values: Floats, max_gap_ms: float
) -> Floats:
    """Return rates per second, NaN without a sample before, over too long a gap or where a counter fell."""
    elapsed_ms = times_ms.astype(np.float64) - before_ms
    usable = (before_ms != NEVER) & (elapsed_ms <= max_gap_ms)
    grown = np.where(usable, increases(before, values), np.nan)
    with np.errstate(over="ignore"):
        return grown / (elapsed_ms / 1000.0)


class LivingSeries:
    """The life of every series, and how many series of each target and term live."""

    def __init__(self, series: ExporterSeries, n_terms: int, max_gap_s: float) -> None:
        self._series = series
        self._gap_s = max_gap_s
        self.last_ms: Longs = np.full(64, NEVER, dtype=np.int64)  # (series,)
        self._last_value: Floats = np.full(64, np.nan)
        self._first_ms: Longs = np.full(64, FOREVER, dtype=np.int64)
        self._end_ms: Longs = np.full(64, FOREVER, dtype=np.int64)
        self._is_alive: Flags = np.zeros(64, dtype=np.bool_)
        self._spoke_s: Floats = np.zeros(64)  # by the clock of its target
        self._sweep_of: Longs = np.zeros(64, dtype=np.int64)  # when something last came
        self.n_alive: Codes = np.zeros((16, n_terms), dtype=np.int32)  # (target, term)
        self.newest_ms: Longs = np.full(16, NEVER, dtype=np.int64)  # (target,)
        self.changed_ms: Longs = np.full(16, NEVER, dtype=np.int64)  # from here on n_alive holds
        self._heard_s: Floats = np.full(16, np.nan)
        self._clock_s: Floats = np.zeros(16)  # of a target: stands still while nothing comes from it
        self._looked_s = self._swept_s = -np.inf
        self._n_sweeps = 0

    def ensure(self) -> None:
        """Make room for all series and targets that have a number."""
        n_series, n_targets = len(self._series), self._series.n_targets
        self.last_ms = roomy(self.last_ms, n_series, NEVER)
        self._last_value = roomy(self._last_value, n_series, np.nan)
        self._first_ms = roomy(self._first_ms, n_series, FOREVER)
        self._end_ms = roomy(self._end_ms, n_series, FOREVER)
        self._is_alive = roomy(self._is_alive, n_series)
        self._spoke_s = roomy(self._spoke_s, n_series)
        self._sweep_of = roomy(self._sweep_of, n_series)
        self.n_alive = roomy(self.n_alive, n_targets)
        self.newest_ms = roomy(self.newest_ms, n_targets, NEVER)
        self.changed_ms = roomy(self.changed_ms, n_targets, NEVER)
        self._heard_s = roomy(self._heard_s, n_targets, np.nan)
        self._clock_s = roomy(self._clock_s, n_targets)

    def keep(self, old_series: Longs, old_targets: Longs) -> None:
        """Forget all but these, which are numbered anew in this order."""
        for name in ("last_ms", "_last_value", "_first_ms", "_end_ms", "_is_alive", "_spoke_s", "_sweep_of"):
            setattr(self, name, getattr(self, name)[old_series])
        for name in ("n_alive", "newest_ms", "changed_ms", "_heard_s", "_clock_s"):
            setattr(self, name, getattr(self, name)[old_targets])
        self.ensure()

    def forgettable(self, arrival_s: float) -> Longs | None:
        """Return the series to keep, once a longest gap has passed; nothing came from the others for long."""
        if arrival_s - self._swept_s < self._gap_s:
            return None
        self._swept_s = arrival_s
        sweep_of = self._sweep_of[: len(self._series)]
        kept = np.flatnonzero(sweep_of >= self._n_sweeps - _FORGET_AFTER_SWEEPS)
        self._n_sweeps += 1
        return kept

    def rates(self, fresh: Samples) -> Floats:
        """Return each sample's rate per second; the samples are sorted and newer than what is known."""
        series, times = fresh.series, fresh.timestamps_ms
        before_ms, before = self.last_ms[series], self._last_value[series]
        again = np.flatnonzero(series[1:] == series[:-1])
        before_ms[again + 1], before[again + 1] = times[again], fresh.values[again]
        return rates_between(before_ms, before, times, fresh.values, self._gap_s * 1000)

    def note(self, samples: Samples, is_fresh: Flags, arrival_s: float) -> None:
        """Take note of samples, sorted by series and time; the fresh ones are the newest of their series."""
        series, times = samples.series, samples.timestamps_ms
        targets = self._series.target_of[series]
        self._hear(np.unique(targets[first_of_runs(targets)]), arrival_s)
        np.maximum.at(self.newest_ms, targets, times)
        is_earlier = (times < self._first_ms[series]) & ~samples.are_stale_marks
        if is_earlier.any():
            np.minimum.at(self._first_ms, series[is_earlier], times[is_earlier])
        self._spoke_s[series] = self._clock_s[targets]
        self._sweep_of[series] = self._n_sweeps
        fresh = samples if is_fresh.all() else samples.where(is_fresh)
        is_last = np.ones(len(fresh), dtype=np.bool_)
        is_last[:-1] = fresh.series[1:] != fresh.series[:-1]
        newest = fresh if is_last.all() else fresh.where(is_last)
        self.last_ms[newest.series] = newest.timestamps_ms
        self._last_value[newest.series] = newest.values
        is_end = newest.are_stale_marks
        if is_end.any():
            self._end(newest.series[is_end], newest.timestamps_ms[is_end])
        self._begin(newest.series[~is_end])

    def end_silent(self, arrival_s: float) -> None:
        """End series without a mark that lack though their target is heard.

        They were waited for in all scrapes so far, which stay unfinished; those from now on go without.
        """
        if arrival_s - self._looked_s < self._gap_s / _LOOKS_PER_GAP:
            return
        self._looked_s = arrival_s
        alive = np.flatnonzero(self._is_alive[: len(self._series)])
        targets = self._series.target_of[alive]
        is_silent = self._clock_s[targets] - self._spoke_s[alive] > self._gap_s
        self._end(alive[is_silent], self.newest_ms[targets[is_silent]] + 1)

    def are_needed(self, series: Longs, times_ms: Longs) -> Flags:
        """Return whether each series lived at the time beside it."""
        return np.logical_and(self._first_ms[series] <= times_ms, times_ms < self._end_ms[series])

    def _hear(self, targets: Codes, arrival_s: float) -> None:
        passed = arrival_s - self._heard_s[targets]
        self._clock_s[targets] += np.clip(np.nan_to_num(passed), 0.0, self._gap_s / _LOOKS_PER_GAP)
        self._heard_s[targets] = arrival_s

    def _begin(self, series: Codes) -> None:
        """Let series live, and with one that comes back all that ended at the same moment.

        A target that is down ends all its series at once: what is told again must be the whole.
        """
        series = series[~self._is_alive[series]]
        if not len(series):
            return
        back = series[self._end_ms[series] < FOREVER]
        if len(back):
            end_of = np.full(self._series.n_targets, NEVER, dtype=np.int64)
            end_of[self._series.target_of[back]] = self._end_ms[back]
            n_series = len(self._series)
            is_back = ~self._is_alive[:n_series]
            is_back &= self._end_ms[:n_series] == end_of[self._series.target_of[:n_series]]
            series = np.union1d(series, np.flatnonzero(is_back))
        targets = self._series.target_of[series]
        self._spoke_s[series] = self._clock_s[targets]
        self._end_ms[series] = FOREVER
        self._change(series, self._first_ms[series], +1)

    def _end(self, series: Codes | Longs, times_ms: Longs) -> None:
        is_alive = self._is_alive[series]
        series, times_ms = series[is_alive], times_ms[is_alive]
        self._end_ms[series] = times_ms
        self._change(series, times_ms, -1)

    def _change(self, series: Codes | Longs, times_ms: Longs, by: int) -> None:
        self._is_alive[series] = by > 0
        targets = self._series.target_of[series]
        np.maximum.at(self.changed_ms, targets, times_ms)
        rows, terms = self._series.members(series)
        np.add.at(self.n_alive, (targets[rows], terms), by)
