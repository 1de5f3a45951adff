"""The finding of a check: the place, the fault and the remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One fault.

    :param check: name of the check, for example ``"bias"``.
    :param name: tensor, layer or file.
    :param message: value that is required there, and the one that was found.
    :param remedy: action that removes the fault.
    """

    check: str
    name: str
    message: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        """Return the fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.check}: {self.name}: {self.message}; {self.remedy}"
