"""Load tester and capacity planner for GPU inference."""

__version__ = "0.1.0"
