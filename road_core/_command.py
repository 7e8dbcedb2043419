"""How a command ends: one line for bad input, never a traceback."""

import io
import signal
import sys
from collections.abc import Callable

from road_core._errors import AdapterError


def run(command: Callable[[], None]) -> None:
    """Runs a command, which imports what it needs itself.

    Bad input, a package that isn't installed, or a file that the system refuses, becomes one line on stderr and exit
    code 2; an interrupt exit code 130.
    """
    # What would stop the process halfway is an interrupt like Ctrl-C, so that drafts are removed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Text that the terminal's encoding lacks is no reason to lose the rest.
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


def _fail(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code
