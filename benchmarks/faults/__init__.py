"""Every fault made on purpose, and what it cost."""
