"""Quantized models as models of lm-evaluation-harness, which the extra ``lm-eval`` installs.

Importing this module registers them there under the name ``corequant``. Nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from corequant._validation import check_index, need_packages
from corequant.errors import TaskError
from corequant_transformers.checkpoint.reader import is_quantized, load, load_tokenizer
from corequant_transformers.evaluation.continuations import BATCH_TOKENS, Pair, score_pairs
from corequant_transformers.evaluation.encoding import longest_input, prefix_token, tokens_of
from corequant_transformers.evaluation.measurement import replica_of
from corequant_transformers.model.logits import placed
from corequant_transformers.model.replicas import check_given
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import check_device, undisturbed

need_packages("corequant_transformers.lm_eval", "lm-eval", "lm_eval")

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

__all__ = ["CorequantLM"]

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LIMIT = 256


@register_model("corequant")
class CorequantLM(TemplateLM):  # type: ignore[misc]
    """A quantized or float model that lm-evaluation-harness measures.

    Rows that are read at once are counted in tokens, and results don't depend on them beyond
    rounding; texts are generated one by one. Scores agree with ``evaluate_tasks``.

    Parameters
    ----------
    pretrained : str or Path or transformers.PreTrainedModel
        A directory that ``quantize`` wrote, a Transformers directory, a GGUF file, or a model in
        memory, which is only read.
    tokenizer : transformers tokenizer, optional
        By default that of the directory or file; needed for a model in memory.
    device : str, optional
        Where a model that is loaded runs; by default the CPU.
    batch_tokens : int
        Tokens that are read at once at most, padding included.
    max_length : int, optional
        Tokens that the model can read; by default what its config says.
    verify : bool
        Compare a directory's files with their digests.
    batch_size, max_batch_size : optional
        Accepted since the harness passes them, and without influence: ``batch_tokens`` counts.

    Raises
    ------
    MissingPackageError
        If lm-evaluation-harness isn't installed, when this module is imported.
    TypeError
        If a model in memory comes without a tokenizer.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant_transformers.lm_eval import CorequantLM
    >>> class Letters:
    ...     bos_token_id, eos_token_id = None, 0
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [ord(c) for c in text]}
    ...     def decode(self, token, **options):
    ...         return chr(token)
    >>> from lm_eval.api.instance import Instance
    >>> lm = CorequantLM(cqhf.tiny_model("llama"), Letters())
    >>> request = Instance("loglikelihood", {}, ("A cat", " says"), 0)
    >>> ((total, greedy),) = lm.loglikelihood([request])
    >>> total < 0, greedy
    (True, False)
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        verify: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        self.batch_tokens = check_index("batch_tokens", batch_tokens)
        if max_length is not None:
            check_index("max_length", max_length, 2)
        if isinstance(pretrained, str | Path):
            where = check_device(device or "cpu")
            loaded, own_tokenizer = _loaded(pretrained, verify)
            model, tokenizer = loaded.to(where), tokenizer or own_tokenizer
        else:
            model = check_given(pretrained, floating=False)
            if tokenizer is None:
                raise TypeError("tokenizer must be given with a model in memory, got None")
        self.tokenizer = tokenizer
        self.model = replica_of(model)
        self.max_length = max_length or longest_input(model.config)
        self._device = placed(self.model, torch.zeros(1)).device

    @property
    def eot_token_id(self) -> int:
        """Token for the end of a text."""
        if self.tokenizer.eos_token_id is None:
            raise TaskError(
                "the tokenizer must have a token for the end of a text (eos_token), where "
                "generation ends; it has none"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context."""
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Name by which the harness tells tokenizers apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's chat template, or the one of a name, if one is asked for."""
        if chat_template is False:
            return ""
        name = None if chat_template is True else chat_template
        return str(self.tokenizer.get_chat_template(name))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as a text, by the tokenizer's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return a text's tokens, with special ones as the tokenizer adds them by default."""
        return list(tokens_of(self.tokenizer, string, special=add_special_tokens))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, cut into what the model can read."""
        windows: list[Pair] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [Pair(*map(tuple, make_disjoint_window(pair))) for pair in pairs]
            windows += parts
            counts.append(len(parts))
        scores = iter(self._scores(windows))
        found = []
        for request, count in zip(requests, counts, strict=True):
            total = sum(next(scores)[0] for _ in range(count))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(before), tuple(after)) for _, before, after in requests]
        found = self._scores(pairs)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    @undisturbed()
    def _scores(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        found = score_pairs(self.model, pairs, self.max_length, batch_tokens=self.batch_tokens)
        return [(score.total, score.greedy) for score in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return texts that go on until a stop sequence, or as long as is asked for."""
        found = []
        for request in requests:
            context, options = request.args
            text = self._generate(context, dict(options))
            self.cache_hook.add_partial("generate_until", (context, options), text)
            found.append(text)
        return found

    @undisturbed()
    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        stops.append(self.tokenizer.decode(self.eot_token_id))
        limits = [options.pop(name, None) for name in _LIMITS]
        limit = int(next((n for n in limits if n is not None), _DEFAULT_LIMIT))
        room = self.max_length - limit
        if room < 1:
            raise TaskError(
                f"max_gen_toks must be less than the {self.max_length} tokens that the model can "
                f"read, got {limit}"
            )
        temperature = float(options.pop("temperature", 0.0))
        if options.setdefault("do_sample", temperature > 0) and temperature > 0:
            options["temperature"] = temperature
        ids = torch.tensor([self.tok_encode(context)[-room:]])
        start = ids.shape[1]

        def stopped(read: torch.Tensor, *scores: Any, **more: Any) -> torch.Tensor:
            text = self.tokenizer.decode(read[0, start:])
            return torch.tensor([any(stop in text for stop in stops)], device=read.device)

        read = self.model.generate(
            placed(self.model, ids),
            attention_mask=placed(self.model, torch.ones_like(ids)),
            max_new_tokens=limit,
            stopping_criteria=[stopped],
            pad_token_id=self.eot_token_id,
            use_cache=True,
            **options,
        )
        text = str(self.tokenizer.decode(read[0, start:], skip_special_tokens=True))
        for stop in stops:
            text = text.split(stop)[0] if stop else text
        return text


def _loaded(path: str | Path, verify: bool) -> tuple[Any, Any]:
    """Return a model and its tokenizer."""
    if is_quantized(path):
        return load(path, verify=verify), load_tokenizer(path, verify=verify)
    source = Source(path, verify=verify)
    return source.load(), source.tokenizer()
