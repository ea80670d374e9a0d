"""The `flexvar` command."""
