"""Do the losses help? What four papers promise, on data that ships with scikit-learn: `make study`.

Read `grid.py` first, then `data.py`, `metrics.py` and `train.py`, then the grid of a paper, such as
`sd_dropout.py`. `run.py` runs them.
"""
