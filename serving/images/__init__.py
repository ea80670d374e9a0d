"""OpenAI's images API: from the fields of a request to an order, and from pixels to an answer."""
