"""Generates text for lines that each name an adapter, in mixed batches; also the ``road-generate`` command."""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from road_core import AdapterError, read_peft
from road_core._chat import Chat
from road_core._files import open_alone, read_json_lines, write_file
from road_torch._load import load
from road_torch._model import RoadModel
from road_torch._routing import BASE, parts, read_name

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generates text with RoAd adapters in mixed batches, in which each line may name its own adapter."""

    # Folder of the Hugging Face checkpoint.
    base: Path
    # Adapters in PEFT's format, as NAME=FOLDER.
    adapter: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    # JSONL file with {"prompt": ...} or {"messages": [...]} per line, optionally with "adapter": NAME, or NAME+NAME for
    # several adapters applied in order. Lines without an adapter are answered by the base model.
    prompts: Path
    # JSONL file for the lines' fields and their "completion"; standard output if not given. Until all are done,
    # finished batches are kept in OUT.part; after an interruption, the same command continues from there.
    out: Path | None = None
    # Quantisation of the base model's weights: 4 bits, 8 bits, or as they are in the checkpoint.
    quantize: Literal["nf4", "int8", "none"] = "none"
    # Dtype of the computation; "auto" is the checkpoint's.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # Maximum number of tokens per answer.
    max_new_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 128
    # Number of lines answered at once.
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    # 0 takes the likeliest token; above 0, tokens are sampled from the whole vocabulary. Of the checkpoint's own
    # generation config only the end tokens are used.
    temperature: float = 0.0
    # Seed for sampling.
    seed: int = 0


def generate(
    model: RoadModel,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    console: Console | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answers prompts in mixed batches, each prompt with its own adapter.

    Args:
        model: a model whose base is a Hugging Face decoder.
        tokenizer: the decoder's tokenizer. Conversations are formatted with its chat template, and so are prompts if
            there is one.
        rows: ``{"prompt": text}`` or ``{"messages": [...]}``, optionally with ``"adapter"``: a name, a mix such as
            ``"a+b"``, or ``"__base__"``, which is the default.
        max_new_tokens: maximum number of tokens per answer.
        batch_size: number of rows answered at once.
        console: where to draw a progress bar; no bar if None.
        **options: passed to the model's ``generate``. By default the likeliest token is taken each time. Of the model's
            own generation config only the end tokens are used.

    Returns:
        The rows' fields, with ``"adapter"`` and ``"completion"``.

    Raises:
        AdapterError: a row doesn't have this form or names an unknown adapter (the error states its number, from 1).
    """
    answers: list[dict[str, Any]] = []
    _generate(model, tokenizer, rows, max_new_tokens, batch_size, console, options, _row_place, answers.extend)
    return answers


def command(options: GenerateOptions) -> None:
    """Runs ``road-generate``.

    Raises:
        AdapterError: an option or input file is wrong; nothing is written except ``OUT.part`` while the command runs.
    """
    # All quick checks come before the model is loaded.
    if options.max_new_tokens < 1 or options.batch_size < 1:
        raise AdapterError(
            "--max-new-tokens and --batch-size: expected numbers from 1 up, "
            f"found {options.max_new_tokens} and {options.batch_size}"
        )
    if not 0 <= options.temperature < math.inf:
        raise AdapterError(f"--temperature: expected 0 or more, found {options.temperature}")
    if not 0 <= options.seed < 1 << 63:
        raise AdapterError(f"--seed: expected a number from 0 to {(1 << 63) - 1}, found {options.seed}")
    adapters = _adapters([argument for several in options.adapter for argument in several])
    if options.out is not None:
        _check_new(options.out)
        if not options.out.absolute().parent.is_dir():
            raise AdapterError(f"{options.out}: expected a file in a folder that is there")
    lines = read_json_lines(options.prompts)
    rows = [row for _, row in lines]

    def place(i: int) -> str:
        return f"{options.prompts}, line {lines[i][0]}"

    _check_rows(rows, adapters, place)
    with contextlib.nullcontext() if options.out is None else _Part(options, rows, adapters) as part:
        _command(options, rows, adapters, place, part)


