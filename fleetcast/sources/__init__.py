"""Sources of records: programs that feed an inference daemon."""
