"""The built-in streams: generated tasks of real use, and tasks on pictures, of any size, from a seed."""

from cit_fast.data.builtin.stream import builtin_stream, builtin_task, builtin_task_names, is_builtin_task
from cit_fast.data.builtin.visual import visual_task_names

__all__ = ["builtin_stream", "builtin_task", "builtin_task_names", "is_builtin_task", "visual_task_names"]
