"""A checkpoint's parts as torch modules: loading them, LoRAs, where half precision is not enough. Needs `[torch]`."""
