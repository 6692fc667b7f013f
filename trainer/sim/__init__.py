"""ManiSkill in the loop: the table-top environments, scripted experts, the collector of demonstrations, and the evaluator.

In: a task and seeds. Out: demonstrations in JSONL and NPZ; success rates of an export, with videos.
Read `environment`, `stacking` (a task of ours), `experts` (state -> action), `noise`, `demonstration` (one episode), `recording`
(files), `collect` (the command) with `policy_actor` (a policy acts), `workers` (processes); for closed-loop evaluation `evaluate`
(the command), `options`, `tasks`, `evaluation` and `success` (during a run); before a training: `replay`.
Needs the extra `stoker[sim]` and a Vulkan renderer (`trainer/sim/install_renderer.sh`); imported only where used.
"""
