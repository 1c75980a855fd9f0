"""How records and settled forecasts are kept: a log, immutable parts, sealed day files."""
