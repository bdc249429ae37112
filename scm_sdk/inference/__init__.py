"""Generate images from a bundle or a checkpoint: backend selection, sessions, requests, batching."""
