"""Products with bf16 matrices on a CPU, by a kernel of our own (products.c) where a compiler is at hand and it pays.

For one row torch reads bf16 weights at full speed. For several it reads them at half of it on CPUs with bf16 units; on
others it multiplies each row by itself, and eight rows take eight times as long. The kernel reads each weight once for
all rows.
It is compiled when it is first needed, kept for this very processor, held against torch, and timed on the model's own
matrices: where it is not clearly quicker it is not used. Serving only: it keeps no gradients. Knows no model.
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_service.device import quick_vectors

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("products.c")
COMPILERS = ("cc", "gcc", "g++ -x c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
COMPILE_S = 120  # at most; two seconds are usual
TIMED_BYTES = 48 * 2**20  # of matrices that are timed: more than a cache holds
PAYS = 0.9  # of torch's time at most: a draw would be decided by noise
SPANS = ((1, 1), (8, 16), (32, 2**31))  # (rows that are timed, the most rows for which the outcome counts)

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Pair = tuple[Tensor, Tensor, float]


def plain(x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
    """x (..., K), weight (N, K) -> (..., N) by torch; `add` (N,) or (..., N) is added within the product."""
    if add is None or add.dim() == 1:
        return F.linear(x, weight, add)
    return torch.addmm(add.flatten(0, -2), x.flatten(0, -2), weight.T).view_as(add)


class Kernel:
    def __init__(self, library: Path) -> None:
        """Raises OSError, where it does not load."""
        loaded = ctypes.CDLL(str(library))
        self._product = loaded.product
        self._product.restype = None
        pointer, count = ctypes.c_void_p, ctypes.c_long
        self._product.argtypes = [pointer, pointer, pointer, count, pointer, pointer, count, count, count]
        self._adapt = loaded.adapt
        self._adapt.restype = None
        self._adapt.argtypes = [pointer] * 8 + [count] * 5
        self._block = int(loaded.block())

    def linear(self, x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
        """As `plain`; sums are rounded once, with what is added."""
        assert self.takes(weight)
        assert x.dtype is weight.dtype
        N, K = weight.shape
        M = x.numel() // K
        x = x.contiguous()
        y, scratch = x.new_empty(*x.shape[:-1], N), torch.empty(M * K)
        stride = 0 if add is None or add.dim() == 1 else N
        add_at = None if add is None else add.contiguous().data_ptr()
        self._product(x.data_ptr(), weight.data_ptr(), add_at, stride, y.data_ptr(), scratch.data_ptr(), M, N, K)
        return y

    def takes(self, weight: Tensor) -> bool:
        bf16 = weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
        return bf16 and weight.shape[1] % self._block == 0 and weight.is_contiguous()

    def by_row(self, pairs: Sequence[Pair | None]) -> "ByRow":
        """For rows that meet these in one matrix."""
        return ByRow(self._adapt, pairs)


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
        wide, u = torch.empty(B * T * K), torch.empty(B * T * self._most)
        self._adapt(
            *(x.data_ptr(), y.data_ptr(), self._a, self._b, self._ranks, self._scales, wide.data_ptr(), u.data_ptr()),
            *(B, T, self._most, y.shape[-1], K),
        )
        return y


class Chosen:
    """The quicker way for each number of rows."""

    def __init__(self, kernel: Kernel, pays: Sequence[bool]) -> None:
        """`pays`: whether the kernel is the quicker one, for each of SPANS."""
        self._kernel = kernel
        self._pays = [(most, quicker) for (_, most), quicker in zip(SPANS, pays, strict=True)]

    def __call__(self, x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self._kernel.takes(weight) and next(quicker for most, quicker in self._pays if rows <= most):
            return self._kernel.linear(x, weight, add)
        return plain(x, weight, add)

    def by_row(self, pairs: Sequence[Pair | None]) -> ByRow:
        return self._kernel.by_row(pairs)


def own_pairs(product: Product, pairs: Sequence[Pair | None]) -> ByRow | None:
    """How rows get what their own pairs add in one matrix; None where the kernel is not at hand or can't."""
    bf16 = all(t.dtype is torch.bfloat16 and t.device.type == "cpu" for pair in pairs if pair for t in pair[:2])
    return product.by_row(pairs) if isinstance(product, Chosen) and bf16 else None


