"""The configuration in an OCI image layout: index.json, the manifest it names, the config that names (OCI image spec 1.0)."""

from __future__ import annotations

import os

from kvmlite.errors import ImageError
from kvmlite.images.image import ImageConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["read_config"]

_JSON_LIMIT = 4 << 20


def read_config(layout: str) -> ImageConfig:
    """Return how the only image of a layout wants to be run.

    Args:
        layout: The directory with ``index.json``, written by a tool that has checked the digests.

    Raises:
        ImageError: It is not laid out so, or not for Linux on x86-64.
    """
    index = _read(os.path.join(layout, "index.json"))
    try:
        manifest = _read(_blob(layout, index["manifests"][0]))
        config = _read(_blob(layout, manifest["config"]))
        system, machine = config.get("os", "linux"), config.get("architecture", "amd64")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ImageError(f"the image's metadata lacks a field: {error}") from error
    if (system, machine) != ("linux", "amd64"):
        raise ImageError(f"the image is for {system} on {machine}, not for linux on amd64")
    return ImageConfig.from_json(config.get("config"))


def _blob(layout: str, descriptor: Any) -> str:
    algorithm, _, digest = str(descriptor["digest"]).partition(":")
    if algorithm != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ImageError(f"the image's metadata names a blob {descriptor['digest']!r}")
    return os.path.join(layout, "blobs", algorithm, digest)


def _read(path: str) -> Any:
    import json

    try:
        with open(path, "rb") as file:
            data = file.read(_JSON_LIMIT + 1)
        if len(data) > _JSON_LIMIT:
            raise ImageError(f"the image's metadata {os.path.basename(path)} has more than {_JSON_LIMIT >> 20} MiB")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ImageError(f"the image's metadata {os.path.basename(path)} cannot be read: {error}") from error
