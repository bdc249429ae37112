"""Models of other libraries seen as consistency models: their folders, their parametrization, their parts."""
