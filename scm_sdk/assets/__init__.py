"""Data and weights that ship with the package, each with its license and provenance."""
