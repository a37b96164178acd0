"""What a model can do, measured on text: how much it reads of its future, and whether it can use its context."""

from lightning_lighthouse.evaluation.leak_probe import FutureLeakProbe
from lightning_lighthouse.evaluation.long_context import LongContextEvaluation
from lightning_lighthouse.evaluation.text import Text, read_text, token_losses

__all__ = ["FutureLeakProbe", "LongContextEvaluation", "Text", "read_text", "token_losses"]
