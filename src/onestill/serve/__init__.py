"""A server for people and programs: the page that draws while one types, the socket under it, the images API."""
