"""Virtio: queues, the device protocol, and transports."""

from __future__ import annotations
