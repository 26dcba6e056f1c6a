"""What a run leaves to be read, and what its numbers say."""
