"""Promotion: which version is in service, what people order, and the audit of both."""
