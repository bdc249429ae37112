"""The networks F(x, t, conditioning), their layers, and the interface for custom networks."""
