"""The checks of `loader-doctor`, each a function from what was read to findings.

In: `facts.Examined`. Out: findings. No check reads a sample again; `lerobot` alone opens files, for what samples
do not hold.
Read `host` (what the config asks of this host), `model`, `actions`, `episodes`, `frames`, `text`, `mixture` and `lerobot`.
"""
