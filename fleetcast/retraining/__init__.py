"""The retraining daemon's parts: safeguards, quiet period, attempts, state."""
