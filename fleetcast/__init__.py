"""fleetcast: forecast the metrics of a server fleet, find drift, and retrain the model."""

__version__ = "1.0.0"
