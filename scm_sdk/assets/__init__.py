"""Data and weights that ship with the package, each with its licence and provenance."""
