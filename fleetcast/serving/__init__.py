"""The inference daemon's parts: history, sweeps, ledger, answers."""
