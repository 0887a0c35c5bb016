"""A transformers model that reads packed passes."""
