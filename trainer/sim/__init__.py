"""ManiSkill in the loop: the table-top environments, scripted experts, and the collector of demonstrations.

In: a task and seeds. Out: demonstrations in JSONL and NPZ.
Read `environment`, `experts` (state -> action), `recording` (files), `collect` (the command), `workers` (processes).
Needs the extra `stoker[sim]` and a Vulkan renderer (`trainer/sim/install_renderer.sh`); imported only where used.
"""
