"""The process that talks to Weights & Biases: JSON lines come in on stdin, the end of it finishes.

wandb starts a service, threads, exit hooks and environment variables. Kept in a process of its own,
none of that reaches the run, and the whole of it can be killed. Runs as a script, without rft.
"""

import json
import sys

import wandb


def main() -> None:
    """The first line holds `wandb.init`'s arguments, each further one what to log."""
    run = wandb.init(
        **json.loads(sys.stdin.readline()), settings=wandb.Settings(silent=True, console="off")
    )
    # A resumed run repeats steps after its checkpoint, and wandb's own step never goes back.
    run.define_metric("*", step_metric="step")
    for line in sys.stdin:
        run.log(json.loads(line))
    run.finish()


if __name__ == "__main__":
    main()
