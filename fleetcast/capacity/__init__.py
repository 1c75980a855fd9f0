"""When a series passes a limit: within the forecast's horizon, and by date; pure functions of arrays."""
