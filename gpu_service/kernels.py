"""The arithmetic of serving that pays to be done otherwise on some devices: torch's own, and ours for bf16 on CPUs.

For one row torch reads bf16 weights at full speed. For several it reads them at half of it on CPUs with bf16 units; on
others it multiplies each row by itself, and eight rows take eight times as long. Our kernels (kernels.c) read each
weight once for all rows. They are compiled when first needed, kept for this very processor, held against torch, and
their products timed on the model's own matrices: where they are not clearly quicker they are not used. Serving only:
they keep no gradients. Knows no model.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service.device import quick_vectors

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "g++ -x c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
COMPILE_S = 120  # at most; two seconds are usual
TIMED_BYTES = 48 * 2**20  # of matrices that are timed: more than a cache holds
PAYS = 0.9  # of torch's time at most: a draw would be decided by noise
SPANS = ((1, 1), (8, 16), (32, 2**31))  # (rows that are timed, the most rows for which the outcome counts)

Pair = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Places:
    """Where one token each of n rows goes in a block of keys or values (slots, G, capacity, Dh): slot i is row i's."""

    at: Tensor  # (n,) int64: the tokens that each row holds already
    longest: int  # of the rows, with this token
    even: bool  # whether all are as long

    @cached_property
    def rows(self) -> Tensor:
        return torch.arange(len(self.at), device=self.at.device)

    @cached_property
    def mask(self) -> Tensor | None:
        """(n, 1, 1, longest): what each row holds."""
        if self.even:
            return None
        return (torch.arange(self.longest, device=self.at.device) <= self.at[:, None])[:, None, None]


