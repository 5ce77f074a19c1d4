"""From rows to batches of tokens: chat templates, loss masks, and a data set tokenised once into flat files.

Serving and training share `render_chat` and `encode`, so that a tuned model sees in training what it will be asked.
Knows nothing of the model or the optimizer. The formats that rows come in are dataset.py's.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import TemplateError

import datafile
import dataset
from gpu_service.artifacts import atomic_file, file_ref
from gpu_service.errors import BadDataset, BadRequest

FORMAT = 2  # of the files on disk; raised when tokens or masks come out differently
CONTENT_TOKENS = 2**20  # hashed at a time
TOLD_ROWS = 1000  # tokenised in half a second or so
ReadRows = Iterable[tuple[int, dataset.Row | datafile.RowError]]
Tokenize = Callable[[dataset.Row], "Tokens"]
FILES = ("tokens", "learn", "offsets")  # int32 and bool by token, int64 by row; this machine's own byte order


class Tokenizer(Protocol):
    """What is used of a fast tokenizer of transformers."""

    chat_template: Any
    eos_token_id: int | None
    added_tokens_decoder: Mapping[int, Any]
    backend_tokenizer: Any

    def __hash__(self) -> int: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool) -> Mapping[str, Any]: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[Any] | None,
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any: ...


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: list[Any] | None = None,
) -> str:
    """The model's own template. Raises BadRequest, in the template's words, for messages that it refuses.

    The template comes with the model, so it may fail in any way that a sandboxed Jinja expression can.
    https://huggingface.co/docs/transformers/chat_templating
    """
    if not tokenizer.chat_template:
        raise BadRequest(
            "This model has no chat template: use /v1/completions, or train on prompt/completion rows.",
            param="messages",
        )
    try:
        rendered: str = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as exc:
        raise BadRequest(
            f"This model's chat template refuses these messages: {exc}. Change their roles or order, or use "
            "/v1/completions and prompt/completion rows.",
            param="messages",
        ) from exc
    return rendered


def encode(tokenizer: Tokenizer, text: str, *, special: bool, param: str = "prompt") -> list[int]:
    """Token ids. `special`: with the BOS that this tokenizer puts before a plain text, if it does.

    Text from `render_chat` is encoded without: its template has written them.
    """
    ids: list[int] = _encoding(tokenizer, text, special, param)["input_ids"]
    return ids


def _encoding(tokenizer: Tokenizer, text: str, special: bool, param: str) -> Mapping[str, Any]:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:  # JSON can carry half of a character, "\ud83d"; no tokenizer can
            raise BadRequest(
                f"Character {exc.start} is half of a surrogate pair: send valid Unicode.", param=param
            ) from exc
    return tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)


TrainOn = Literal["completions", "all"]


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    learn: list[bool]  # by token: it is a label, that is, the loss counts how well it was predicted
    truncated: bool


def tokenize_row(tokenizer: Tokenizer, row: dataset.Row, max_length: int, train_on: TrainOn = "completions") -> Tokens:
    """One row, cut on the right to `max_length` tokens. Raises BadRequest where the chat template refuses it.

    The first token is never a label: nothing comes before it to predict it from.
    """
    ids, learn = _chat(tokenizer, row) if isinstance(row, dataset.Chat) else _completion(tokenizer, row)
    if train_on == "all":
        learn = [True] * len(ids)
    if learn:
        learn[0] = False
    return Tokens(ids[:max_length], learn[:max_length], len(ids) > max_length)


def _completion(tokenizer: Tokenizer, row: dataset.Completion) -> tuple[list[int], list[bool]]:
    prompt = encode(tokenizer, row.prompt, special=True)
    ids = encode(tokenizer, row.prompt + row.completion, special=True)
    if ids[: len(prompt)] != prompt:
        # A token would span the border ("the " + "cat" -> " cat"). Serving ends its prompt at the border: so do we.
        ids = prompt + encode(tokenizer, row.completion, special=False)
    if row.ends and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids, [index >= len(prompt) for index in range(len(ids))]


def _chat(tokenizer: Tokenizer, row: dataset.Chat) -> tuple[list[int], list[bool]]:
    """The rendered text is encoded whole, as in serving, and the assistant's spans of it are found by offsets."""
    text = render_chat(tokenizer, row.messages, add_generation_prompt=False, tools=row.tools)
    encoding = _encoding(tokenizer, text, False, "messages")
    ids: list[int] = encoding["input_ids"]
    offsets: list[tuple[int, int]] = encoding["offset_mapping"]
    learn = [False] * len(ids)
    for index in (i for i, wanted in enumerate(row.learn) if wanted):
        find = _calls_span if row.messages[index].get("tool_calls") else _answer_span
        start, end = find(tokenizer, row, index, text)
        end = _with_end_of_turn(tokenizer, text, ids, offsets, end)
        for i, (low, high) in enumerate(offsets):
            # A token that begins in the prompt was never the model's to choose.
            learn[i] = learn[i] or (start <= low and high <= end)
    return ids, learn


