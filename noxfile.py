"""The suite on the oldest and newest Python and PyTorch that resdiag supports: `make matrix`.

A Python that this machine does not have is skipped, and said.
"""

import nox

PYTHONS = ["3.11", "3.13"]
TORCHES = {
    "oldest": ["torch==2.9.*", "torchvision==0.24.*"],  # the bounds in pyproject.toml
    "newest": ["torch", "torchvision"],
}

nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
@nox.parametrize("torch", list(TORCHES))
def tests(session: nox.Session, torch: str) -> None:
    """Run the suite; arguments after -- go to pytest."""
    session.install("--upgrade", *TORCHES[torch])
    session.install("-e", ".[test,test-integrations]", *TORCHES[torch])
    session.run("python", "-m", "pytest", "-q", *session.posargs, env={"OMP_NUM_THREADS": "1"})
