"""`python -m fleetcast.demo`."""

from fleetcast.demo.play import main

if __name__ == "__main__":
    raise SystemExit(main())
