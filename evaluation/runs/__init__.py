"""A run: the images of one bundle with one setting, or their features, in shards that can be resumed."""
