"""Answers at a terminal: the fleet, how good its forecasts are, what is wrong and what would be right."""
