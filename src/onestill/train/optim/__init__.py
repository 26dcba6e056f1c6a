"""Optimizers, and one optimisation step: backward, average, clip, step."""
