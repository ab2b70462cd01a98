"""The experiments that come with aecore, by name."""
