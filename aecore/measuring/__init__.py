"""How fast an experiment is, here or on devices that are not here."""
