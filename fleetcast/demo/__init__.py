"""The demo: the whole loop on bundled real data, with nobody helping it (`make demo`)."""
