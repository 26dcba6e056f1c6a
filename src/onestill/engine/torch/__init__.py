"""The runtimes for machines with torch: eager, and fast with CUDA graphs and compiled networks. Need `[torch]`."""
