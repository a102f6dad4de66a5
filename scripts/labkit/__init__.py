"""The lab: run a command inside an emulated AMD-V host that has a real ``/dev/kvm``.

Standard library only: it has to run before anything is installed. ``docs/lab.md`` says what it
is for and how its pieces fit; ``scripts/lab`` is the door.
"""
