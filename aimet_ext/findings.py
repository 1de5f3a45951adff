"""What a check has to say: where, what, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it must be.

    :param check: what was checked, for example ``"bias"``.
    :param name: the tensor, layer or file.
    :param message: what was required there, and what is there instead.
    :param remedy: what to do.
    """

    check: str
    name: str
    message: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        """The fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.check}: {self.name}: {self.message}; {self.remedy}"
