"""``python -m selfkd``."""

from .cli import main

raise SystemExit(main())
