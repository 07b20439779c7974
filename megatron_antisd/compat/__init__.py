"""Support for running Megatron-Core and vLLM without a GPU, and inside one process; every repair states the upstream behaviour it answers."""
