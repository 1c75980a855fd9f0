"""The loop over weeks: replayed, closed, live."""
