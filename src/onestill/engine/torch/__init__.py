"""The runtimes on torch: eager, and fast with CUDA graphs and compiled networks. They need `[torch]`."""
