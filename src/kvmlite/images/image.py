"""An image: a root file system that guests are started from, and what its maker says about running it."""

from __future__ import annotations

from kvmlite.errors import ImageError
from kvmlite.records import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["Image", "ImageConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How an image wants to be run, as the OCI image specification has it (config, ``Env`` to ``User``).

    Attributes:
        env: ``NAME=VALUE`` each.
        entrypoint: Program and first arguments, whatever the command.
        command: Arguments behind the entrypoint, or the whole command without one, if the user gives none.
        workdir: Working directory; empty for ``/``.
        user: ``name`` or ``uid``, either with ``:group``; empty for root.
    """

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""

    def argv(self, command: Sequence[str], entrypoint: Sequence[str] | None = None) -> list[str]:
        """Return what to run: the entrypoint, then the user's command or, if that is empty, the image's.

        Args:
            command: What the user asked for.
            entrypoint: Instead of the image's; the image's command does not apply then.
        """
        if entrypoint is not None:
            return [*entrypoint, *command]
        return [*self.entrypoint, *(command or self.command)]

    def environment(self) -> dict[str, str]:
        """Return ``env`` as a dictionary."""
        return dict([entry.partition("=")[::2] for entry in self.env])

    def to_json(self) -> dict[str, Any]:
        """Return it with the names of the OCI specification."""
        return {
            "Env": list(self.env), "Entrypoint": list(self.entrypoint), "Cmd": list(self.command),
            "WorkingDir": self.workdir, "User": self.user,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: object) -> ImageConfig:
        """Read the ``config`` of an OCI image; absent and null fields are empty.

        Raises:
            ImageError: A field is not of its type, or holds a NUL.
        """
        fields = {} if value is None else value
        if not isinstance(fields, dict):
            raise ImageError("the image's config is not a JSON object")
        return cls(
            env=_texts(fields, "Env"),
            entrypoint=_texts(fields, "Entrypoint"),
            command=_texts(fields, "Cmd"),
            workdir=_text(fields.get("WorkingDir") or "", "WorkingDir"),
            user=_text(fields.get("User") or "", "User"),
        )


def _texts(fields: dict[Any, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name) or []
    if not isinstance(value, list):
        raise ImageError(f"{name} in the image's config is not a list")
    return tuple([_text(text, name) for text in value])


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ImageError(f"{name} in the image's config is not text")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A root file system.

    Attributes:
        path: The ext4 image on the host; shared, never written to.
        size: Of the file system, bytes; the file is sparse.
        name: What messages call it.
        digest: SHA-256 of its data in hexadecimal.
        source: What it was imported from.
        names: All its names in the store.
        added: When, ISO 8601 in UTC.
        config: How it wants to be run.
    """

    path: str
    size: int
    name: str
    digest: str
    source: str
    names: tuple[str, ...]
    added: str
    config: ImageConfig
