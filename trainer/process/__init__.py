"""How a rank's process ends: stop signals, and a launcher that is gone.

In: signals and parent processes. Out: a rank that ends with one line that says why. Read `signals`, then `parents`.
"""
