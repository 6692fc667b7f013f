"""Environments that a policy can be evaluated in, behind one small interface.

In: a task's name, a seed and actions. Out: what the robot's sensors measure, the instruction, success and reward; never the
simulator's true state. Read `interface` (what an environment has), `registry` (names, and modules of users), then `shipped` (our
ManiSkill tasks) and `gym_task` (any other ManiSkill or gymnasium environment).
"""
