"""One module for each command of `onestill`."""
