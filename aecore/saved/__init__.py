"""A trained network on disk."""
