"""Models on the Hugging Face Hub: ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import save
from torch import nn

from audiomae.atomic import replacing
from audiomae.config import EncoderConfig

PAPER = "https://arxiv.org/abs/2207.06405"
MODEL_CARD = """\
---
{{ card_data }}
---

`{{ model_class }}` of the Python package audiomae: Audio-MAE, a masked autoencoder of spectrograms
([Masked Autoencoders that Listen]({{ paper_url }})).

```python
from audiomae import {{ model_class }}

model = {{ model_class }}.from_pretrained("{{ repo_id | default("organisation/name", true) }}")
```
"""


class HubModel(
    PyTorchModelHubMixin,
    library_name="audiomae",
    paper_url=PAPER,
    tags=["audio", "masked-autoencoder"],
    model_card_template=MODEL_CARD,
):
    """Gives a model that is made as ``cls(config, ...)`` a place on the Hub, and in folders of the same layout.

    ``save_pretrained(folder)`` writes ``model.safetensors``, ``config.json`` and a model card;
    ``push_to_hub("organisation/name")`` uploads them. The card names no licence: that of the weights is up to those who
    trained them.
    """

    config_class: ClassVar[type[EncoderConfig]]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        **model_kwargs: Any,
    ) -> Self:
        """Load what ``save_pretrained`` or ``push_to_hub`` wrote. Nothing may be missing, too much or of another shape.

        The functions of :mod:`audiomae.checkpoints` read the same folders, and other formats as well.

        Args:
            pretrained_model_name_or_path: A folder, or ``"organisation/name"`` on the Hugging Face Hub.
            force_download: Download again what is in the cache.
            token: For private repositories; None takes the one of ``hf auth login``.
            cache_dir: Where downloads are kept.
            local_files_only: Download nothing: take what is in the cache.
            revision: Branch, tag or commit of the repository.
            map_location: Device of the model.
            **model_kwargs: Of the class, as ``impl``; a ``config`` takes the place of the stored one.

        Returns:
            The model in PyTorch's default dtype and in evaluation mode.

        Raises:
            FileNotFoundError: No such folder.
            CheckpointError: Not to be had from the Hub, or no model of this class.
        """
        # To load that package is to load the models, so it cannot come before them.
        from audiomae.checkpoints.files import CheckpointError, read
        from audiomae.checkpoints.fitting import check_kinds, check_model

        contents = read(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        make = cast(Callable[..., nn.Module], cls)
        try:
            config = model_kwargs.pop("config", None) or cls._stored_config(contents.config)
            check_kinds(contents.tensors)
            check_model(lambda: make(config, **model_kwargs), config, contents.tensors)
            model = make(config, **model_kwargs)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{pretrained_model_name_or_path}: {error}") from error
        model.load_state_dict(contents.tensors)
        return cast(Self, model.to(map_location).eval())

    @classmethod
    def _stored_config(cls, settings: dict[str, Any] | None) -> EncoderConfig:
        if settings is None:
            raise ValueError(
                "no config.json of an audiomae model beside the weights; audiomae.checkpoints reads other formats"
            )

        def takes(model: type[HubModel]) -> bool:
            return settings.keys() <= {field.name for field in fields(model.config_class)}

        owner = cls if takes(cls) else next(filter(takes, HubModel.__subclasses__()), cls)
        if owner is not cls:
            raise ValueError(
                f"holds an {owner.__name__}, expected an {cls.__name__}: {owner.__name__}.from_pretrained loads it"
            )
        return cls.config_class.from_dict(settings)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights alone; the mixin writes the rest."""
        from audiomae.checkpoints.files import HUB_FILES

        state = cast(nn.Module, self).state_dict()
        with replacing(save_directory / HUB_FILES[0]) as temporary:
            # safetensors' own save_file makes a file that only its owner can read.
            temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"}))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Fill in the model card."""
        return super().generate_model_card(*args, **{"model_class": type(self).__name__, **kwargs})
