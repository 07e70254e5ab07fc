"""Tracking: a run's metrics go to JSONL files always, and to console, wandb, TensorBoard if asked.

files.py      RunFiles: metrics.jsonl, evals.jsonl, rollouts/; the truth that resume relies on
tracker.py    Tracker: what the loop talks to
background.py Background: a sink in a thread of its own, unable to stall or kill a run
console.py    PlainConsole, RichConsole
external.py   Wandb, TensorBoard
display.py    what several displays derive from a step's metrics
"""
