"""How good edits are: inpainting, refining, expanding and other sizes, measured on held-out pictures with labels.

A feature network judges the results. Its classes must be those of the model. Results hold the pixels too, so that they
can be shown.
"""
