"""Generation: the engine protocol, its implementations, and groups of rollouts. Importing this package imports no engine."""
