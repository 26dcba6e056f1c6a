"""Who may draw, and how much: API keys, free trials, quotas, rate limits, and their database."""
