"""Parity, latency and quality: the measurements that gates are made of."""
