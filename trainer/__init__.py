"""Lean DeepSpeed trainer ranks: client -> device -> step."""
