"""Checkpoints of integers in the formats of other engines."""
