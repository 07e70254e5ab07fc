"""Programs that a model wrote, run where they can do no harm.

`sandbox.py` is the way in. Inside, from the outside in: `tiers.py` chooses how to be isolated,
`view.py` says what of the machine can be seen, `launcher.py` (or bubblewrap) builds that view,
`zygote.py` is the warm server in it that forks a `keeper` for each program, `snippet.py` is
that program's process, and `kernel.py` and `seccomp.py` speak to Linux. `harness.py` runs tests
on functions. The modules from the launcher on import the standard library alone: they run in a
bare interpreter.
"""
