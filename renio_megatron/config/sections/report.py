"""Settings of diagnostics in addition to those of the weighting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from renio_megatron.config.sections.weighting import RenioWeighting
from renio_megatron.config.tagged import Tagged
from renio_megatron.errors import ConfigError

REPORTS: dict[str, str] = {"renio": f"{__name__}:RenioReportConfig"}
"""Name -> `module:class` of its settings."""


@dataclass(frozen=True, kw_only=True, init=False)
class ReportConfig(Tagged):
    """Settings of one kind of diagnostics.

    Attributes:
        name: `renio`, the metrics `renio/...`.
    """

    SECTION: ClassVar[str] = "also_report"
    TAG: ClassVar[str] = "name"
    VARIANTS: ClassVar[Mapping[str, str]] = REPORTS

    name: str = "renio"


@dataclass(frozen=True, kw_only=True)
class RenioReportConfig(ReportConfig):
    """ReNIO's diagnostics of the sequences, under any weighting.

    Attributes:
        threshold, ceiling, temperature: as in the weighting `renio`.
    """

    name: str = "renio"
    threshold: float = 0.8
    ceiling: float = 2.5
    temperature: float = 1.0

    @property
    def weighting(self) -> RenioWeighting:
        """The ReNIO weighting whose diagnostics are reported."""
        return RenioWeighting(threshold=self.threshold, ceiling=self.ceiling, temperature=self.temperature)

    def __post_init__(self) -> None:
        try:
            _ = self.weighting
        except ConfigError as error:
            raise ConfigError(str(error).replace("weighting.", f"{self.SECTION}.")) from error
