"""Editing: from pictures and masks to given tokens of every scale."""
