"""The gallery: pictures that visitors publish. Needs `[access]`."""
