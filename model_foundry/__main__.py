"""`python -m model_foundry` is `foundry`."""

from __future__ import annotations

from model_foundry.cli.main import main

if __name__ == "__main__":
    main()
