"""Compare images of two backends or precisions on the same noise, and decide whether they pass."""
