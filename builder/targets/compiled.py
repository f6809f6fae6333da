"""What a target makes of a program."""

from dataclasses import dataclass

from contract.manifest import Profile


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The file's name in the engine directory; the profiles that a TensorRT plan has."""

    file: str
    profiles: tuple[Profile, ...] = ()
