"""Shards on other machines; nothing else imports what this needs."""
