"""Editing: pictures and masks go in, given tokens for every scale come out."""
