"""Experts beside the network: rules that need no training, and the mixture that clients get."""
