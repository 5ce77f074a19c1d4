"""The device, the precision and why, free memory. Knows no model."""

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil
import torch

import wire
from gpu_service.errors import OutOfMemory
from gpu_service.settings import BadSetting, Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    name: str
    dtype: torch.dtype  # of the base weights and of activations; trained tensors are fp32 everywhere
    scaler: bool  # gradients would underflow in fp16 without loss scaling
    why: str
    quantize: wire.Quantize = "none"  # how the matrices of models that serve are held


@dataclass(frozen=True)
class Device:
    torch: torch.device
    name: str
    precision: Precision

    def memory_bytes(self) -> int:
        if self.torch.type == "cuda":
            return int(torch.cuda.get_device_properties(self.torch).total_memory)
        return int(psutil.virtual_memory().total)

    def free_bytes(self) -> int:
        if self.torch.type == "cuda":
            held = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
            return int(torch.cuda.mem_get_info(self.torch)[0] + held)  # what torch keeps for itself is free for us
        return int(psutil.virtual_memory().available)

    def used_bytes(self) -> int:
        """By this process."""
        if self.torch.type == "cuda":
            return int(torch.cuda.memory_allocated(self.torch))
        return int(psutil.Process().memory_info().rss)

    def wire(self) -> wire.Device:
        kind = self.torch.type
        assert kind in ("cpu", "cuda", "mps")
        return wire.Device(
            kind=kind,
            name=self.name[:200],
            memory_bytes=self.memory_bytes(),
            free_bytes=self.free_bytes(),
            precision=self.precision.name,
            precision_why=self.precision.why,
        )


def choose(settings: Settings) -> Device:
    """Raises BadSetting where the setting names a device that is not there."""
    kind = settings.device or ("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadSetting("GPU_DEVICE is 'cuda' and torch sees no CUDA device: choose a GPU runtime, or leave it unset")
    if kind == "mps" and not _has_mps():
        raise BadSetting("GPU_DEVICE is 'mps' and torch sees no Apple GPU: leave it unset")
    name = torch.cuda.get_device_name() if kind == "cuda" else _processor()
    precision = _precision(kind, settings.precision)
    if settings.quantize != "none":
        why = f"{precision.why}; layers' matrices in {settings.quantize}, as GPU_QUANTIZE says"
        precision = replace(precision, quantize=settings.quantize, why=why)
    return Device(torch.device(kind), name, precision)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


@cache
def prefers_onednn() -> bool:
    """MKL, torch's default for fp32 matrices, leaves half of AVX-512 and a sixth of AVX2 unused on AMD's processors.

    It follows from the processor and not from a measurement, so that the same machine always rounds in the same way.
    """
    return "AMD" in _processor() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())


def _precision(kind: str, wanted: str | None) -> Precision:
    if wanted:
        return Precision(wanted, DTYPES[wanted], wanted == "fp16", "GPU_PRECISION says so")
    if kind == "cuda":
        # Without the flag torch answers yes on a T4, where bf16 is emulated and slow.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", torch.bfloat16, False, "this GPU has bf16 units")
        major, minor = torch.cuda.get_device_capability()
        return Precision("fp16", torch.float16, True, f"sm_{major}{minor} has no bf16 units")
    if kind == "cpu" and (unit := _bf16_unit()):
        return Precision("bf16", torch.bfloat16, False, f"this CPU has {unit}: twice as fast in half the memory")
    return Precision("fp32", torch.float32, False, f"this {kind} has no units for less")


def _bf16_unit() -> str | None:
    """What multiplies bf16 here. torch has no public question for it; without an answer there is none."""
    for name, unit in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return unit
    return None


@contextlib.contextmanager
def quick_vectors(rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """For a decode step of so many rows. With one row every matrix meets a single vector, and there oneDNN reads bf16
    weights at half the speed of torch's own kernels; from about three rows on it is the faster one.
    """
    if rows > 2 or dtype is not torch.bfloat16 or device.type != "cpu":
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def give_back(device: torch.device) -> None:
    """What torch keeps of memory that nobody holds any more, so that another shape can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# How a RuntimeError says that memory is out: the CPU's allocator, that of Apple's GPUs, and cuBLAS and cuDNN, which ask
# for memory of their own.
FULL = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def translate(exc: BaseException) -> BaseException:
    """Out of memory as our own error; anything else as it came."""
    full = isinstance(exc, torch.OutOfMemoryError | MemoryError)
    if full or (isinstance(exc, RuntimeError) and any(words in str(exc) for words in FULL)):
        return OutOfMemory("The device ran out of memory. Use a shorter prompt, a smaller batch or fewer layers.")
    return exc
