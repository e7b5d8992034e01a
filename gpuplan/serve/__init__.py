"""The built-in inference server: the real clock, inside."""
