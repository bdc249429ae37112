"""Measure the quality of generated images against real ones."""
