"""`python -m fleetcast`: the command of `fleetcast/cli.py`, where no script of that name is installed."""

from fleetcast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
