"""HTTP and WebSocket routes, the page's files, and what every route shares."""
