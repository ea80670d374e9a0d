"""`flexvar evaluate`: how good the images of a bundle are, as FID, sFID, inception score, precision and recall."""
