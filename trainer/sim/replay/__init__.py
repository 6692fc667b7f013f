"""Gates before a training: do the recorded actions solve their tasks, and do they still after the action codec?

In: demonstrations with seeds, an environment, and a processor with its codec. Out: successes of both gates, and what a failure
comes from: a dimension, a unit, the gripper's convention. Read `recordings` (rows -> actions and seeds), `plays` (actions ->
successes), `round_trip` (actions -> tokens -> actions), `diagnosis` (what would have worked), `gates` (both gates of a task),
then `command` (`python -m trainer.sim.replay`).
"""
