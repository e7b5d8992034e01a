"""What is decided: admission, batching, dispatch. Pure: no clock, no socket, no random number (a contract holds it)."""
