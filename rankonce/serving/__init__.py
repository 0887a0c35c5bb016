"""Scores over HTTP, in our own form and in those of OpenAI, SGLang, Cohere and Jina.

app       the routes, and the start of the server
schemas   shapes of the questions, ``fields`` the values in them, ``answers`` shapes of the answers
failures  every failure as an answer in OpenAI's form
models    which engine answers, and adapters that come and go
engine    from question to answer, for one model
prompts   prompts that the caller wrote, to token ids; ``packing`` finds what they share
reranking documents and answers in the words of each rerank client
logprobs  what the model says of the next token, as OpenAI's clients read it
batcher   the one thread that runs the model, and who waits for it; ``turns`` fills a pass
prefixes  prefixes prepared before their candidates; ``results`` scores that are kept
observations  what the engine counts, and callbacks for whoever exports it

Around the engine:

admission    what every question passes: id, key, limits, log line; ``exchanges`` are what it knows
keys         who may ask, ``limits`` how much, ``bodies`` and ``connections`` how slowly
logs         on stderr, ``metrics`` for Prometheus, ``tracing`` for OpenTelemetry
lifecycle    warming up (``warm_up``), ready, draining
operations   the options of all of these
"""
