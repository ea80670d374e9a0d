"""Training of both networks, with data from image folders or from the built-in scenes."""
