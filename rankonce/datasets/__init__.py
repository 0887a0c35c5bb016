"""Datasets as records: one file a source, and what earlier rows say about a row."""
