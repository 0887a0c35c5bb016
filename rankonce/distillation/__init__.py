"""A strong teacher becomes a ranker that can be served: distilled, pruned, quantised in steps."""
