"""ManiSkill in the loop: the table-top environments, scripted experts, and the collector of demonstrations.

Needs the extra `stoker[sim]` and a Vulkan renderer (`trainer/sim/install_renderer.sh`); imported only where used.
"""
