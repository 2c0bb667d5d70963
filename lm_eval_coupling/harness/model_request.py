"""Model and settings that `lm-eval-coupling measure` was asked for, checked before loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.runs.options import PREFIX, Options, parse_settings
from lm_eval_coupling.saved.atomic import require_writable

if TYPE_CHECKING:
    from lm_eval_coupling.harness.lm import CouplingLM


class Measured(NamedTuple):
    """A finished run.

    Attributes:
        table: what to print.
        interrupted: True if Ctrl-C ended the measuring early.
        problem: why something that was asked for was not written; empty if all was.
    """

    table: str
    interrupted: bool
    problem: str = ""


@dataclass(frozen=True)
class ModelRequest:
    """A model to measure and how, checked before its weights are loaded.

    Attributes:
        name: transformers folder or name on the hub.
        arguments: those of lm-eval's ``hf``, the name included.
        settings: the ``coupling_`` arguments.
        options: the same arguments, checked.
        device: such as ``cuda``; None for the best there is.
    """

    name: str
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]
    options: Options
    device: str | None

    @classmethod
    def checked(
        cls,
        name: str,
        out: Path,
        *,
        model_args: str | Mapping[str, Any] = "",
        coupling: str | Mapping[str, Any] = "",
        device: str | None = None,
        limit: int | str = 100,
    ) -> ModelRequest:
        """Return a request whose settings and output are checked, without loading torch.

        Args:
            name: transformers folder or name on the hub.
            out: folder of results, samples and tables.
            model_args: further arguments of ``hf``, as ``name=value`` joined by commas or by name.
            coupling: settings in either form, with or without the prefix ``coupling_``.
            device: such as ``cuda``.
            limit: documents to measure where ``coupling`` does not say.

        Raises:
            CouplingError: for a wrong argument, or an output that cannot be written.
        """
        if isinstance(coupling, str):
            settings: dict[str, Any] = dict(parse_settings(coupling))
        else:
            settings = {f"{PREFIX}{key.removeprefix(PREFIX)}": v for key, v in coupling.items()}
        settings = {f"{PREFIX}limit": limit} | settings
        if isinstance(model_args, str):
            model_args = _arguments(model_args)
        arguments = {**model_args, "pretrained": name}
        options = Options.take_from(arguments | settings)
        if not options.measures_anything:
            raise CouplingError(
                f"got {PREFIX}limit=0, expected a number of prompts to measure, or all"
            )
        require_writable(out)
        return cls(
            name=name, arguments=arguments, settings=settings, options=options, device=device
        )

    def load(self, **defaults: Any) -> CouplingLM:
        """Return the model with its weights, and with a ``session`` that is not None.

        Args:
            **defaults: arguments of ``hf`` where the model's own do not say.

        Raises:
            CouplingError: if there is no such device, or the model cannot be measured.
        """
        from lm_eval_coupling.numerics.devices import device_named

        device = str(device_named(self.device))
        from lm_eval_coupling.harness import plugin

        plugin.install()
        from lm_eval_coupling.harness.lm import CouplingLM

        return CouplingLM(**defaults | dict(self.arguments), **self.settings, device=device)


def _arguments(text: str) -> dict[str, Any]:
    """Parse arguments as lm-eval does; without any it is not imported."""
    if not text:
        return {}
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(text)
