"""Pictures: reading and writing them, and the conversion to and from pixels."""
