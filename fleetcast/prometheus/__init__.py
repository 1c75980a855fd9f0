"""Prometheus: remote-write bodies and exporters' series, as records."""
