"""Who may use the endpoint, and how much they did: tenants with their quotas, API keys, usage by the hour."""
