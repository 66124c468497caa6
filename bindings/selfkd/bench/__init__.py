"""``selfkd bench``: every operator beside the code one would write without it.

Read in this order: `case` (what is timed), `cases` (a case of each operator, at any shape), `suite`,
`measure` (one case, in a process of its own), `others` (what disturbs it), `run` (the command), `report`,
`plot`, `readme` and `results` (what becomes of the numbers), `calls` (small calls). Imported only by the
command.
"""
