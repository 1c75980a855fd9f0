"""What the scripts of benchmarks/ingest/ share."""
