"""megatron_antisd: Anti-Self-Distillation (arXiv 2605.11609) on Megatron-Core and vLLM.

Importing the package imports nothing heavy; `megatron_antisd.algorithm` needs torch alone.
"""

__version__ = "0.1.0"
