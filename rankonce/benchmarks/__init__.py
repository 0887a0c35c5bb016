"""Measurements of the kernels and of whole passes, each beside its limit and its peers.

``python -m rankonce.benchmarks`` runs where only PyTorch, transformers and Triton are installed:
nothing here imports the ranker, the prompts, the datasets or the command line, but for
``precision_requests`` and what reads requests that are not tokenised.
"""
