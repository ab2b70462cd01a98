"""One step as a pure function, and its compiled forms."""
