"""History in: months of a Prometheus, or of Parquet and CSV files, through the running daemon."""
