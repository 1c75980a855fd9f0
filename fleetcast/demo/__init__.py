"""The demo: the whole loop on bundled real data, without any help (`make demo`)."""