def choose(matrices: Sequence[Tensor], folder: Path) -> Product:
    """For a model with these matrices. The kernel is kept in `folder`."""
    first = matrices[0]
    if first.dtype is not torch.bfloat16 or first.device.type != "cpu":
        return plain
    kernel = compiled(folder)
    if kernel is None:
        return plain
    timed, held = [], 0
    for matrix in matrices:
        if kernel.takes(matrix) and held < TIMED_BYTES:
            timed.append(matrix)
            held += matrix.nbytes
    if not timed:
        return plain
    pays = [_pays(kernel, timed, rows) for rows, _ in SPANS]
    log.info("own kernel for bf16 products, by rows: %s", dict(zip([most for _, most in SPANS], pays, strict=True)))
    return Chosen(kernel, pays)


@torch.inference_mode()
def _pays(kernel: Kernel, matrices: list[Tensor], rows: int) -> bool:
    """By the best of three passes each, taken in turn."""
    xs = {m.shape[1]: torch.ones(rows, m.shape[1], dtype=m.dtype) for m in matrices}

    def seconds(product: Product) -> float:
        start = time.perf_counter()
        for matrix in matrices:
            product(xs[matrix.shape[1]], matrix, None)
        return time.perf_counter() - start

    with quick_vectors(rows, torch.bfloat16, matrices[0].device):
        pairs = [(seconds(kernel.linear), seconds(plain)) for _ in range(3)]
    return min(ours for ours, _ in pairs) < PAYS * min(theirs for _, theirs in pairs)


def compiled(folder: Path) -> Kernel | None:
    """None where there is no compiler, or what it made is no good; the log says why."""
    if platform.system() != "Linux":
        return None
    library = folder / f"products-{_key()}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(library)
        kernel = Kernel(library)
        _hold_against_torch(kernel)
    except (OSError, subprocess.SubprocessError, AttributeError, AssertionError) as exc:
        log.info("no own kernel for bf16 products: %s", exc)
        return None
    return kernel


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
        object_file, made = f"{scratch}/products.o", f"{scratch}/products.so"
        # Linked without OpenMP of its own: torch's is loaded already, and two would fight over the cores.
        for command in (
            [*compiler, *FLAGS, "-c", str(SOURCE), "-o", object_file],
            [compiler[0], "-shared", object_file, "-o", made],
        ):
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=COMPILE_S)  # noqa: S603
        os.replace(made, library)


@torch.inference_mode()
def _hold_against_torch(kernel: Kernel) -> None:
    """A compiler may err too: rows of every tile, with something to add and without."""
    random = torch.Generator().manual_seed(0)
    for M, N, K in ((1, 50, 64), (3, 7, 128), (9, 49, 64)):
        x, w, add = (torch.randn(shape, generator=random).bfloat16() for shape in ((M, K), (N, K), (M, N)))
        for addend in (None, add[0], add):
            expected = x.float() @ w.float().T + (0 if addend is None else addend.float())
            off = (kernel.linear(x, w, addend).float() - expected).abs().max() / expected.abs().max()
            assert off < 2**-7, f"it is off by {off:.2%}"
    x, y, a, b = (
        torch.randn(shape, generator=random).bfloat16() for shape in ((2, 1, 96), (2, 1, 70), (5, 96), (70, 5))
    )
    expected = y[1].float() + x[1].float() @ a.float().T @ b.float().T
    off = (kernel.by_row([None, (a, b, 1.0)])(x, y.clone())[1].float() - expected).abs().max() / expected.abs().max()
    assert off < 2**-7, f"with LoRA by row it is off by {off:.2%}"
