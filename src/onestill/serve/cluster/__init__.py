"""Several replicas of one server: Ray Serve, and the proxy before replicas that may die."""
