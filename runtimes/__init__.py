"""Backends, one file and one library each; ``scm_sdk.dispatch`` finds them by name."""
