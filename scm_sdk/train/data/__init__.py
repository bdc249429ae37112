"""Training images: folders, arrays, shards and the pictures that a run draws."""
