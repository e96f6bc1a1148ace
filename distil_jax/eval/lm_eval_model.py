"""lm-evaluation-harness drives a model of ours: the model type "distil_jax" in its registry.

    python -m distil_jax.eval.lm_eval_model --model distil_jax --model_args path=DIR,dtype=float32 --tasks medmcqa

is `lm_eval` with the same arguments, after this module has registered the type: the harness (0.4.13) has no entry point
through which an installed package could do so before its own command runs. In Python, importing this module is enough:

    import lm_eval
    import distil_jax.eval.lm_eval_model
    lm_eval.simple_evaluate("distil_jax", model_args="path=DIR", tasks=["medmcqa"])

Needs `pip install 'distil-jax[eval]'`.
"""

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from distil_jax import sharding
from distil_jax.errors import UserError
from distil_jax.eval.encoding import Encoder, Request
from distil_jax.eval.scoring import Scorer
from distil_jax.eval.until import generate_until
from distil_jax.generation.sampling import Sampling
from distil_jax.models import hub

NAME = "distil_jax"
IGNORED = ("device", "max_batch_size")  # the harness passes them to every model; JAX knows its devices


class DistilJax(TemplateLM):
    """A Gemma 3 or Llama of a directory or hub id (owner/name, owner/name@revision), scored as `distil-jax evaluate`.

    Arguments, as `--model_args path=DIR,dtype=bfloat16,...`:
      path: of the model; `pretrained`, the harness's word, is taken for it too.
      dtype: of the weights, "float32", "bfloat16" or "float16".
      batch_size: prompts that are continued together (generate_until); log-likelihoods choose their own batches.
      mesh: "fsdp:4", say, as config.mesh ("data:2;fsdp:4" where several axes stand in one --model_args); by default all
        devices are data.
      max_length: longest input in tokens; by default the model's.
      add_bos_token: True or False overrides what the tokenizer does by itself.
    Raises UserError for an argument that it does not know.
    """

    def __init__(
        self,
        path: str = "",
        dtype: str = "float32",
        batch_size: int | str = 8,
        mesh: str = "",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        pretrained: str = "",
        **others: Any,
    ):
        super().__init__()
        if bool(path) == bool(pretrained):
            raise UserError("model_args of distil_jax: give path=DIR, a Hugging Face directory or hub id")
        if unknown := [name for name in others if name not in IGNORED]:
            raise UserError(f"model_args of distil_jax has no {unknown[0]!r}; see distil_jax/eval/lm_eval_model.py")
        from transformers import AutoTokenizer

        directory = hub.resolve(path or pretrained)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.mesh = sharding.mesh_of(str(mesh).replace(";", ",") or "data:-1")
        self.model, self.params = hub.load_pretrained(directory, dtype=dtype, mesh=self.mesh)
        self.encoder = Encoder(self.tokenizer, add_bos_token)
        self.scorer = Scorer(self.model, self.params, mesh=self.mesh, max_length=max_length)
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self._path = path or pretrained

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix_id

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encoder.encode([string], add_special_tokens)[0]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding writes) of each (context, continuation)."""
        found = self._scored(self.encoder.requests([request.args for request in requests]))
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scored([Request(tuple(context), tuple(continuation)) for _, context, continuation in requests])

    def _scored(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        with jax.set_mesh(self.mesh):
            return [(score.nats, score.greedy) for score in self.scorer(requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's length, each token once."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(ids) for ids in self.encoder.encode(texts)]
        scores = iter(self._scored(list(itertools.chain(*windows))))
        sums = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def _windows(self, ids: list[int]) -> list[Request]:
        rolling = utils.get_rolling_token_windows(
            token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return [Request(tuple(a), tuple(b)) for a, b in map(utils.make_disjoint_window, rolling)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop text or the number of tokens that is asked for."""
        texts: list[str] = [""] * len(requests)
        for members in _alike(requests):
            how = normalize_gen_kwargs(requests[members[0]].args[1])
            eos = self.tokenizer.decode(self.eot_token_id)
            until = handle_stop_sequences(how.get("until"), eos=eos)
            temperature = float(how.get("temperature", 0.0)) if how["do_sample"] else 0.0
            sampling = Sampling(temperature, int(how.get("top_k", 0)), float(how.get("top_p", 1.0)))
            with jax.set_mesh(self.mesh):
                written = generate_until(
                    self.model, self.params, self.tokenizer,
                    self.encoder.encode([requests[i].args[0] for i in members]),
                    until=until, max_new_tokens=how["max_gen_toks"], batch_size=self.batch_size, sampling=sampling,
                    max_length=self.max_length,
                )  # fmt: skip
            for i, text in zip(members, written, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the tokenizer's own format."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def _alike(requests: Sequence[Any]) -> Iterable[list[int]]:
    """The places of the requests that are generated in the same way."""
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
    return groups.values()


if NAME not in model_registry:  # by its name: run as a program this file is another module than the one imported
    model_registry.register(NAME, target="distil_jax.eval.lm_eval_model:DistilJax")


def main() -> None:
    """`lm_eval`, which now knows the model type."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
