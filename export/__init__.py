"""Export PyTorch consistency models to graphs and bundles; imported as ``scm_sdk.export``."""
