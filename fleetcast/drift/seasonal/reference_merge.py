"""Bringing single servers of a reference up to date without learning the whole fleet again.

Owns: which servers are too young to be judged as they are, or lack forecast errors to be judged by,
and putting newly learned servers in their place. Does not know: when to do so, files.
"""

from dataclasses import replace

import numpy as np

from fleetcast.drift.seasonal.limits import MATURE_DAYS
from fleetcast.drift.seasonal.reference import Reference
from fleetcast.drift.seasonal.reference_chunks import joined_books, joined_shapes
from fleetcast.drift.seasonal.season import DAY_MS
from fleetcast.errors import BadData


def immature_servers(reference: Reference, live: tuple[str, ...]) -> tuple[str, ...]:
    """Return the live servers that are unknown to a reference or have few days behind them.

    A metric that a server never sent in those days does not count.
    """
    n_metrics = len(reference.metrics)
    days = reference.n_days.reshape(-1, n_metrics)
    young = ((days > 0) & (days < MATURE_DAYS)).any(axis=1) | (days == 0).all(axis=1)
    known = dict(zip(reference.server_names, young.tolist(), strict=True))
    return tuple(name for name in live if known.get(name, True))


def servers_without_errors(reference: Reference) -> tuple[str, ...]:
    """Return the servers of which a judged series' usual forecast errors are unknown."""
    unknown = reference.is_compared & np.isnan(reference.books.errors.edges[:, 0])
    rows = np.flatnonzero(unknown.reshape(len(reference.server_names), -1).any(axis=1))
    return tuple(reference.server_names[row] for row in rows)


def merged(old: Reference, newer: Reference) -> Reference:
    """Return `old` with the servers of `newer` in place of its own, new ones behind.

    The fleet's calibration stays that of `old`.

    Raises:
        BadData: other metrics, bins or time zone.
    """
    for name in ("metrics", "bin_ms", "timezone"):
        if getattr(old, name) != getattr(newer, name):
            raise BadData(f"{name} differ: {getattr(old, name)} and {getattr(newer, name)}")
    n_metrics = len(old.metrics)
    place = {server: row for row, server in enumerate(old.server_names)}
    place |= {server: len(old.server_names) + row for row, server in enumerate(newer.server_names)}
    rows = (np.array(list(place.values()))[:, None] * n_metrics + np.arange(n_metrics)).ravel()
    start_ms = min(old.start_ms, newer.start_ms)
    starts = [item.start_days + (item.start_ms - start_ms) // DAY_MS for item in (old, newer)]
    return replace(
        old,
        server_names=tuple(place),
        start_ms=start_ms,
        end_ms=max(old.end_ms, newer.end_ms),
        shape=joined_shapes([old.shape, newer.shape]).rows(rows),
        books=joined_books([old.books, newer.books]).rows(rows),
        pull=np.concatenate([old.pull, newer.pull])[rows],
        n_days=np.concatenate([old.n_days, newer.n_days])[rows],
        start_days=np.concatenate(starts)[rows],
        still_limits=np.concatenate([old.still_limits, newer.still_limits])[rows],
        limits=np.concatenate([old.limits, newer.limits])[rows],
    )
