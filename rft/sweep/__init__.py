"""Many runs from one command: `python -m rft.train -m ...`.

`launch` is what every launcher does: compose and check all runs, leave out those that are finished,
have a runner run the others, say how each ended. `local`, `ray_tasks` and `slurm` are the runners;
`child` is one run's process. Imports neither torch nor, before it is asked for, Ray or submitit.
"""
