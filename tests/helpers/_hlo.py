"""What a compiled JAX program does, read from its text."""

import re
from collections import Counter
from typing import Any

COLLECTIVES = re.compile(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(program: Any, *arguments: Any) -> Counter:
    """Returns how many collectives a jitted program has, by kind; a loop's body counts once."""
    text = program.lower(*arguments).compile().as_text()
    return Counter(COLLECTIVES.findall(text))
