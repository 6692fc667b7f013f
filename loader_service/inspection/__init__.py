"""`loader-inspect`: what the config makes of the data, row by row, as a trainer would be given it."""
