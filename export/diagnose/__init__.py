"""Diagnosis of graphs that differ from their checkpoint."""