class Arithmetic:
    """Torch's own."""

    def linear(self, x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
        """x (..., K), weight (N, K) -> (..., N); `add` (N,) or (..., N) is added within the product."""
        if add is None or add.dim() == 1:
            # Flat: where x is a slice torch would make it a bmm, and copy the weight for it.
            return F.linear(x.reshape(-1, x.shape[-1]), weight, add).view(*x.shape[:-1], len(weight))
        return torch.addmm(add.flatten(0, -2), x.flatten(0, -2), weight.T).view_as(add)

    def by_row(self, pairs: Sequence[Pair | None]) -> "ByRow | None":
        """How rows get what LoRA pairs of their own add in one matrix; None where one by one is not the quicker way."""
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: Tensor | float) -> Tensor:
        """x (B, T, D), weight (D,), `eps` (B, 1, 1) or one for all. In fp32, rounded before the weight."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, places: Places) -> Tensor:
        """One token of n rows: q (n, H, 1, Dh), k and v (n, G, 1, Dh), which join what is held -> like q."""
        n, H, _, Dh = q.shape
        G = k.shape[1]
        keys[places.rows, :, places.at] = k[:, :, 0]
        values[places.rows, :, places.at] = v[:, :, 0]
        # One query a head: the heads of a group read the same keys, so view them as that group's query rows. SDPA's own
        # grouped path is several times slower here.
        q, keys, values = q.view(n, G, H // G, Dh), keys[:n, :, : places.longest], values[:n, :, : places.longest]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=places.mask).view(n, H, 1, Dh)


TORCH = Arithmetic()


class Own(Arithmetic):
    """By the kernels, where they take what they get; `pays` says for which numbers of rows the products do."""

    def __init__(self, library: Path) -> None:
        """Raises OSError, where it does not load."""
        loaded = ctypes.CDLL(str(library))
        pointer, count = ctypes.c_void_p, ctypes.c_long
        self._product = _declared(loaded.product, [*[pointer] * 3, count, *[pointer] * 2, *[count] * 3])
        self._adapt = _declared(loaded.adapt, [*[pointer] * 7, *[count] * 5])
        self._norm = _declared(loaded.rms_norm, [*[pointer] * 3, ctypes.c_float, pointer, *[count] * 3])
        self._attend = _declared(loaded.attend, [*[pointer] * 9, *[count] * 6])
        self._block = int(loaded.block())
        self.pays = [(most, True) for _, most in SPANS]  # (most rows, quicker than torch)

    def linear(self, x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
        """Sums are rounded once, with what is added."""
        rows = x.numel() // x.shape[-1]
        if not self.takes(weight) or not next(quicker for most, quicker in self.pays if rows <= most):
            return super().linear(x, weight, add)
        return self.product(x, weight, add)

    def product(self, x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
        """Whether it pays or not."""
        N, K = weight.shape
        M = x.numel() // K
        x = x.contiguous()
        y, scratch = x.new_empty(*x.shape[:-1], N), torch.empty(M * K)
        stride = 0 if add is None or add.dim() == 1 else N
        add_at = None if add is None else (add := add.contiguous()).data_ptr()
        self._product(x.data_ptr(), weight.data_ptr(), add_at, stride, y.data_ptr(), scratch.data_ptr(), M, N, K)
        return y

    def takes(self, weight: Tensor) -> bool:
        return _is_half(weight) and weight.shape[1] % self._block == 0 and weight.is_contiguous()

    def by_row(self, pairs: Sequence[Pair | None]) -> "ByRow | None":
        taken = all(_is_half(t) for p in pairs if p for t in p[:2]) and all(p[0].shape[1] % 16 == 0 for p in pairs if p)
        return ByRow(self._adapt, pairs) if taken else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: Tensor | float) -> Tensor:
        if not _is_half(x) or weight.dtype is not x.dtype:
            return super().rms_norm(x, weight, eps)
        x, each, D = x.contiguous(), x.shape[-2], x.shape[-1]
        y, of, one = torch.empty_like(x), None, 0.0
        if isinstance(eps, Tensor):
            of = eps.float().contiguous()  # a name, so that it lives as long as its address is in use
        else:
            one = eps
        of_at = None if of is None else of.data_ptr()
        self._norm(x.data_ptr(), weight.data_ptr(), of_at, one, y.data_ptr(), x.numel() // D, each, D)
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, places: Places) -> Tensor:
        if not _is_half(q) or keys.dtype is not q.dtype or q.shape[-1] % 16:
            return super().attend(q, k, v, keys, values, places)
        n, H, _, Dh = q.shape
        q, k, v = (x if x.stride(1) == Dh and x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        y, scratch = q.new_empty(n, H, 1, Dh), torch.empty(n * H * places.longest)
        strides = (ctypes.c_long * 3)(q.stride(0), k.stride(0), v.stride(0))
        self._attend(
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, keys.data_ptr(), values.data_ptr()),
            *(places.at.data_ptr(), y.data_ptr(), scratch.data_ptr()),
            *(places.longest, n, H, k.shape[1], Dh, keys.shape[2]),
        )
        return y


def _declared(function: Any, arguments: list[Any]) -> Callable[..., None]:
    function.restype, function.argtypes = None, arguments
    return function  # type: ignore[no-any-return]


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu"


class ByRow:
    """What LoRA adds in one matrix to the rows of a batch, each by a pair of its own: read once, and nothing joined."""

    def __init__(self, adapt: Callable[..., None], pairs: Sequence[Pair | None]) -> None:
        """`pairs`, by row: A (r, in) and B (out, r) in bf16, and the scale; None where nothing is added. A B that is
        laid out by rank is not copied."""
        self._adapt = adapt
        held = [pair and (pair[0].contiguous(), pair[1].T.contiguous()) for pair in pairs]
        self._held = held  # the kernel has their addresses
        ranks = [pair[0].shape[0] if pair else 0 for pair in held]
        self._most = max(ranks)
        n = len(pairs)
        self._a = (ctypes.c_void_p * n)(*(pair[0].data_ptr() if pair else None for pair in held))
        self._b = (ctypes.c_void_p * n)(*(pair[1].data_ptr() if pair else None for pair in held))
        self._ranks = (ctypes.c_long * n)(*ranks)
        self._scales = (ctypes.c_float * n)(*(pair[2] if pair else 0.0 for pair in pairs))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, T, in) and y (B, T, out), of which the result may take the place."""
        x, y = x.contiguous(), y.contiguous()
        B, T, K = x.shape
        B, T = (1, B * T) if len(self._ranks) == 1 else (B, T)  # one pair stands for every row
        scratch = torch.empty(B * T * self._most)
        self._adapt(
            *(x.data_ptr(), y.data_ptr(), self._a, self._b, self._ranks, self._scales, scratch.data_ptr()),
            *(B, T, self._most, y.shape[-1], K),
        )
        return y


