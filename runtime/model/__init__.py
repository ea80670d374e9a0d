"""The rules of the model, as pure functions and frozen values."""
