"""A transformers model that reads packed passes: loading, packing, attention, head, prefix cache."""