def _command(
    options: GenerateOptions,
    rows: Sequence[Row],
    adapters: Mapping[str, Path],
    place: Callable[[int], str],
    part: "_Part | None",
) -> None:
    done = part.lines if part else []
    console = Console(stderr=True)
    quantize = None if options.quantize == "none" else options.quantize
    base, tokenizer = load(options.base, quantize=quantize, dtype=options.dtype)
    model = RoadModel(base)
    for name, directory in adapters.items():
        model.load_adapter(directory, name)
    model.eval()
    drawn: dict[str, Any] = {}
    if options.temperature > 0:
        # After an interruption, the remaining lines must not repeat the random numbers of the first ones.
        torch.manual_seed(options.seed + len(done))
        drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    left = rows[len(done) :]

    def place_left(i: int) -> str:
        return place(len(done) + i)

    answers: list[dict[str, Any]] = []
    keep = part.append if part else answers.extend
    _generate(model, tokenizer, left, options.max_new_tokens, options.batch_size, console, drawn, place_left, keep)
    if part is None:
        # JSON is UTF-8, whatever the terminal's encoding.
        sys.stdout.buffer.write("".join(map(_line, answers)).encode())
        sys.stdout.flush()
    else:
        part.finish()
        console.print(f"{len(rows)} lines: {options.out}")


class _Part:
    """The file ``OUT.part`` with the answers so far. Its first line is a digest of the options, prompts and adapters.

    Within the context no other process can write to it. If it holds no answer at the end, it is removed.
    """

    def __init__(self, options: GenerateOptions, rows: Sequence[Row], adapters: Mapping[str, Path]) -> None:
        assert options.out is not None
        self._out = options.out
        self._path = options.out.with_name(options.out.name + ".part")
        digest = hashlib.sha256(json.dumps([dataclasses.asdict(options), rows], default=str).encode())
        for directory in adapters.values():
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                digest.update((directory / name).read_bytes())
        self._head = digest.hexdigest().encode() + b"\n"
        self._rows, self._batch_size = rows, options.batch_size
        self.lines: list[bytes] = []

    def __enter__(self) -> Self:
        self._file = open_alone(self._path)
        try:
            # Another process may have finished since the first check.
            _check_new(self._out)
            self.lines = self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.lines:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _read(self) -> list[bytes]:
        head, *lines = self._file.read().splitlines(keepends=True) or [self._head]
        # The last line may be incomplete.
        lines = [line for line in lines if line.endswith(b"\n")]
        if head != self._head or len(lines) > len(self._rows) or not all(map(_is_answer, lines, self._rows)):
            raise AdapterError(
                f"{self._path}: expected what this very command left, found what another one did (remove it, or "
                "give another --out)"
            )
        # Whole batches only, so that the next one begins where it would have.
        if len(lines) < len(self._rows):
            lines = lines[: len(lines) - len(lines) % self._batch_size]
        self._file.truncate(sum(map(len, [head, *lines])) if lines else 0)
        return lines

    def append(self, answers: Sequence[Mapping[str, Any]]) -> None:
        lines = [_line(answer).encode() for answer in answers]
        self._file.write(b"".join(lines if self.lines else [self._head, *lines]))
        self._file.flush()
        self.lines += lines

    def finish(self) -> None:
        write_file(self._out, b"".join(self.lines))
        self._path.unlink()


def _check_new(out: Path) -> None:
    if out.exists():
        raise AdapterError(f"{out}: expected a new file, found one that is there already")


def _is_answer(line: bytes, row: Row) -> bool:
    """True if a line is this row with an answer."""
    try:
        return line == _line(_answer(row, json.loads(line)["completion"])).encode()
    except (ValueError, TypeError, KeyError):
        return False


def _answer(row: Row, text: str) -> dict[str, Any]:
    return {**row, "adapter": row.get("adapter") or BASE, "completion": text}


