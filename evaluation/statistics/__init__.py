"""The metrics as pure functions of features: FID, inception score, precision and recall, confidence intervals."""
