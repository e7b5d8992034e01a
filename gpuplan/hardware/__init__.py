"""What the card is: facts about GPUs, the MIG rules and the cost of a step. Reads no clock and no socket."""
