"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number is expected") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number}: {least} or more")
    return number
