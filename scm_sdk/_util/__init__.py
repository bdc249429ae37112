"""Helpers independent of models and bundles: files, caches, lazy imports, processors, GPUs."""
