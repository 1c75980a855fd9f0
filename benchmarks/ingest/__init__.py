"""The way in: posts a second, latency, mutated input."""
