"""A trained network in, a function on pictures out."""
