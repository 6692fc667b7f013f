"""Closed-loop evaluation: a policy acts in simulators, and what came of it is counted.

In: a policy, tasks and seeds. Out: one `EpisodeResult` per episode, tables, intervals, videos. No scripted expert is imported,
and the simulator's true state stays in the simulator. Read `episode.py` (the rules of one episode), `simulators.py` (their
processes), `rollout.py` (the loop), `matching.py` (does the policy fit the environment?), then `results.py` (the JSON that a
second run resumes from), `intervals.py`, `summary.py` (tables) and `pictures.py` (videos, contact sheet).
"""
