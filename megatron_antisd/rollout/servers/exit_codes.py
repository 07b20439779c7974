"""How a server tells the node's command what became of it."""

EXIT_CONFIGURATION = 2
"""To start the server again would lead to the same."""
