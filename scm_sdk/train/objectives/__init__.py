"""Training losses, one module per objective."""
