"""The HTTP side: the application, the server and the limits of a connection."""
