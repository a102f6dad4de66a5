"""``--net``, ``--publish`` and ``--allow``: a guest's network from the command line."""

from __future__ import annotations

from kvmlite.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.cli.options import Values
    from kvmlite.sandbox.network import Network


def parse_network(values: Values) -> Network | None:
    """The network the options ask for; None for none.

    Raises:
        ConfigError: An option is not of its form, or does not go with the others.
        HostError: A name given to ``--allow`` cannot be looked up.
    """
    mode, publish, allow = values["net"], values["publish"], values["allow"]
    if mode == "none":
        for option, given in (("--publish", publish), ("--allow", allow)):
            if given:
                raise ConfigError(f"{option} needs a network", hint="add --net user, which works without root")
        return None
    from kvmlite.sandbox.network import Network

    return Network(mode, publish=publish, allow=allow or None)
