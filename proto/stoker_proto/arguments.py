"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def share(text: str) -> float:
    """A number in [0, 1]."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number:g}: 0 to 1 is expected")
    return number


def positive_share(text: str) -> float:
    """A number in (0, 1]."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{number:g}: above 0 and at most 1 is expected")
    return number


def positive_seconds(text: str) -> float:
    """A finite number above 0."""
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{number:g}: a finite number above 0 is expected")
    return number


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number is expected") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number}: {least} or more")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a number is expected") from None
