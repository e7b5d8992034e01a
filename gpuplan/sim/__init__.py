"""The same decisions on virtual time."""
