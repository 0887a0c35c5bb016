"""Beyond one machine: ``rankonce score --ray`` on Ray Data, ``rankonce serve --ray`` on Ray Serve.

Ray places workers, restarts them and routes questions; what they hold is the ranker and the server
of one machine.
"""
