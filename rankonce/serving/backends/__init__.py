"""Whoever computes the passes of a ranker: one interface, and an implementation each.

    base.py         Backend: prompts that share a beginning → log-probabilities of label tokens
    scorer.py       a backend as the ``PassScorer`` of a ranker; the native one is ``model.scoring``
    remote.py       what all engines behind a URL share: connections, retries, checks, errors
    vllm.py         vLLM by its completions
    vllm_local.py   vLLM in this process
    sglang.py       SGLang by its score endpoint
    processes.py    a server as a process of its own
    commands.py     the commands that start one
    opening.py      from options to a ranker

Everything but the passes stays as it is: prompts, tasks, calibration, endpoints.
"""
