"""Forecasting: windows to tensors, the network, naive forecasts, feedback, the versions on disk."""
