"""Experiments that run themselves: a file of steps, variables and rules; tables that grow.

declaration.py  the file: steps, runs, rules and plots
plan.py         the steps of every run, with what they need
queue.py        steps over the devices at hand, each once, resumable
table.py        a row a run, in Parquet and in an Excel sheet
comparison.py   paired differences against a baseline, and the rules that were written before
plots.py        pictures that the file declares
tracking.py     the same rows in MLflow
"""
