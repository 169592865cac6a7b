"""`python -m secateur`: the command line, as `accelerate launch -m secateur` starts it in several processes."""

from __future__ import annotations

from secateur.cli.main import main

if __name__ == "__main__":
    main()
