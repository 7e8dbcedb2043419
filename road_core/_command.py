"""Runs commands so that bad input ends with one line, never with a traceback."""

import io
import os
import platform
import signal
import sys
from collections.abc import Callable

from road_core._errors import AdapterError


def run(command: Callable[[], None]) -> None:
    """Runs a command, which does its own imports.

    Bad input, a package that isn't installed, or a file that can't be read or written ends with one line on stderr and
    exit code 2; an interrupt ends with exit code 130.
    """
    # SIGTERM acts as an interrupt like Ctrl-C, so that drafts are removed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Characters that the terminal's encoding lacks must not prevent the rest from being printed.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        command()
    except AdapterError as error:
        sys.exit(_fail(" ".join(str(error).split()), 2))
    except ModuleNotFoundError as error:
        sys.exit(_fail(f"expected an installed {error.name}, found none (pip install 'road-adapters[all]' has all)", 2))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where, found = error.filename or "files", error.strerror or error
        sys.exit(_fail(f"{where}: expected what can be read and written, found {found}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    finally:
        signal.signal(signal.SIGTERM, before)


# With it, glibc's malloc asks for huge pages. glibc reads it when a process starts, and at no other time.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def with_huge_pages() -> None:
    """Starts this process anew with `HUGE_PAGES`; returns if it is set already, to whatever, or there is no glibc.

    On CPUs XLA returns its scratch memory after each step, and the system clears it again page by page.
    """
    if platform.libc_ver()[0] == "glibc" and not HUGE_PAGES.keys() & os.environ.keys():
        os.environ.update(HUGE_PAGES)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code
