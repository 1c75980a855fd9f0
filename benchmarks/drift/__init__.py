"""Drift: false alarms, hits, and the time of a check, beside peers."""
