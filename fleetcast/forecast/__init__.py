"""Forecasting: windows to tensors, the network, naive forecasts, the versions on disk."""
