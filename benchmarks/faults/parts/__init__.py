"""What the scripts of benchmarks/faults/ share."""
