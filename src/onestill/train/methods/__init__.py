"""One file for each method: its `Options`, its networks, its step. A new method is a new file and its name in METHODS."""
