"""One file for each method: its `Options`, networks and step. A new method is a new file and its name in METHODS."""
