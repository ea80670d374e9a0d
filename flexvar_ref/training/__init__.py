"""Training of the reference: the data it draws from and the built-in scenes."""
