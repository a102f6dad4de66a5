"""``dataclass`` for the start path: the same frozen dataclasses, without importing :mod:`dataclasses`.

Importing the standard module costs more than the whole rest of a microVM start (it pulls in ``inspect``, ``ast``
and ``re``: about 25 ms on the development machine, where QEMU starts in 57). Type checkers see the real decorator;
at run time a small one makes frozen, slotted, keyword-only records, and hands over to the real module the moment
somebody asks for ``dataclasses.fields``, ``replace`` or ``asdict``. See docs/adr/0004-records.md.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import dataclass, field

__all__ = ["dataclass", "field"]

if not TYPE_CHECKING:
    _MISSING = object()

    class _Default:
        __slots__ = ("factory",)

        def __init__(self, factory):
            self.factory = factory

    def field(*, default_factory):
        """Give a record field a default made anew for each instance."""
        return _Default(default_factory)

    class _StandardFields:
        """Stands in for ``__dataclass_fields__`` until somebody reads it, then makes the real one."""

        def __get__(self, instance, owner):
            import dataclasses

            specification = []
            for name in owner.__match_args__:
                default = owner._record_defaults.get(name, _MISSING)
                if default is _MISSING:
                    made = dataclasses.field(kw_only=True)
                elif isinstance(default, _Default):
                    made = dataclasses.field(default_factory=default.factory, kw_only=True)
                else:
                    made = dataclasses.field(default=default, kw_only=True)
                specification.append((name, owner._record_annotations[name], made))
            standard = dataclasses.make_dataclass(owner.__name__, specification, frozen=True)
            fields = standard.__dataclass_fields__
            owner.__dataclass_fields__ = fields
            return fields

    class _FrozenParams:
        """What ``dataclasses.replace`` and friends read of ``__dataclass_params__``."""

        init = repr = eq = frozen = True
        order = unsafe_hash = False

    def _init(self, **values):
        defaults = self._record_defaults
        set_field = object.__setattr__
        for name in self.__match_args__:
            if name in values:
                set_field(self, name, values.pop(name))
                continue
            default = defaults.get(name, _MISSING)
            if default is _MISSING:
                raise TypeError(f"{type(self).__name__}() missing keyword argument: {name!r}")
            set_field(self, name, default.factory() if isinstance(default, _Default) else default)
        if values:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {next(iter(values))!r}")
        post_init = getattr(self, "__post_init__", None)
        if post_init is not None:
            post_init()

    def _values(self):
        return tuple([getattr(self, name) for name in self.__match_args__])

    def _repr(self):
        pairs = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
        return f"{type(self).__qualname__}({pairs})"

    def _eq(self, other):
        if type(other) is not type(self):
            return NotImplemented
        return _values(self) == _values(other)

    def _hash(self):
        return hash((type(self), _values(self)))

    def _frozen_setattr(self, name, value):
        import dataclasses

        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def _frozen_delattr(self, name):
        import dataclasses

        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def _getstate(self):
        return _values(self)

    def _setstate(self, state):
        for name, value in zip(self.__match_args__, state, strict=True):
            object.__setattr__(self, name, value)

    def dataclass(*, frozen, slots, kw_only):
        """Make a frozen, slotted, keyword-only record; only this shape exists here."""
        if not (frozen and slots and kw_only):
            raise TypeError("records are frozen=True, slots=True, kw_only=True")

        def decorate(cls):
            annotations = cls.__dict__.get("__annotations__", {})  # noqa: RUF063 - inspect is what this avoids
            names = tuple(annotations)
            defaults = {name: cls.__dict__[name] for name in names if name in cls.__dict__}
            body = {k: v for k, v in cls.__dict__.items() if k not in defaults and k not in ("__dict__", "__weakref__")}
            body.update(
                __slots__=names,
                __match_args__=names,
                _record_defaults=defaults,
                _record_annotations=annotations,
                __dataclass_fields__=_StandardFields(),
                __dataclass_params__=_FrozenParams,
                __init__=_init,
                __eq__=_eq,
                __hash__=_hash,
                __setattr__=_frozen_setattr,
                __delattr__=_frozen_delattr,
                __getstate__=_getstate,
                __setstate__=_setstate,
            )
            body.setdefault("__repr__", _repr)
            return type(cls)(cls.__name__, cls.__bases__, body)

        return decorate
