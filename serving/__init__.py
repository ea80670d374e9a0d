"""`flexvar serve`: a bundle as an HTTP service with OpenAI's images API."""
