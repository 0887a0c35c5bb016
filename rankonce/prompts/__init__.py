"""Prompts as features: tasks, the words that values become, and the tokens of a request."""
