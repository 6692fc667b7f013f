"""What a model is worth: validation over a split (`validation`) on the numbers of `scores`."""
