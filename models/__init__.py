"""The networks. Imports torch and itself only; never `loaders`, `engine` or `tools`."""
