"""How close a quantized model is to its original: on a text, in what it writes, on tasks."""

from autoround_modifier.evaluation.divergence import Divergence, compare, next_token_logits

__all__ = ["Divergence", "compare", "next_token_logits"]
