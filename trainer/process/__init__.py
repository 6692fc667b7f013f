"""How a rank's process ends: on a stop signal, or with the DeepSpeed processes that started it.

In: signals and parent processes. Out: a rank that ends with one line that says why. Read `signals`, then `parents`.
"""
