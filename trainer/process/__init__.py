"""How a rank's process begins and ends: its memory; before the loaders are ready; on a stop signal, or with the DeepSpeed
processes that started it.

In: the launcher's message, signals and parent processes. Out: where the loaders are; a rank that ends with one line that says
why. Read `allocator`, `early`, `signals`, `early_end`, then `parents`.
"""
