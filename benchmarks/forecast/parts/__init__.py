"""What the scripts of benchmarks/forecast/ share."""
