"""One sequence over several ranks: who holds which tokens, and what they exchange around attention; no Lightning."""
