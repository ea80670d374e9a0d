"""Files: written as a whole, kept private, and JSON read strictly."""
