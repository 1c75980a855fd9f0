"""fleetcast: keep forecasts of a server fleet's metrics accurate with nobody watching."""

__version__ = "1.0.0"
