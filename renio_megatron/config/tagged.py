"""Tagged unions of settings: `weighting: {name: renio, threshold: 0.8}` picks the class of ReNIO.

So each class has only the settings that have an effect on it, with their types and ranges, and a new class adds its
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from renio_megatron.config.lazy import imported
from renio_megatron.config.validators import require_choice
from renio_megatron.errors import ConfigError


class Tagged:
    """Base class of tagged unions: dataclasses, each with the tag as a field whose default is its own name.

    Calling the base makes an object of one of the classes: `WeightingConfig(name="length")` is a `LengthWeighting`.

    Attributes:
        SECTION: the recipe's section; for messages.
        TAG: the field that picks the class, `name` or `kind`.
        VARIANTS: tag -> `module:class`, imported when it is picked.
        OF_LIST: (tag, field) that a list in the section's place stands for; empty where there may be none.
    """

    SECTION: ClassVar[str] = ""
    TAG: ClassVar[str] = "name"
    VARIANTS: ClassVar[Mapping[str, str]] = {}
    OF_LIST: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, **settings: Any) -> Any:
        """An object of the class that the tag picks; the interpreter calls its `__init__` with the same settings."""
        if "VARIANTS" in vars(cls):
            tag = settings.get(cls.TAG, cls.default_tag())
            picked = cls.variant(tag)
            names = [field.name for field in dataclasses.fields(picked)]
            for name in settings:
                if name not in names:
                    has = ", ".join(names)
                    raise ConfigError(f"{cls.SECTION}.{name} is no setting of {cls.TAG}={tag}, which has {has}.")
            return object.__new__(picked)
        if settings.get(cls.TAG, own := cls.default_tag()) != own:
            raise ConfigError(f"{cls.SECTION}.{cls.TAG} of a {cls.__name__} is {own}; got {settings[cls.TAG]!r}.")
        return object.__new__(cls)

    def without_effect(self) -> dict[str, str]:
        """Settings that have no effect together with the others, with the reason."""
        return {}

    @classmethod
    def variant(cls, tag: str, section: str = "") -> Any:
        """The class of a tag; `section` is the recipe's section, for the message.

        Raises:
            ConfigError: there is none.
        """
        require_choice(f"{section or cls.SECTION}.{cls.TAG}", tag, cls.VARIANTS)
        return imported(cls.VARIANTS[tag])

    @classmethod
    def variants(cls) -> Iterator[Any]:
        """The classes of all tags."""
        return map(cls.variant, cls.VARIANTS)

    @classmethod
    def default_tag(cls) -> str:
        """The tag of settings that have none."""
        return next(field.default for field in dataclasses.fields(cls) if field.name == cls.TAG)  # type: ignore