def choose(matrices: Sequence[Tensor], folder: Path) -> Arithmetic:
    """For a model with these matrices. What is compiled is kept in `folder`."""
    own = compiled(folder) if _is_half(matrices[0]) else None
    if own is None:
        return TORCH
    timed, held = [], 0
    for matrix in matrices[len(matrices) // 2 :]:  # those of layers; what embeds and what unembeds stand at the ends
        if own.takes(matrix) and held < TIMED_BYTES:
            timed.append(matrix)
            held += matrix.nbytes
    own.pays = [(most, bool(timed) and _pays(own, timed, rows)) for rows, most in SPANS]
    log.info("own kernels for bf16; products by the most rows: %s", dict(own.pays))
    return own


@torch.inference_mode()
def _pays(own: Own, matrices: list[Tensor], rows: int) -> bool:
    """By the best of five passes each, taken in turn."""
    xs = {m.shape[1]: torch.ones(rows, m.shape[1], dtype=m.dtype) for m in matrices}

    def seconds(product: Callable[[Tensor, Tensor, None], Tensor]) -> float:
        start = time.perf_counter()
        for matrix in matrices:
            product(xs[matrix.shape[1]], matrix, None)
        return time.perf_counter() - start

    with quick_vectors(rows, torch.bfloat16, matrices[0].device):
        pairs = [(seconds(own.product), seconds(TORCH.linear)) for _ in range(5)]
    return min(ours for ours, _ in pairs) < PAYS * min(theirs for _, theirs in pairs)


def compiled(folder: Path) -> Own | None:
    """None where there is no compiler, or what it made is no good; the log says why."""
    if platform.system() != "Linux":
        return None
    library = folder / f"kernels-{_key()}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(library)
        own = Own(library)
        _hold_against_torch(own)
    except (OSError, subprocess.SubprocessError, AttributeError, AssertionError) as exc:
        log.info("no own kernels for bf16: %s", exc)
        return None
    return own


def _key() -> str:
    """Code for one processor may be an illegal instruction on another, and the folder may move between them."""
    try:
        processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        processor = platform.processor()
    stable = [line for line in processor.splitlines() if line.startswith(("model name", "flags", "Features", "CPU"))]
    return hashlib.sha256("\n".join([SOURCE.read_text(), *FLAGS, *stable]).encode()).hexdigest()[:16]


def _compile(library: Path) -> None:
    """Beside its place, then renamed: a file of that name is whole."""
    compiler = next((c.split() for c in COMPILERS if shutil.which(c.split()[0])), None)
    if compiler is None:
        raise OSError("there is no C compiler here")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        object_file, made = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
        # Linked without OpenMP of its own: torch's is loaded already, and two would fight over the cores.
        for command in (
            [*compiler, *FLAGS, "-c", str(SOURCE), "-o", object_file],
            [compiler[0], "-shared", object_file, "-o", made],
        ):
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=COMPILE_S)  # noqa: S603
        os.replace(made, library)


@torch.inference_mode()
def _hold_against_torch(own: Own) -> None:
    """A compiler may err too: rows of every tile, with something to add and without."""
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).bfloat16()

    def hold(ours: Tensor, exact: Tensor, what: str) -> None:
        off = (ours.float() - exact).abs().max() / exact.abs().max()
        assert off < 2**-6, f"{what} are off by {off:.2%}"

    for M, N, K in ((1, 50, 64), (3, 7, 128), (9, 49, 64)):
        x, w, add = some(M, K), some(N, K), some(M, N)
        for addend in (None, add[0], add):
            exact = x.float() @ w.float().T + (0 if addend is None else addend.float())
            hold(own.product(x, w, addend), exact, "products")
    x, y, a, b = some(2, 1, 96), some(2, 1, 70), some(5, 96), some(70, 5)
    by_row = own.by_row([None, (a, b, 1.0)])
    assert by_row
    hold(by_row(x, y.clone())[1], y[1].float() + x[1].float() @ a.float().T @ b.float().T, "products with LoRA by row")
    x, w, eps = some(3, 2, 72), some(72), torch.tensor([1e-5, 1.0, 1e-5])[:, None, None]
    hold(own.rms_norm(x, w, eps), TORCH.rms_norm(x, w, eps).float(), "norms")
    q, (k, v), (keys, values) = some(3, 6, 1, 48), some(2, 3, 2, 1, 48), some(2, 4, 2, 40, 48)
    places, wide = Places(torch.tensor([0, 39, 5]), 40, False), [t.float() for t in (q, k, v, keys, values)]
    hold(
        own.attend(q, k, v, keys, values, places),
        TORCH.attend(wide[0], wide[1], wide[2], wide[3], wide[4], places),
        "attentions",
    )
    assert torch.equal(keys.float(), wide[3]), "keys are not where they belong"
    assert torch.equal(values.float(), wide[4]), "values are not where they belong"
