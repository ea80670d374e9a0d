"""Pictures: reading them, writing them, and the one rule that rounds pixels."""
