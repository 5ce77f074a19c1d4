"""From a body of the OpenAI API to what the worker is asked, and from its events to a whole answer.

The same for a caller at a route and for a row of a batch. Knows no HTTP, and not whether anybody waits.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from gpu_service import bodies
from gpu_service.data import encode, render_chat
from gpu_service.errors import BadRequest, NoSuchModel, PromptTooLong
from gpu_service.models import Models, Source
from gpu_service.resident import AdapterFiles
from gpu_service.sd import PictureSource
from gpu_service.text import Event, Piece, PromptTold
from gpu_service.worker import Generation

T = TypeVar("T")


@dataclass(frozen=True)
class Tuned:
    """A tuned model whose files are on this disk."""

    base_model: str
    adapter: AdapterFiles


@dataclass(frozen=True)
class Prepared:
    """A body that was understood."""

    body: bodies.ChatBody | bodies.CompletionBody
    wanted: Generation
    shape: bodies.AnswerShape
    echo: str  # what of the prompt stands before the answer

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The answer as one object."""
        answers, finishes = [bodies.Answer(self.echo) for _ in range(self.wanted.n)], []
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, PromptTold):
                    for answer in answers:
                        answer.drawn, answer.offsets = event.drawn, self.shape.offsets(event.drawn, self.echo, 0)
                    continue
                answer = answers[event.index]
                if isinstance(event, Piece):
                    answer.offsets += self.shape.offsets(event.drawn, event.text, len(answer.text))
                    answer.text += event.text
                    answer.drawn += event.drawn
                else:
                    answer.reason = event.reason
                    finishes.append(event)
        return self.shape.whole(answers, finishes)


class Answering:
    def __init__(self, models: Models, tokenizing: Executor, tuned: Callable[[str], Awaitable[Tuned | None]]) -> None:
        """`tuned` finds a tuned model by its id; None where there is no such model."""
        self._models, self._tokenizing, self._tuned = models, tokenizing, tuned

    async def chat(self, raw: bytes, caller: str) -> Prepared:
        """Raises BadRequest and its kind, NoSuchModel."""
        body = bodies.parse(bodies.ChatBody, raw)
        source, tuned = await self.resolve(body.model)

        def tokens() -> list[int]:
            messages = [m.plain() for m in body.messages]
            return encode(source.tokenizer, render_chat(source.tokenizer, messages, add_generation_prompt=True),
                          special=False, param="messages")  # fmt: skip

        prompt = await self.off_loop(tokens)
        return self._prepared(body, source, tuned, prompt, "messages", caller)

    async def completion(self, raw: bytes, caller: str) -> Prepared:
        """Raises BadRequest and its kind, NoSuchModel."""
        body = bodies.parse(bodies.CompletionBody, raw)
        source, tuned = await self.resolve(body.model)
        text = body.text()
        prompt = await self.off_loop(lambda: encode(source.tokenizer, text, special=True))
        if not prompt and source.tokenizer.bos_token_id is not None:
            prompt = [source.tokenizer.bos_token_id]
        if not prompt:
            raise BadRequest(
                "prompt is empty, and this model has no token to begin with: give some text.", param="prompt"
            )
        return self._prepared(body, source, tuned, prompt, "prompt", caller)

    def _prepared(
        self,
        body: bodies.ChatBody | bodies.CompletionBody,
        source: Source,
        tuned: Tuned | None,
        prompt: list[int],
        param: str,
        caller: str,
    ) -> Prepared:
        room = source.context_tokens - len(prompt)
        if room < min(1, body.wanted_tokens):
            raise PromptTooLong(len(prompt), source.context_tokens, param=param)
        wanted = Generation(
            base_model=source.id,
            adapter=tuned.adapter if tuned else None,
            prompt=prompt,
            sampling=body.sampling(min(room, body.wanted_tokens), source, body.wanted_logprobs),
            dials=body.dials_for(source.tensors, source.n_layers),
            n=body.n or 1,
            tell_prompt=isinstance(body, bodies.CompletionBody) and body.tells_prompt,
            caller=caller,
            alone=body.deterministic,
            shorten=isinstance(body, bodies.ChatBody) and not body.names_limit,
        )
        shape = bodies.AnswerShape.new(isinstance(body, bodies.ChatBody), body.model, source.token_text)
        echo = body.text() if isinstance(body, bodies.CompletionBody) and body.echo else ""
        return Prepared(body, wanted, shape, echo)

    async def resolve(self, model: str) -> tuple[Source, Tuned | None]:
        """A model of text. Raises NoSuchModel, naming those that exist, and OtherKind."""
        source, tuned = await self.resolve_either(model)
        return self._models.source(source.id), tuned

    async def resolve_either(self, model: str) -> tuple[Source | PictureSource, Tuned | None]:
        """Raises NoSuchModel, naming those that exist."""
        if model in self._models.ids():
            return self._models.either_source(model), None
        tuned = await self._tuned(model)
        if tuned is None:
            raise NoSuchModel(model, self._models.ids())
        return self._models.either_source(tuned.base_model), tuned

    async def off_loop(self, work: Callable[[], T]) -> T:
        """On the thread that tokenizes."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
