"""Memory: the need of a generation, and what is available."""
