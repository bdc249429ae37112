"""Helpers without knowledge of models or bundles: files, caches, lazy imports, processors, GPUs."""
