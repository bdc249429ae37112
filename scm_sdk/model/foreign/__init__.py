"""Models of other libraries seen as consistency models: their folders, their parametrisation, their parts."""
