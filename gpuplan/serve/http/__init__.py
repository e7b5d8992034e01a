"""The server's faces: an ASGI app, and the protocols it speaks."""
