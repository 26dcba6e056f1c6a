"""Who may ask for pictures and how many: API keys, free trials, quotas, rate limits, and the database behind them."""
