"""Training: windows of the history, fitting, what was held out, the gate's verdict."""
