"""Synthetic tasks that show what a memory is good for."""
