"""Results of commands come in as values; rich tables and lines go out, which the command line prints.

There is one file per kind of result, and nothing here measures or decides anything. Read `layout.py` first.
"""
