"""Alerts: which rules hold, who is told, and what was told already."""
