"""llama.cpp, as far as the tests need it: log-probabilities of the next token."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import xllamacpp


@contextmanager
def serving(path, vocabulary):
    """Give a function from a prompt (token ids or text) to all tokens' log-probabilities."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def next_token(prompt):
        prompt = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
        answer = server.handle_completions(
            {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0}
        )
        rows = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = np.full(vocabulary, -np.inf)
        found[[row["id"] for row in rows]] = [row["logprob"] for row in rows]
        return found

    yield next_token
