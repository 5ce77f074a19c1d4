"""From logits to a token: penalties, what is cut away, the draw, and log probabilities. One `Sampler` a sequence.

The order is that of transformers and vLLM: bias and penalties, temperature, then top-k, top-p and min-p. Draws are made
on the CPU with a generator of the row's own, so a seed gives the same draw on any device, and nothing here touches the
global random state, which belongs to training.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # arXiv:1909.05858; over prompt and answer
    presence_penalty: float = 0.0  # these two over the answer, as in the OpenAI API
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on to max_tokens
    top_logprobs: int | None = None  # None: no log probabilities; 0: of the drawn token alone

    @property
    def plain_greedy(self) -> bool:
        """The likeliest token, and nothing else asked: a whole batch of these is one argmax."""
        unpenalised = self.repetition_penalty == 1 and not (self.presence_penalty or self.frequency_penalty)
        return self.temperature == 0 and unpenalised and not self.logit_bias and self.top_logprobs is None


@dataclass(frozen=True)
class Drawn:
    token: int
    logprob: float | None = None  # by the model itself, before temperature and penalties
    top: tuple[tuple[int, float], ...] = ()


def told(logits: Tensor, tokens: Sequence[int], count: int) -> list[Drawn]:
    """logits (N, V) and the N tokens that follow -> their log probabilities, and those of the `count` likeliest."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(count)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    pairs = [tuple(zip(which, values, strict=True)) for which, values in likeliest]
    return [Drawn(*drawn) for drawn in zip(tokens, own, pairs, strict=True)]


class Sampler:
    def __init__(self, sampling: Sampling, prompt: Sequence[int], index: int = 0) -> None:
        """`index` counts the answers to one prompt, each of which draws for itself."""
        self.sampling = sampling
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed + index
        self._random = torch.Generator().manual_seed(seed % 2**63)
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.long)
        self._written: dict[int, int] = {}  # token -> how often

    def draw(self, logits: Tensor) -> Drawn:
        """One token from logits (V,)."""
        raw = logits.float().cpu()
        s = self.sampling
        scores = self._penalised(raw)
        token = int(scores.argmax()) if s.temperature == 0 else self._random_token(scores / s.temperature)
        self._written[token] = self._written.get(token, 0) + 1
        return Drawn(token) if s.top_logprobs is None else told(raw[None], [token], s.top_logprobs)[0]

    def _penalised(self, logits: Tensor) -> Tensor:
        s = self.sampling
        if s.plain_greedy or not (
            s.logit_bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
        ):
            return logits
        scores = logits.clone()
        written = torch.tensor(list(self._written), dtype=torch.long)
        if s.repetition_penalty != 1:
            seen = torch.unique(torch.cat((self._prompt, written)))
            there = scores[seen]
            scores[seen] = torch.where(there > 0, there / s.repetition_penalty, there * s.repetition_penalty)
        if self._written:
            counts = torch.tensor(list(self._written.values()), dtype=torch.float)
            scores[written] -= s.presence_penalty + s.frequency_penalty * counts
        for token, bias in s.logit_bias.items():
            scores[token] += bias
        return scores

    def _random_token(self, scores: Tensor) -> int:
        s = self.sampling
        if 0 < s.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(s.top_k).values[-1], float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        if s.top_p < 1:
            ordered, index = probabilities.sort(descending=True)
            before = ordered.cumsum(0) - ordered  # probability of all that are likelier
            probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered * (before < s.top_p))
        if s.min_p > 0:
            probabilities = probabilities * (probabilities >= s.min_p * probabilities.max())
        return int(torch.multinomial(probabilities, 1, generator=self._random))
