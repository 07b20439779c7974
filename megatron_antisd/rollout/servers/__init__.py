"""vLLM in processes of its own, on nodes of its own: the server, how trainer and servers find each other, and the engine that spreads requests."""
