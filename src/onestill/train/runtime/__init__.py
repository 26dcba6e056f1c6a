"""What a run needs of the machine: several processes, signals, torch.compile."""
