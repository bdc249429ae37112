"""Models of other libraries as consistency models: folders, parametrizations, components."""
