"""Turn a PyTorch sCM into graphs and bundles; imported as ``scm_sdk.export``."""
