"""llama.cpp, as far as the tests need it: log-probabilities of the next token."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import xllamacpp


@contextmanager
def serving(path, vocabulary):
    """Give a ``Served`` of a GGUF file."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    yield Served(xllamacpp.Server(params), vocabulary)


class Served:
    """A function from a prompt (token ids or text) to all tokens' log-probabilities."""

    def __init__(self, server, vocabulary):
        self.server, self.vocabulary = server, vocabulary

    def __call__(self, prompt):
        (row,) = self._completed(prompt, n_predict=1, n_probs=self.vocabulary)
        found = np.full(self.vocabulary, -np.inf)
        rows = row["top_logprobs"]
        found[[row["id"] for row in rows]] = [row["logprob"] for row in rows]
        return found

    def generate(self, prompt, count):
        """Return the likeliest tokens after a prompt, one after the other."""
        rows = self._completed(prompt, n_predict=count, n_probs=1)
        return [row["id"] for row in rows]

    def _completed(self, prompt, **options):
        prompt = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
        answer = self.server.handle_completions({"prompt": prompt, "temperature": 0.0, **options})
        return answer["choices"][0]["logprobs"]["content"]
