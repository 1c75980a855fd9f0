"""Measurements, one script per question; the product never imports them."""
