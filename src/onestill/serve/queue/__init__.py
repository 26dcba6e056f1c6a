"""The scheduler of requests: fair queues, and the one thread that owns the model."""
