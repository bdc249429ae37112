"""Measure latency, and hold it to a budget."""
