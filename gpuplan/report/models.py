"""Models in the terminal: the built-ins, what a model file needs, and one ONNX file. Draws; computes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

LABELS_SHOWN = 12

FILE_NEEDS = (
    "A model of your own is an ONNX file with its neighbours in one folder:",
    "  tokenizer.json   needed: how text becomes token ids",
    "  config.json      architectures: the task; id2label: a classifier's labels; max_position_embeddings: the window;",
    "                   pad_token_id, eos_token_id",
    "  inputs           input_ids, and attention_mask, token_type_ids where the graph has them: [batch, tokens],",
    "                   int64 or int32",
    "  task: classify   logits [batch, labels], the first output; softmax, or a logistic function of a single logit",
    "  task: embed      sentence_embedding [batch, width] as it is, or last_hidden_state [batch, tokens, width],",
    "                   whose mean over the mask is normalised",
    "  task: generate   logits [batch, tokens, vocabulary], with past_key_values.* in and present.* out",
    "gpuplan models PATH.onnx looks at one.",
)


def builtin_table(found: Iterable[Any]) -> Table:
    """A row for each built-in."""
    table = _table("builtin", "what it is", "endpoint", "weights", "MB", "context")
    for one in found:
        size = f"{one.size_bytes / 1e6:.1f}"
        weights = f"{one.parameters / 1e6:.1f} M"
        table.add_row(one.name, _first_sentence(one.about), one.endpoint, weights, size, str(one.context_tokens_max))
    return table


def tensor_table(one: Any) -> Table:
    """A row for each input and output of a graph."""
    table = _table("", "name", "type", "shape")
    for side, tensors in (("in", one.inputs), ("out", one.outputs)):
        for tensor in tensors:
            shape = f"[{', '.join(map(str, tensor.shape))}]"
            table.add_row(side, _text(tensor.name), tensor.type, _text(shape))
    return table


def file_lines(one: Any) -> Iterator[str]:
    """What an ONNX file is."""
    yield f"{one.path}: {one.size_bytes / 1e6:.1f} MB"
    yield f"task: {one.task} ({one.task_from}), served at {one.endpoint}"
    yield f"context window: {one.context_tokens_max} tokens"
    yield f"tokenizer: {one.tokenizer or 'none'}"
    if one.labels:
        more = len(one.labels) - LABELS_SHOWN
        shown = ", ".join(one.labels[:LABELS_SHOWN]) + (f" and {more} more" if more > 0 else "")
        yield f"labels: {_text(shown).plain}"


def _first_sentence(about: str) -> Text:
    return _text(about.split(". ")[0].rstrip("."))


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i == 0)
    return table


def _text(words: str) -> Text:
    """A file's text: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words))
