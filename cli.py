"""Run resdiag from a checkout: `python cli.py --help` is the installed `resdiag --help`."""

from resdiag.cli.main import app

if __name__ == "__main__":
    app()
