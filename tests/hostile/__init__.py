"""Hostile peers, and what they cost: ``python -m tests.hostile``."""
