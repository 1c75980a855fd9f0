"""What the scripts of benchmarks/buffer/ share."""
