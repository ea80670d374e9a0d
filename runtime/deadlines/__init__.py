"""Deadlines: measured costs, and the choice of a schedule."""
