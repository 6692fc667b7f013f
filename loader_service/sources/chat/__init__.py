"""Dialogues: rows of the usual chat formats -> turns."""
