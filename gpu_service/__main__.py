"""`python -m gpu_service`: settings from the environment, until SIGINT or SIGTERM."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys

import logs
from gpu_service.service import Service, listen
from gpu_service.settings import TABLE, BadSetting, from_env
from gpu_service.tunnel import TunnelFailed

log = logging.getLogger("gpu_service")


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m gpu_service",
        description="Serves and fine-tunes models on this machine's device. It takes no arguments, only variables:",
        epilog="\n".join(f"  {name:22} {meaning}" for name, meaning in TABLE.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        settings = from_env()
        logs.configure(settings.log_level, settings.log_format, ("gpu_service",), told=(RuntimeError,))  # torch's words
        listener = listen(settings)
        with contextlib.closing(listener):
            asyncio.new_event_loop().run_until_complete(until_stopped(Service(settings, listener)))
    except (BadSetting, TunnelFailed) as exc:
        print(f"gpu_service: {exc}", file=sys.stderr)
        return 2
    return 0


async def until_stopped(service: Service) -> None:
    """Raises BadSetting, TunnelFailed."""
    stop = asyncio.Event()
    serving, stopped = asyncio.create_task(service.run()), asyncio.create_task(stop.wait())

    def interrupted() -> None:
        if stop.is_set():  # a second time: checkpoints are not waited for any more
            serving.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted)
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        log.info("stopping")
        serving.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    # Everything is closed. A thread that still downloads or tokenises must not hold the process for minutes.
    os._exit(status)
