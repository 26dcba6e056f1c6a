"""A server for people and programs: a page that draws while one types, its socket, and the images API."""
