"""Instruction data: examples and tasks, the files they are read from, and the built-in stream."""

from cit_fast.data.example import MASK, Example, Task, TaskStream
from cit_fast.data.readers import read_dataset, read_file
from cit_fast.data.record_fields import FORMATS, ReadOptions
from cit_fast.data.records import read_records
from cit_fast.data.sources import TaskSource, find_tasks, load_stream, load_task

__all__ = [
    "FORMATS",
    "MASK",
    "Example",
    "ReadOptions",
    "Task",
    "TaskSource",
    "TaskStream",
    "find_tasks",
    "load_stream",
    "load_task",
    "read_dataset",
    "read_file",
    "read_records",
]
