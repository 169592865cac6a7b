"""Results of commands come in: as values for the terminal, and as the log of a run folder for the HTML page.

Rich tables go out (`tables/`), and one HTML file without scripts (`page.py`), with numbers formatted alike in both.
Read `page.py` first for the report, `tables/layout.py` for the terminal.
"""
