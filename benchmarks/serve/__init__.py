"""The server under load, under fuzz and under kill -9. Each file is a command; docs/serve.md has the figures."""