def _answer_span(tokenizer: Tokenizer, row: dataset.Chat, index: int, text: str) -> tuple[int, int]:
    """Where in `text` the message at `index` stands.

    Templates trim, number, drop and decorate, so the content is not searched for: the row is rendered once more with
    a marker in its place, and what differs is the content. The span begins where serving's prompt would have ended.
    """
    marker = next(m for m in (f"␞{n}␞" for n in count()) if m not in text)
    marked = render_chat(
        tokenizer,
        [{**m, "content": marker} if i == index else m for i, m in enumerate(row.messages)],
        add_generation_prompt=False,
        tools=row.tools,
    )
    before, _, after = marked.partition(marker)
    start, end = len(before), len(text) - len(after)
    if marker in after or not (text.startswith(before) and text.endswith(after) and start <= end):
        raise BadRequest(
            f"This model's chat template rewrites messages[{index}], so what the model shall learn can't be told from "
            "its prompt: use prompt/completion rows.",
            param="messages",
        )
    prompt = _prompt_before(tokenizer, row, index)
    return (len(prompt) if prompt and len(prompt) < start and text.startswith(prompt) else start), end


def _prompt_before(tokenizer: Tokenizer, row: dataset.Chat, index: int) -> str | None:
    """What serving would have asked with. Some templates ask for a user's message first, or for any message at all."""
    try:
        return render_chat(tokenizer, row.messages[:index], add_generation_prompt=True, tools=row.tools)
    except BadRequest:
        return None


def _calls_span(tokenizer: Tokenizer, row: dataset.Chat, index: int, text: str) -> tuple[int, int]:
    """Where calls of tools stand: what the template adds for this message to those before it."""
    prompt = _prompt_before(tokenizer, row, index)
    through = render_chat(tokenizer, row.messages[: index + 1], add_generation_prompt=False, tools=row.tools)
    names = [str((call.get("function") or call).get("name")) for call in row.messages[index]["tool_calls"]]
    if prompt is None or not (text.startswith(prompt) and text.startswith(through) and len(prompt) < len(through)):
        raise BadRequest(
            f"This model's chat template moves messages[{index}] about, so its calls of tools can't be learned: leave "
            "it out, or use prompt/completion rows.",
            param="messages",
        )
    if missing := [name for name in names if name not in through[len(prompt) :]]:
        raise BadRequest(
            f"This model's chat template leaves the call of '{missing[0]}' out of messages[{index}]: it knows no "
            "tools. Use another model, or prompt/completion rows.",
            param="messages",
        )
    return len(prompt), len(through.rstrip())


def _with_end_of_turn(tokenizer: Tokenizer, text: str, ids: list[int], offsets: list[tuple[int, int]], end: int) -> int:
    """The end of the token that ends the turn, if one follows: the model has to learn to stop."""
    special = _special_ids(tokenizer)
    for token, (low, high) in zip(ids, offsets, strict=True):
        if low >= end and token in special:
            return high if not text[end:low].strip() else end
    return end


@lru_cache(maxsize=8)  # the tokenizer builds its table anew at every look
def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    named = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    return frozenset(named | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special})


