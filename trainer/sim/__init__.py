"""ManiSkill in the loop: the table-top environments, scripted experts, the collector of demonstrations, and the evaluator.

In: a task and seeds. Out: demonstrations in JSONL and NPZ; success rates of an export, with videos.
Read `environment`, `experts` (state -> action), `recording` (files), `collect` (the command), `workers` (processes); for
closed-loop evaluation `evaluate` (the command), `tasks` and `evaluation`.
Needs the extra `stoker[sim]` and a Vulkan renderer (`trainer/sim/install_renderer.sh`); imported only where used.
"""
