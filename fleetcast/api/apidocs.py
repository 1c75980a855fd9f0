"""What `/openapi.json` and `/docs` say about the daemon's answers.

Owns: schemas and examples of the HTTP interface, as plain OpenAPI. Changes are additive only.
Does not know: how answers are made; `tests/test_server.py` compares the two.
"""

from typing import Any

Schema = dict[str, Any]

_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_QUANTILES: Schema = {
    "type": "object",
    "required": ["p10", "p50", "p90"],
    "properties": {"p10": _NUMBERS, "p50": _NUMBERS, "p90": _NUMBERS},
}
_PREDICTION: Schema = {
    "type": "object",
    "required": ["current", "source", "stale"],
    "properties": {
        "current": {"type": "object", "additionalProperties": {"type": "number"}},
        "forecast": {"type": ["object", "null"], "additionalProperties": _QUANTILES},
        "timestamps": {"type": "array", "items": {"type": "string", "format": "date-time"}},
        "source": {"type": "string", "enum": ["model", "fallback", "warming_up"]},
        "stale": {"type": "boolean"},
    },
}
_MODEL: Schema = {
    "type": ["object", "null"],
    "required": ["version", "trained_at", "base"],
    "properties": {
        "version": {"type": "string"},
        "trained_at": {"type": "string", "format": "date-time"},
        "base": {"type": "boolean"},
    },
}
PREDICTIONS: Schema = {
    "type": "object",
    "required": ["timestamp", "model", "predictions"],
    "properties": {
        "timestamp": {"type": "string", "format": "date-time"},
        "model": _MODEL,
        "predictions": {"type": "object", "additionalProperties": _PREDICTION},
    },
}
FEED_ANSWER: Schema = {
    "type": "object",
    "required": ["status", "records_received", "records_rejected", "errors"],
    "properties": {
        "status": {"type": "string", "enum": ["ok"]},
        "records_received": {"type": "integer", "description": "accepted and durable"},
        "records_rejected": {"type": "integer"},
        "errors": {
            "type": "array",
            "maxItems": 20,
            "items": {
                "type": "object",
                "required": ["index", "field", "reason"],
                "properties": {
                    "index": {"type": "integer"},
                    "field": {"type": "string"},
                    "reason": {"type": "string"},
                },
            },
        },
    },
}
FEED_BODY: Schema = {
    "type": "object",
    "required": ["records"],
    "properties": {
        "records": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["timestamp", "server_name"],
                "properties": {
                    "timestamp": {"type": "string", "description": "ISO 8601; without an offset it is UTC"},
                    "server_name": {"type": "string", "minLength": 1, "maxLength": 128},
                },
                "additionalProperties": True,
                "description": "every other field [a-z][a-z0-9_]* with a finite number is a metric",
            },
        }
    },
    "example": {
        "records": [
            {"timestamp": "2026-01-15T10:00:05Z", "server_name": "web-01", "cpu_pct": 12.5, "mem_pct": 40.1}
        ]
    },
}
ERROR: Schema = {
    "type": "object",
    "required": ["detail"],
    "properties": {"detail": {"type": "string"}},
}
OBJECT: Schema = {"type": "object"}
BINARY: Schema = {"type": "string", "format": "binary"}


def answers(ok: Schema, **errors: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route: 200 with its schema, errors as `e404="why"`."""
    described: dict[int | str, dict[str, Any]] = {
        200: {"description": "OK", "content": {"application/json": {"schema": ok}}}
    }
    for code, text in errors.items():
        described[int(code.removeprefix("e"))] = {
            "description": text,
            "content": {"application/json": {"schema": ERROR}},
        }
    return described


_KEY = "X-API-Key is missing or wrong"
FEED_ANSWERS = answers(
    FEED_ANSWER,
    e401=_KEY,
    e408="the body did not arrive in time",
    e413="the body is too large",
    e415="the body is compressed",
    e422='the body is not {"records": [...]}',
    e429="a sweep or a training goes first (data clock); Retry-After says when to try again",
    e503="overloaded, or the disk does not take the records; Retry-After says when to try again",
    e507="the disk is full; nothing of the request was kept",
)
WRITE_ANSWERS: dict[int | str, dict[str, Any]] = {
    204: {"description": "taken"},
    400: {"description": "not a WriteRequest, or some samples were refused: the text says which"},
    401: {"description": _KEY},
    413: {"description": "too large, packed or unpacked"},
    415: {"description": "not remote-write 1.0 in a snappy block"},
    503: {"description": "busy, or a sweep goes first (data clock); repeat it"},
    507: {"description": "the disk is full; repeat it"},
}
PREDICTION_ANSWERS = answers(PREDICTIONS, e401=_KEY, e404="unknown server")
STATUS_ANSWERS = answers(OBJECT, e401=_KEY)
