"""Forecasts: accuracy, speed, what one training gives."""
