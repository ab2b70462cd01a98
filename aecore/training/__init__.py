"""An experiment in, a run directory out."""