# --- a data set on disk ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataReport:
    rows: int
    tokens: int
    learned_tokens: int
    truncated: int  # rows that were cut
    dropped: int  # rows that had nothing left to learn after the cut; not among `rows`
    duplicates: int  # rows that equal an earlier one, token for token; they stay
    longest: int  # tokens, after the cut, as the next two
    p50: int  # half of the rows have no more
    p90: int

    def summary(self) -> str:
        text = (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.learned_tokens:,} of them learned; half of the rows "
            f"have up to {self.p50:,} tokens, nine of ten up to {self.p90:,}, the longest {self.longest:,}"
        )
        if self.truncated:
            text += f"; {self.truncated:,} cut at the maximum length"
        if self.dropped:
            text += f"; {self.dropped:,} left out, for the cut took all that was to be learned"
        return text + (f"; {self.duplicates:,} duplicates" if self.duplicates else "")


@dataclass(frozen=True)
class Batch:
    """Right-padded. Padding is never a label."""

    ids: torch.Tensor  # (B, T) int64
    learn: torch.Tensor  # (B, T) bool: the token is a label for the position before it
    lengths: torch.Tensor  # (B,) int64; of the rows, where several stand in one sequence

    @property
    def is_packed(self) -> bool:
        return len(self.lengths) > len(self.ids)

    def packed(self) -> "Batch":
        """The same rows one behind the other, (1, sum of lengths). A row's first token is no label, so no row's end
        is asked for the beginning of the next."""
        return Batch(self.pack(self.ids), self.pack(self.learn), self.lengths)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (1, sum of lengths, ...), of a batch whose rows stand apart."""
        here = torch.arange(self.ids.shape[1]) < self.lengths[:, None]
        return x[here.to(x.device)][None]


class TokenStore:
    """Rows as tokens in memory-mapped files: `tokens`, `learn` and, by row, `offsets` into both."""

    def __init__(self, folder: Path, report: DataReport) -> None:
        self.report = report
        self._tokens = np.memmap(folder / "tokens", np.int32, "r")
        self._learn = np.memmap(folder / "learn", np.bool_, "r")
        self._offsets = np.fromfile(folder / "offsets", np.int64)
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets)  # tokens by row

    @classmethod
    def build(
        cls,
        source: Path,
        folder: Path,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        name: str = "",
        train_on: TrainOn = "completions",
        param: str = "training_file",
        told: Callable[[int], None] = lambda rows: None,
    ) -> Self:
        """Tokenise `source` into `folder`, or open what an earlier run left there for the same source and tokenizer.

        Streams: memory holds one row, and 16 bytes for each. The description is written last, so a folder without one
        is half made and is made again. `told` hears every so many rows how many it were; what it raises ends this.
        Raises BadDataset with line numbers.
        """
        kind = datafile.kind_of(source, name)  # `name` is what its owner calls the file
        key = f"{FORMAT} {file_ref(source).sha256} {kind} {train_on} {max_length} {_fingerprint(tokenizer)}"
        if (report := _finished(folder, key)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "meta.json").unlink(missing_ok=True)
            rows = partial(tokenize_row, tokenizer, max_length=max_length, train_on=train_on)
            report = _tokenize(_counted(dataset.read(source, name), told), folder, rows, max_length, param)
            sizes = {name: (folder / name).stat().st_size for name in FILES}
            meta = {"key": key, "sizes": sizes, "report": asdict(report)}
            with atomic_file(folder / "meta.json") as file:
                file.write(json.dumps(meta, indent=1).encode())
        return cls(folder, report)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @cached_property
    def content(self) -> str:
        """Hash of the rows' tokens; labels don't count. It reads them all, once."""
        digest = hashlib.sha256(self._offsets.tobytes())
        for at in range(0, len(self._tokens), CONTENT_TOKENS):
            digest.update(self._tokens[at : at + CONTENT_TOKENS].tobytes())
        return digest.hexdigest()

    def learned(self, rows: Sequence[int]) -> int:
        """Labels in these rows."""
        return sum(int(self._learn[self._offsets[r] : self._offsets[r + 1]].sum()) for r in rows)

    def batch(self, rows: Sequence[int], pad_id: int) -> Batch:
        """These rows, in this order; T is the longest of them."""
        lengths = torch.tensor([int(self._offsets[r + 1] - self._offsets[r]) for r in rows])
        ids = torch.full((len(rows), int(lengths.max())), pad_id)
        learn = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            span = slice(self._offsets[row], self._offsets[row + 1])
            ids[i, : lengths[i]] = torch.from_numpy(self._tokens[span].astype(np.int64))
            learn[i, : lengths[i]] = torch.from_numpy(self._learn[span].copy())
        return Batch(ids, learn, lengths)


def _finished(folder: Path, key: str) -> DataReport | None:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        whole = meta["key"] == key and all((folder / n).stat().st_size == meta["sizes"][n] for n in FILES)
        return DataReport(**meta["report"]) if whole else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _fingerprint(tokenizer: Tokenizer) -> str:
    """Of all that decides which tokens come out."""
    parts = [tokenizer.backend_tokenizer.to_str(), repr(tokenizer.chat_template), repr(tokenizer.eos_token_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _tokenize(rows: ReadRows, folder: Path, tokenize: Tokenize, max_length: int, param: str) -> DataReport:
    problems = dataset.Report()
    offsets, digests = array("q", [0]), array("Q")
    learned = truncated = dropped = longest = 0
    with atomic_file(folder / "tokens") as tokens_file, atomic_file(folder / "learn") as learn_file:
        for row in _tokenized_rows(rows, tokenize, problems):
            truncated += row.truncated
            if not any(row.learn):
                dropped += 1
                continue
            data = np.asarray(row.ids, np.int32).tobytes()
            tokens_file.write(data)
            learn_file.write(bytes(row.learn))
            offsets.append(offsets[-1] + len(row.ids))
            digests.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
            learned += sum(row.learn)
            longest = max(longest, len(row.ids))
        if not problems.ok:
            raise BadDataset(problems.summary(), param=param)
        if not digests:
            raise BadDataset(
                f"No row has anything to learn within {max_length:,} tokens: raise max_length_tokens.", param=param
            )
    with atomic_file(folder / "offsets") as file:
        file.write(np.asarray(offsets, np.int64).tobytes())
    return DataReport(
        rows=len(digests),
        tokens=offsets[-1],
        learned_tokens=learned,
        truncated=truncated,
        dropped=dropped,
        duplicates=len(digests) - len(np.unique(np.asarray(digests))),
        longest=longest,
        p50=_percentile(offsets, 50),
        p90=_percentile(offsets, 90),
    )


def _counted(rows: ReadRows, told: Callable[[int], None]) -> ReadRows:
    for number, row in enumerate(rows):
        if number % TOLD_ROWS == 0:
            told(number)
        yield row


def _percentile(offsets: Sequence[int], percent: int) -> int:
    """Of the rows' lengths: one that a row has."""
    return int(np.percentile(np.diff(np.asarray(offsets)), percent, method="higher"))


def _tokenized_rows(rows: ReadRows, tokenize: Tokenize, problems: dataset.Report) -> Iterator[Tokens]:
    """The rows that can be used. The others are put into `problems`, and once there is one nothing more is yielded:
    the rest is only checked."""
    for line, row in rows:
        if isinstance(row, datafile.RowError):
            problems.add(row)
            continue
        try:
            tokens = tokenize(row)
        except BadRequest as exc:
            problems.add(datafile.RowError(line, "chat_template", exc.message))
            continue
        problems.rows += 1
        if not problems.counts:
            yield tokens


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The rows' order in an epoch: a permutation of range(n) that depends on nothing but these three numbers.

    Rows are sorted by SplitMix64's outputs (Steele, Lea, Flood 2014), which never repeat, so no generator's state or
    library version takes part, and a job that resumes elsewhere goes on in the same order.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest(), "little")
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.full(n, key, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order: list[int] = np.argsort(x ^ (x >> np.uint64(31)), kind="stable").tolist()
    return order
