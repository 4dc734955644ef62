"""The program that tries to break out: runs inside, with nothing but Python's own library.

It judges nothing: it says what each attempt gave, and what it read. Every attempt is harmless in itself: it opens and
never writes, and undoes what it made.
"""
