"""The load generator: the real clock, outside. Sends on schedule whatever the server does; measures at the socket."""
