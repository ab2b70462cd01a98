"""Convolutions, and what is between them, computed in the way that is fast on each platform."""
