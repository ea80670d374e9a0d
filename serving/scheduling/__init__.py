"""Which images run next, and when an image will be done."""
