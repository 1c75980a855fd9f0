"""The detector that decides: each series against its own time of day."""
