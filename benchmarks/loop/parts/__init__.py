"""What the scripts of benchmarks/loop/ share."""
