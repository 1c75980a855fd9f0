"""How records come in: bodies of three kinds, one set of rules, one batch type."""
