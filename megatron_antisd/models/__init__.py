"""Model families as tables, and the Megatron model built from them."""
