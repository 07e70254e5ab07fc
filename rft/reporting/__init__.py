"""Runs compared, and pages of one or several. Imports neither torch nor vllm.

milestones.py when a curve reaches a score, and the best it reached by then; bootstrap intervals
settings.py   which keys of a config make an arm, and its label
arms.py       run folders to arms, pairs and what had to be left out
sheets.py     which tables there are, and what each measures of a run
tables.py     a table as Markdown, CSV and LaTeX
figures.py    learning curves, posterior maps, difficulties, phases, lengths
comparison.py all of these together; `compare(paths)` is the door
rollouts.py   the rollouts that a page has inside it
page.py       the HTML of a run or a comparison
"""
