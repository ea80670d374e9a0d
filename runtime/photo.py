"""`flexvar_runtime.pictures.photo` under its public import path."""

from .pictures.photo import Photo, read_mask, read_photo

__all__ = ["Photo", "read_mask", "read_photo"]
