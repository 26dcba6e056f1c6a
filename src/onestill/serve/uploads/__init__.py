"""Decoding of uploaded pictures, in processes that are killed where a file costs too much."""
