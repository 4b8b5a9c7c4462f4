"""Data: examples, tasks and streams; where they come from, and how they become batches of tokens."""

from cit_fast.data.collation import (
    PackingCollator,
    PaddingCollator,
    choose_collator,
    left_pad,
    resolve_attention,
)
from cit_fast.data.embedding import (
    CachedEmbedder,
    Embedder,
    SentenceEmbedder,
    TokenMeanEmbedder,
    build_embedder,
    instruction_measure,
    task_clouds,
)
from cit_fast.data.example import MASK, Example, Task, TaskStream
from cit_fast.data.prompts import Encoded, EncodedExamples, EncodedPrompts, ExampleTooLongError, PromptEncoder
from cit_fast.data.readers import read_dataset, read_file
from cit_fast.data.records import FORMATS, ReadOptions, read_records
from cit_fast.data.sources import TaskSource, find_tasks, load_stream, load_task

__all__ = [
    "FORMATS",
    "MASK",
    "CachedEmbedder",
    "Embedder",
    "Encoded",
    "EncodedExamples",
    "EncodedPrompts",
    "Example",
    "ExampleTooLongError",
    "PackingCollator",
    "PaddingCollator",
    "PromptEncoder",
    "ReadOptions",
    "SentenceEmbedder",
    "Task",
    "TaskSource",
    "TaskStream",
    "TokenMeanEmbedder",
    "build_embedder",
    "choose_collator",
    "find_tasks",
    "instruction_measure",
    "left_pad",
    "load_stream",
    "load_task",
    "read_dataset",
    "read_file",
    "read_records",
    "resolve_attention",
    "task_clouds",
]
