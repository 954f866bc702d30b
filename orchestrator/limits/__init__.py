"""How much a tenant may use: requests and tokens per minute, requests at once. What a request may cost is reserved before it
starts, and what it did cost is settled after.

`LocalLimiter` keeps count in one process, `SharedLimiter` in the database for several gateways.
"""
