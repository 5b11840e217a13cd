"""`python -m resdiag` is the command `resdiag`."""

from resdiag.cli.main import app

if __name__ == "__main__":
    app()
