"""Averages of weights: EMA, post-hoc EMA, the mean of several runs."""
