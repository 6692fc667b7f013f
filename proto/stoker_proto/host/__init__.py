"""What every program needs of its machine.

In: paths, parent processes, signals, limits, exceptions. Out: files that are whole or absent, processes that end with their
parent, commands that Ctrl-C ends, and a verdict whether an error is the machine's fault or the data's.
Read `files` (write whole, lock), `process`, `start` (launcher to ranks), `interrupts`, `descriptors`, `names` (of hosts),
`ports`, `trouble`, `systemd`; `hub_cache` (models that Hugging Face's tools downloaded), `lfs` (pointers of Git LFS in the
place of files), then `stages` (a thread's clock).
"""
