"""Seeding, logging and run logs for the projects of this workspace."""
