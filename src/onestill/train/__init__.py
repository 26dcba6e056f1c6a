"""Training: one loop, and one file for each method. `run.train_recipe` is what the command calls."""
