"""What answers requests: so far the engine. Gateway, routing and adapter cache come beside it."""
