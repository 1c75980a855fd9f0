"""The buffer: what it costs, what a kill leaves."""
