"""Training images: folders, arrays, shards; sample images of a run."""
