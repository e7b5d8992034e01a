"""What the card says: NVML where there is one, the emulated card's own state otherwise."""
