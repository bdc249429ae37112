"""Measure latency and enforce budgets."""