def _line(answer: Mapping[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"


def _generate(
    model: RoadModel,
    tokenizer: Any,
    rows: Sequence[Row],
    max_new_tokens: int,
    batch_size: int,
    console: Console | None,
    options: Mapping[str, Any],
    place: Callable[[int], str],
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    _check_rows(rows, model.adapter_names, place)
    chat = Chat(tokenizer)
    prompts = [_tokenize(tokenizer, chat, row, place(i)) for i, row in enumerate(rows)]
    size = model.get_input_embeddings().weight.shape[0]
    for i, prompt in enumerate(prompts):
        if (token := max(prompt)) >= size:
            raise AdapterError(
                f"{place(i)}: expected tokens below the model's vocab_size {size}, "
                f"found {token} ({tokenizer.convert_ids_to_tokens(token)!r})"
            )
    ends = _end_tokens(model, tokenizer, chat)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": ends or None, "pad_token_id": pad}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, *times, console=console, disable=console is None) as bar,
        torch.inference_mode(),
        _own_settings(model),
    ):
        task = bar.add_task("Generating", total=len(rows))
        for start in range(0, len(rows), batch_size):
            batch, ids = rows[start : start + batch_size], prompts[start : start + batch_size]
            names = [row.get("adapter") or BASE for row in batch]
            longest = max(map(len, ids))
            input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=model.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)

            def step(
                tokens: torch.Tensor,
                _scores: Any,
                start: int = start,
                n: int = len(batch),
                longest: int = longest,
                **_: Any,
            ) -> Any:
                share = (tokens.shape[1] - longest) / max_new_tokens
                bar.update(task, completed=round(start + n * min(share, 0.99)))
                return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

            given = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                adapter_names=names,
                stopping_criteria=transformers.StoppingCriteriaList([step]),
                **{**settings, **options},
            )
            texts = tokenizer.batch_decode(given[:, longest:], skip_special_tokens=True)
            keep([_answer(row, text) for row, text in zip(batch, texts, strict=True)])
            bar.update(task, completed=start + len(batch))


@contextlib.contextmanager
def _own_settings(model: RoadModel) -> Iterator[None]:
    """Replaces the checkpoint's generation config, which may ask for sampling, beams or repetition penalties."""
    base: Any = model.base_model
    before = base.generation_config
    base.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


def _check_rows(rows: Sequence[Row], adapters: Any, place: Callable[[int], str]) -> None:
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise AdapterError(f"{place(i)}: expected a JSON object, found {type(row).__name__}")
        if "messages" in row and "prompt" in row:
            raise AdapterError(f"{place(i)}: expected a field 'prompt' or a field 'messages', found both")
        if "messages" in row:
            messages = row["messages"]
            whole = isinstance(messages, Sequence) and all(
                isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )
            if not whole or not messages or messages[-1]["role"] == "assistant":
                raise AdapterError(
                    f"{place(i)}: expected messages with role and content, the last one not the assistant's, "
                    f"found {json.dumps(messages, default=str)[:60]}"
                )
        elif not isinstance(row.get("prompt"), str):
            found = type(row["prompt"]).__name__ if "prompt" in row else "no such field"
            raise AdapterError(
                f"{place(i)}: expected text in the field 'prompt' (or a field 'messages'), found {found}"
            )
        name = row.get("adapter")
        if name is not None and name != BASE and not _is_known(name, adapters):
            there = ", ".join([*adapters, BASE])
            raise AdapterError(f"{place(i)}: expected an adapter out of {there}, found {name!r}")


def _is_known(name: object, adapters: Any) -> bool:
    """True for the name of an adapter, and for a mix of adapters."""
    try:
        return isinstance(name, str) and all(part in adapters for part, _ in parts(read_name(name, adapters)))
    except AdapterError:
        return False


def _tokenize(tokenizer: Any, chat: Chat, row: Row, where: str) -> list[int]:
    """Returns a prompt's token ids; the text is taken as it is if the tokenizer has no chat template."""
    if "messages" in row and not tokenizer.chat_template:
        raise AdapterError(f"{where}: expected a field 'prompt', for the tokenizer has no chat template")
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    ids = chat.ids(chat.render(messages, where, prompt=True))
    if not ids:
        raise AdapterError(f"{where}: expected a prompt of at least one token, found none")
    return ids


def _end_tokens(model: RoadModel, tokenizer: Any, chat: Chat) -> list[int]:
    """Returns the tokens that end an answer: the model's, the tokenizer's, and the chat template's end of turn."""
    configured = model.generation_config.eos_token_id
    ends = list(configured) if isinstance(configured, Sequence) else [configured]
    if not all(isinstance(end, int | None) for end in ends):
        raise AdapterError(
            f"generation_config: expected the number of a token or a list of them as eos_token_id, found {configured!r}"
        )
    return [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id, chat.end]) if end is not None]


def _adapters(arguments: Sequence[str]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for argument in arguments:
        name, sign, directory = argument.partition("=")
        if not (name and sign and directory):
            raise AdapterError(f"--adapter: expected NAME=FOLDER, found {argument!r}")
        if name in adapters or name == BASE:
            raise AdapterError(f"--adapter: expected each name once and none to be {BASE}, found {name!r}")
        read_peft(directory)
        adapters[name] = Path(directory)
    return adapters


def _row_place(i: int) -> str:
    return f"row {i + 1}"
