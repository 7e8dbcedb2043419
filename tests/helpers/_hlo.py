"""Reads from the text of a compiled JAX program which collectives it runs."""

import math
import re
from collections import Counter
from typing import Any

COLLECTIVES = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
ARRAYS = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")


def collectives(program: Any, *arguments: Any) -> Counter:
    """Returns the number of a jitted program's collectives by kind; a loop's body counts once."""
    return Counter(kind for _, kind in COLLECTIVES.findall(_compiled(program, *arguments)))


def moved(program: Any, *arguments: Any) -> Counter:
    """Returns how many numbers a device gets from collectives, by kind and dtype; a loop's body counts once."""
    found: Counter = Counter()
    for result, kind in COLLECTIVES.findall(_compiled(program, *arguments)):
        for dtype, sizes in ARRAYS.findall(result):
            found[kind, dtype] += math.prod(int(size) for size in sizes.split(",") if size)
    return found


def _compiled(program: Any, *arguments: Any) -> str:
    return program.lower(*arguments).compile().as_text()
