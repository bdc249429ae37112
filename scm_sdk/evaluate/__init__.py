"""Parity, latency and quality: the measurements behind the gates."""
