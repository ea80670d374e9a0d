"""The page of the service, one file."""
