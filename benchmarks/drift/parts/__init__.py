"""What the scripts of benchmarks/drift/ share."""
