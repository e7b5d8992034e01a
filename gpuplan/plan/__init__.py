"""What to choose: step times from runs, capacities, layouts, batch sizes and thresholds, found by simulation."""
