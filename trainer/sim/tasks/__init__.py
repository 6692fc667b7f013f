"""Environments that a policy can be evaluated in, behind one small interface.

In: a task's name, a seed and actions. Out: what the robot's sensors measure, the instruction, success and reward; never the
simulator's true state. Read `interface.py` (what an environment has), `registry.py` (names, and modules of users), then
`shipped.py` (our ManiSkill tasks) and `gym_task.py` (any other ManiSkill or gymnasium environment).
"""
