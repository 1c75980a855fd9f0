"""The next version of a day, built beside the live one and swapped in as a whole.

Owns: the hidden folder in which a day is built, and the swap. Until the swap nothing that
readers see has changed; after it the old version is deleted. Does not know: why a day changes.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from fleetcast.files import exchange, fsync_dir, fsync_file, publish, storage_error
from fleetcast.storage.arrays import chosen
from fleetcast.storage.dayfiles import DaySnapshot, is_own_file
from fleetcast.storage.dayreader import LogRows, merge_sources
from fleetcast.storage.days import COLUMNS_FILE, OpenPart, PartName, write_part
from fleetcast.storage.quarantine import Quarantine
from fleetcast.storage.tables import TableKind, has_key, merged, union_schema

logger = logging.getLogger(__name__)

NEW_MARK = ".new-"  # a day being built, or the old one after the swap: never the only copy
Step = Callable[[str], None]


def no_step(_name: str) -> None:
    """Do nothing at a step; tests end the process there."""


class DayBuild:
    """Builds one day inside a `with` block and swaps it in at its end; an error leaves no trace."""

    def __init__(
        self, path: Path, kind: TableKind, snapshot: DaySnapshot, quarantine: Quarantine, on_step: Step
    ) -> None:
        self._path = path
        self._quarantine = quarantine
        self._kind = kind
        self._snapshot = snapshot
        self._step = on_step
        self._schemas = [part.schema for part in snapshot.parts]
        self._built = hidden_name(path)

    def __enter__(self) -> Self:
        try:
            self._built.mkdir()
        except OSError as error:
            raise storage_error(self._path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as late:
            remove_path(self._built)
            raise storage_error(self._path, late) from late
        if isinstance(error, Exception):
            remove_path(self._built)
            if isinstance(error, OSError):
                raise storage_error(self._path, error) from error

    def keep(self, part: OpenPart) -> None:
        """Take a part over as it is; a foreign file is written anew in our form."""
        if not part.is_ours:
            self.rewrite(part, None)
            return
        source = self._path
        if not self._snapshot.is_sealed:
            source = self._path / PartName(part.number, part.n_rows).text
        _link(source, self._built / PartName(part.number, part.n_rows).text)

    def rewrite(self, part: OpenPart, rows: pa.Table | None) -> None:
        """Take a part over with `rows` merged into it; in one of ours all their keys exist."""
        if rows is not None:
            self._schemas.append(rows.schema)
        schema = union_schema(self._kind, self._schemas if rows is None else [part.schema, rows.schema])
        if part.is_ours and rows is not None:
            tables = _updated(part, rows, self._kind)
        else:
            log = [] if rows is None else [LogRows(part.number, rows)]
            tables = merge_sources([part], log, self._kind)
        self._write(tables, schema, part.number)

    def join(self, parts: Sequence[OpenPart]) -> None:
        """Make one part of several."""
        schema = union_schema(self._kind, [part.schema for part in parts])
        self._write(merge_sources(parts, [], self._kind), schema, max(part.number for part in parts))

    def add(self, rows: pa.Table, number: int) -> None:
        """Add a part of rows whose keys are new."""
        self._schemas.append(rows.schema)
        self._write(iter([rows]), rows.schema, number)

    def _finish(self) -> None:
        write_columns(self._built / COLUMNS_FILE, self._kind, self._schemas)
        fsync_dir(self._built)
        self._step("day built")
        hurt = [
            PartName(part.number, part.n_rows).text for part in self._snapshot.parts if part.n_damaged_groups
        ]
        keep_rejects(self._path, [*self._snapshot.damaged, *hurt], self._quarantine)
        if self._path.exists():
            swap(self._built, self._path, self._step)
        else:
            publish(self._built, self._path)
            self._step("day published")

    def _write(self, tables: Iterator[pa.Table], schema: pa.Schema, number: int) -> None:
        temp = self._built / f".part-{number}"
        n_rows = write_part(temp, tables, self._kind, schema, number)
        publish(temp, self._built / PartName(number, n_rows).text)


def write_columns(path: Path, kind: TableKind, schemas: Sequence[pa.Schema]) -> None:
    """Write the file without rows that tells readers of a day's folder all its columns."""
    schema = union_schema(kind, schemas)
    write_part(path, iter(()), kind, schema, 0)


def swap(built: Path, path: Path, on_step: Step) -> None:
    """Exchange the live day for another version of it and delete the old one."""
    exchange(built, path)
    on_step("day swapped")
    remove_path(built)  # holds the old version now
    on_step("old day removed")


def keep_rejects(path: Path, rejects: Iterable[str], quarantine: Quarantine) -> None:
    """Keep under a second name what the next version of the day will not contain.

    Args:
        rejects: names of damaged files; a sealed day has one file, which any name stands for.
    """
    names = set(rejects)
    if path.is_file() and names:
        quarantine.keep_file(path)
    elif path.is_dir():
        names.update(entry.name for entry in path.iterdir() if not is_own_file(entry.name))
        for name in sorted(names):
            if (path / name).is_file():
                quarantine.keep_file(path / name)


def hidden_name(path: Path) -> Path:
    """Return a name for the next version of a day; what a crash leaves there is removed."""
    return path.with_name(f".{path.name}{NEW_MARK}{secrets.token_hex(4)}")


def remove_path(path: Path) -> None:
    """Delete a file or folder, existing or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _updated(part: OpenPart, rows: pa.Table, kind: TableKind) -> Iterator[pa.Table]:
    for old in part.tables():
        hit = has_key(rows, old, kind)
        yield merged([old, chosen(rows, hit)], kind) if hit.any() else old


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or a durable copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        fsync_file(target)
