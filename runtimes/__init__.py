"""Backends, one module and one library each; ``scm_sdk.inference.backends`` finds them by name."""
