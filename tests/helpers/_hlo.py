"""What a compiled JAX program does, read from its text."""

import math
import re
from collections import Counter
from typing import Any

COLLECTIVES = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
ARRAYS = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")


def collectives(program: Any, *arguments: Any) -> Counter:
    """Returns how many collectives a jitted program has, by kind; a loop's body counts once."""
    return Counter(kind for _, kind in COLLECTIVES.findall(_compiled(program, *arguments)))


def moved(program: Any, *arguments: Any) -> Counter:
    """Returns how many numbers a device gets from a jitted program's collectives, by kind and dtype, counted alike."""
    found: Counter = Counter()
    for result, kind in COLLECTIVES.findall(_compiled(program, *arguments)):
        for dtype, sizes in ARRAYS.findall(result):
            found[kind, dtype] += math.prod(int(size) for size in sizes.split(",") if size)
    return found


def _compiled(program: Any, *arguments: Any) -> str:
    return program.lower(*arguments).compile().as_text()
