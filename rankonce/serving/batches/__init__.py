"""OpenAI's files and batches over the server's own endpoints; they outlive the server.

service    what the routes use: both stores and the worker over one data folder
routes     /v1/files and /v1/batches; ``shapes`` are their questions and answers
uploads    a file on its way in, streamed to disk
dispatch   the one place where a line becomes a question to the engine
worker     from a batch that was created to its output files
lines      checks an input file; ``outputs`` writes the results
batch_store, file_store   rows and contents, in a ``database`` in the operator's ``folder``
"""
