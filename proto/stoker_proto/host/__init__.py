"""What every program needs of its machine.

In: paths, parent processes, signals, limits, exceptions. Out: files that are whole or absent, processes that end with their
parent, commands that Ctrl-C ends, and a verdict whether an error is the machine's fault or the data's.
Read `files` (write whole, lock), `process`, `interrupts`, `descriptors`, `trouble`, `systemd`, `start` (launcher
to ranks), then `stages` (a thread's clock).
"""
