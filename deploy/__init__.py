"""Ways to start Stoker: one machine, several, a Ray cluster, systemd, containers. (A regular package: an installed `deploy`
cannot shadow it.)

In: a config. Out: loaders and ranks as processes, and one exit code. `README.md` is the runbook. Read `launch` (stoker-launch:
one machine, or each of several), `node` (one node's course) with `loaders` (start, restart, drain), `child` (one program),
`keeper` (nothing outlives the launcher) and `completion` (`summary.json`); `nodes` (several machines), `ray_launch` with
`cluster` (Ray); then the programs of `make demo` and `make success`: `demo`, `success`, and `beside` (jobs beside a training).
`wheel_hook` builds the wheel.
"""
