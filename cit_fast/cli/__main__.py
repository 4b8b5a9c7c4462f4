"""``python -m cit_fast.cli``, where a launcher wants a module."""

from cit_fast.cli import main

main()
