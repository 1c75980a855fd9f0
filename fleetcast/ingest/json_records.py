"""Records as JSON, read without a dict for each: for senders whose records all look alike.

Owns: recognising the shape of a body by its first record, and a decoder made for that shape.
Does not know: the rules for records. Whatever is not exactly of a shape seen before is left to
the decoder for any JSON (`bodies.read_records`), which then teaches this one.

msgspec checks the types while it reads, so a column needs no further look.
"""

import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from fleetcast.ingest.columns import Column, RowsOf
from fleetcast.ingest.rules import REQUIRED, is_metric_name
from fleetcast.schema import Floats

SHAPES_MAX = 64  # decoders kept; a sender of ever new shapes makes us forget, not grow
_FIELDS_MAX = 512
_HEAD_BYTES = 32_768
_FIRST_RECORD = re.compile(rb'\s*\{\s*"records"\s*:\s*\[\s*\{([^{}\\]*)\}')
_NAME = re.compile(rb'"([^"]*)"\s*:')
_TO_MESSAGE = msgspec.msgpack.Encoder()
_MAP_HEAD_BYTES, _LONG_MAP_HEAD_BYTES, _SHORT_MAP = 1, 3, 16  # format/spec of MessagePack
_DOUBLE_BYTES = 8

Names = tuple[bytes, ...]


class JsonRecords:
    """Reads bodies of known shapes; safe from any thread."""

    def __init__(self) -> None:
        self._seen_once: dict[Names, None] = {}
        self._decoders: dict[Names, _ShapeDecoder] = {}

    def read(self, body: bytes) -> RowsOf | None:
        """Return the records as columns, None where the body is not of a known shape."""
        names = _names_of_first_record(body)
        decoder = self._decoders.get(names) if names else None
        return decoder.read(body) if decoder else None

    def learn(self, body: bytes, records: Sequence[Any]) -> None:
        """Take note of a body that had to be read the long way; the second of a shape makes a decoder."""
        names = _names_of_first_record(body)
        if not names or names in self._decoders:
            return
        for known in (self._seen_once, self._decoders):
            if len(known) >= SHAPES_MAX:
                known.clear()
        if names not in self._seen_once:
            self._seen_once[names] = None
        elif records and isinstance(records[0], dict):
            fields = _fields(records[0])
            if fields and tuple(name.encode() for name in fields) == names:
                self._decoders[names] = _ShapeDecoder(fields)


class _ShapeDecoder:
    """Decodes bodies of one shape: every record has the same fields of the same types.

    The numbers leave the rows by way of MessagePack, which writes a double always in 9 bytes: with
    the texts taken out, rows without a null are of one length, and columns are strided views of the
    message. That costs a third of asking each row for each field, and makes no tuple per row for the
    garbage collector to look through.
    """

    def __init__(self, fields: dict[str, type]) -> None:
        # Fields get names of our own: theirs may be keywords.
        members = {name: f"f{number}" for number, name in enumerate(fields)}
        row = msgspec.defstruct(
            "Row",
            [(members[name], kind | None) for name, kind in fields.items()],
            rename={member: name for name, member in members.items()},
            forbid_unknown_fields=True,
            gc=False,
        )
        self._fields = tuple(fields)
        self._members = members
        self._texts = {name: attrgetter(members[name]) for name, kind in fields.items() if kind is str}
        self._layout = _message_layout(fields)
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Body", [("records", list[row])]))  # type: ignore[valid-type]

    def read(self, body: bytes) -> RowsOf | None:
        """Return the records, None where one of them is not of this shape."""
        try:
            rows: list[Any] = self._decoder.decode(body).records  # type: ignore[attr-defined]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if not rows:
            return None
        texts: dict[str, Column] = {name: list(map(of, rows)) for name, of in self._texts.items()}
        numbers = self._numbers(rows)
        return RowsOf({name: texts[name] if name in texts else numbers[name] for name in self._fields})

    def _numbers(self, rows: list[Any]) -> Mapping[str, Floats]:
        """Return the columns of numbers, null as NaN (JSON has no NaN of its own); spends the rows."""
        for name in self._texts:
            member = self._members[name]
            for row in rows:
                setattr(row, member, None)
        message = _TO_MESSAGE.encode(rows)
        if len(message) == _list_head_bytes(len(rows)) + len(rows) * self._layout.itemsize:
            cells = np.frombuffer(message, self._layout, len(rows), offset=_list_head_bytes(len(rows)))
            return {name: cells[name].astype(np.float64) for name in self._layout.names or ()}
        names = (name for name in self._fields if name not in self._texts)
        return {
            name: np.array(list(map(attrgetter(self._members[name]), rows)), dtype=np.float64)
            for name in names
        }


def _message_layout(fields: Mapping[str, type]) -> np.dtype[np.void]:
    """Return where in the MessagePack of one row, all texts null, the doubles stand."""
    names, offsets = [], []
    end = _MAP_HEAD_BYTES if len(fields) < _SHORT_MAP else _LONG_MAP_HEAD_BYTES
    for name, kind in fields.items():
        end += len(_TO_MESSAGE.encode(name)) + 1  # the value's type
        if kind is float:
            names.append(name)
            offsets.append(end)
            end += _DOUBLE_BYTES
    formats = [">f8"] * len(names)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": end})


def _list_head_bytes(n_items: int) -> int:
    """Return how long the head of a MessagePack list is."""
    return 1 if n_items < 16 else 3 if n_items < 2**16 else 5


def _fields(record: dict[str, Any]) -> dict[str, type] | None:
    """Return the type of each field, None where this record is not one for a decoder of its own."""
    fields: dict[str, type] = {}
    for name, value in record.items():
        is_text = name in REQUIRED or isinstance(value, str)
        if not is_metric_name(name) or isinstance(value, bool):
            return None
        if not is_text and not isinstance(value, (float, int, type(None))):
            return None
        fields[name] = str if is_text else float
    return fields if set(REQUIRED) <= fields.keys() and len(fields) <= _FIELDS_MAX else None


def _names_of_first_record(body: bytes) -> Names:
    """Return the field names of the first record, () where that takes more than a glance.

    A wrong guess is harmless: a decoder takes nothing but bodies of exactly its shape.
    """
    first = _FIRST_RECORD.match(body[:_HEAD_BYTES])
    return tuple(_NAME.findall(first[1])) if first else ()
