"""The gallery: pictures that visitors chose to show. Needs `[access]`."""
