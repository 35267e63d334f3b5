"""Data sets of users."""
