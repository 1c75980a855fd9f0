"""The drift metrics: window, scores, references, names and times of change."""
