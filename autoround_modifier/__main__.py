"""``python -m autoround_modifier``: the command line."""

from autoround_modifier.cli.main import main

raise SystemExit(main())
