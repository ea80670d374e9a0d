"""The processes that generate: what they are told, what they do, and how the service watches them."""
