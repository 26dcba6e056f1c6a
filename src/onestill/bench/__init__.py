"""How long pictures take, where the time goes, and what it was measured on."""
