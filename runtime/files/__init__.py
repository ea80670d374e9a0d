"""Files: atomic writing, private folders and strict JSON."""
