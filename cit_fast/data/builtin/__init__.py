"""The built-in stream: generated tasks of real use, of any size, from a seed."""

from cit_fast.data.builtin.stream import builtin_stream, builtin_task, builtin_task_names

__all__ = ["builtin_stream", "builtin_task", "builtin_task_names"]
