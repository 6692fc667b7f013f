"""Closed-loop evaluation: a policy acts in simulators, and what came of it is counted.

In: a policy, tasks and seeds. Out: one `EpisodeResult` per episode, tables, intervals, videos. No scripted expert is imported,
and the simulator's true state stays in the simulator. Read `episode` (the rules of one episode), `simulators` (their processes),
`rollout` (the loop), `matching` (does the policy fit the environment?), `seeds` (are they held out?), then `results` (the JSON
that a second run resumes from), `intervals`, `summary` (tables), `swapping` (does the outcome follow the instruction?) and
`pictures` (videos, contact sheet).
"""
