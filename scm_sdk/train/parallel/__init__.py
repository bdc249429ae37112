"""Several processes: distributed runs, sharded state, mixed precision."""
