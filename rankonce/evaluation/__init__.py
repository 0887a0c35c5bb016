"""Metrics, baselines and reports of ranking quality."""
