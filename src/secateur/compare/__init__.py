"""Two MODEL arguments come in; a local web page goes out, until it is interrupted.

Both models answer there, and a cut of either can be planned. Read `compare.py` first.
"""

HERE, PORT = "127.0.0.1", 7860
