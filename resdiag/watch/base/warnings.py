"""What could not be watched, said once each in words."""

import warnings


class WatchWarning(UserWarning):
    """Something could not be watched; the run goes on."""


class Warnings:
    """Texts without repetition; each is a Python warning as well."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        """Say once what could not be watched."""
        if text not in self.texts:
            self.texts.append(text)
            warnings.warn(f"resdiag: {text}", WatchWarning, stacklevel=4)
