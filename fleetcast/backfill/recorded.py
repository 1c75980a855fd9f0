"""History out of files: Parquet and CSV with the columns of the feed's records, as tables of bounded size.

Owns: which columns are records', the words for a file that is none, and reading piece by piece: a file may be
larger than the memory. Does not know: where the records go, nor which records the daemon takes.

A file needs `timestamp` (a time, or ISO 8601 text; without a zone it is UTC), `server_name` (text) and at
least one column of numbers with a metric's name. Columns of text, and those with other names, are left out
and named.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetcast.backfill.delivery import PIECE_ROWS, SERVER, TIME
from fleetcast.errors import BadData, SettingsError, quote
from fleetcast.ingest.rules import is_metric_name
from fleetcast.setting import nearest

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, CSV = "parquet", "csv"
_HEAD_BYTES = 2**20  # from which a CSV's types are told


def parse_renames(texts: Sequence[str]) -> dict[str, str]:
    """Return the new names of columns by the old ones.

    >>> parse_renames(["host=server_name"])
    {'host': 'server_name'}

    Raises:
        SettingsError: a text is no renaming, or two lead to one name.
    """
    renames: dict[str, str] = {}
    for text in texts:
        old, sign, new = text.rpartition("=")
        if not sign or not old or not (new in (TIME, SERVER) or is_metric_name(new)):
            hint = "for example --rename host=server_name --rename CPU=cpu_pct"
            right = "expected COLUMN=NAME with a record's name"
            raise SettingsError([f"--rename {quote(text)}: {right}"], hint=hint)
        if new in renames.values():
            raise SettingsError([f"--rename gives {new} twice"])
        renames[old] = new
    return renames


@dataclass
class RecordedFile:
    """A file, or a folder of Parquet files, as tables."""

    path: Path
    kind: str
    renames: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # columns that are no record's, known once reading began

    def tables(self) -> Iterator[tuple["pa.Table", float]]:
        """Yield the rows in their order, with the share of the file that is read.

        Raises:
            BadData: the file is missing, is none of its kind, or its columns are no records.
        """
        import pyarrow as pa

        if not self.path.exists():
            raise BadData(f"{self.path} does not exist")
        if not (self.path.is_file() or self.path.is_dir()):
            raise BadData(f"{self.path} is not a regular file", hint="a pipe cannot be read twice")
        read = self._parquet if self.kind == PARQUET else self._csv
        is_empty = True
        try:
            for table, share in read():
                is_empty = False
                yield _with_nulls(table), share
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            says = f"{self.path} cannot be read as {self.kind}: {_first_line(error)}"
            raise BadData(says, hint="fleetcast import parquet|csv PATH") from error
        if is_empty:
            raise BadData(f"{self.path} holds no records")

    def _parquet(self) -> Iterator[tuple["pa.Table", float]]:
        import pyarrow as pa
        import pyarrow.dataset as ds

        data = ds.dataset(str(self.path), format="parquet")
        if not data.files:
            raise BadData(f"{self.path} holds no Parquet file")
        columns = self._choose(data.schema)
        n_rows, n_read = data.count_rows(), 0
        for batch in data.to_batches(columns=list(columns), batch_size=PIECE_ROWS, batch_readahead=1):
            n_read += batch.num_rows
            if batch.num_rows:
                yield pa.Table.from_batches([batch]).rename_columns(list(columns.values())), n_read / n_rows

    def _csv(self) -> Iterator[tuple["pa.Table", float]]:
        import pyarrow as pa
        from pyarrow import csv

        head = csv.ReadOptions(block_size=_HEAD_BYTES)
        with csv.open_csv(self.path, read_options=head) as first:
            schema = first.schema
        columns = self._choose(schema)
        types = {old: pa.string() if new in (TIME, SERVER) else pa.float64() for old, new in columns.items()}
        convert = csv.ConvertOptions(
            column_types=types, include_columns=list(columns), strings_can_be_null=True
        )
        n_bytes = self.path.stat().st_size
        with (
            self.path.open("rb") as file,
            csv.open_csv(file, read_options=head, convert_options=convert) as reader,
        ):
            for batch in reader:
                if batch.num_rows:
                    table = pa.Table.from_batches([batch]).rename_columns(list(columns.values()))
                    yield table, min(1.0, file.tell() / max(1, n_bytes))

    def _choose(self, schema: "pa.Schema") -> dict[str, str]:
        """Return the columns to read, and what they are called in a record.

        Raises:
            BadData: names the column that is missing or of a wrong type, and what would be right.
        """
        import pyarrow.types as kinds

        have = ", ".join(schema.names) or "none"
        for old in self.renames:
            if old not in schema.names:
                close = nearest(old, schema.names)
                raise BadData(f"{self.path} has no column {quote(old)}{close}", hint=f"it has {have}")
        names = {name: self.renames.get(name, name) for name in schema.names}
        self._check_names([names[name] for name in schema.names], have)
        types = {new: schema.field(old).type for old, new in names.items()}
        if self.kind == PARQUET and not (kinds.is_timestamp(types[TIME]) or _is_text(types[TIME])):
            right = "a timestamp, or ISO 8601 text such as 2026-01-15T10:00:00Z"
            raise BadData(f"{self.path}: column timestamp must be {right}, it is {types[TIME]}")
        if self.kind == CSV and (kinds.is_integer(types[TIME]) or kinds.is_floating(types[TIME])):
            right = "ISO 8601 text such as 2026-01-15T10:00:00Z"
            raise BadData(f"{self.path}: column timestamp must be {right}, it holds numbers")
        if self.kind == PARQUET and not _is_text(types[SERVER]):
            raise BadData(f"{self.path}: column server_name must be text, it is {types[SERVER]}")
        chosen = {
            old: new for old, new in names.items() if new in (TIME, SERVER) or _is_metric(new, types[new])
        }
        if len(chosen) == 2:
            hint = f"a metric's name is of the form [a-z][a-z0-9_]*; --rename changes one; it has {have}"
            raise BadData(f"{self.path} has no column of numbers with a metric's name", hint=hint)
        self.left_out = tuple(name for name in names if name not in chosen)
        return chosen

    def _check_names(self, names: Sequence[str], have: str) -> None:
        """Raise BadData unless each column is there once; `have` are the names as the file has them."""
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        if twice:
            raise BadData(f"{self.path} has the column {quote(twice[0])} twice", hint="drop or rename one")
        if self.kind == CSV and len(names) == 1:
            says = f"{self.path} has one column alone; those of a CSV are separated by commas"
            raise BadData(says, hint=f"its first line is {have}")
        for needed in (TIME, SERVER):
            if needed not in names:
                hint = f"it has {have}; name one with --rename COLUMN={needed}"
                raise BadData(f"{self.path} has no column {needed!r}", hint=hint)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind))


def _is_metric(name: str, kind: Any) -> bool:
    """Return whether a column is a metric; one without a value yet may become one."""
    import pyarrow.types as kinds

    is_number = (
        kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind) or kinds.is_null(kind)
    )
    return is_metric_name(name) and bool(is_number)


def _with_nulls(table: "pa.Table") -> "pa.Table":
    """Return the same with NaN as absent, as it is in a DataFrame; a body of the feed may hold none."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    for place, name in enumerate(table.column_names):
        column = table[name]
        if kinds.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
            table = table.set_column(place, name, column)
    return table


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
