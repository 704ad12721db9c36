"""pytest plugin: boards of a bench as fixtures."""
