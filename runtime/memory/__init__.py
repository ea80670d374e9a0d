"""Memory: what a generation needs, and what the machine has left."""
