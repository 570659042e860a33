"""DiTPipeline with adapters: class names of each adapter, one adapter for each image, domain guidance."""

import contextlib
import os
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, ImagePipelineOutput

from onelora_diffusion.adapters.class_table import CLASS_TABLE, serving_table
from onelora_diffusion.adapters.weights import Weight, scaled, weight_at
from onelora_diffusion.families.classes import by_label, find_class, told_apart
from onelora_diffusion.families.dit import null_and_last_label
from onelora_diffusion.injection import routing
from onelora_diffusion.injection.book import adapters_of
from onelora_diffusion.injection.conditioning import name_repeated_blocks
from onelora_diffusion.injection.merging import stock_state_dict
from onelora_diffusion.injection.routing import Entry
from onelora_diffusion.pipelines.base import class_names, eval_mode, miniature_path
from onelora_diffusion.pipelines.loaders import OneLoRALoaderMixin

STOCK_NULL_LABEL = 1000  # the null label of DiTPipeline, whatever the size of the table


class OneLoRADiTPipeline(OneLoRALoaderMixin, DiTPipeline):
    """diffusers' `DiTPipeline` with adapters.

    pipe = OneLoRADiTPipeline.from_pretrained("facebook/DiT-XL-2-256")   # or .from_pipe(a DiTPipeline)
    pipe = OneLoRADiTPipeline.from_pretrained()                          # the miniature inside the package
    pipe.load_lora_weights("runs/food101", adapter_name="food")
    pipe(class_labels=["pizza", "sushi"])
    pipe(class_labels=["pizza", "robin", 207], adapter_names=["food", "birds", None])
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None = None, **kwargs):
        """As for `DiTPipeline`; None loads the miniature inside the package."""
        base = miniature_path() if pretrained_model_name_or_path is None else pretrained_model_name_or_path
        return super().from_pretrained(base, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiTPipeline):
        adapted = super().from_pipe(pipeline)
        name_repeated_blocks(adapted._adapted_model())
        return adapted

    def register_modules(self, **modules) -> None:
        super().register_modules(**modules)
        if modules.get("transformer") is not None:
            name_repeated_blocks(self._adapted_model())

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As for `DiTPipeline`, with integers as the keys of the class names, which its type hint requires."""
        config = super().load_config(*args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        if "id2label" in index:
            index["id2label"] = class_names(index)
        return config

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> label, for the adapter whose class table is active, or else for the base."""
        return self._labels_of(self._active())

    @labels.setter
    def labels(self, base_labels: dict[str, int]) -> None:
        self.__dict__["labels"] = base_labels

    def get_label_ids(self, label: str | list[str], adapter_names: str | Sequence[Entry] | None = None) -> list[int]:
        """Labels of class names, one or several; ValueError if there is no such class.

        Args:
            adapter_names: the adapter of each class, as in the call; None takes the active adapter.
        """
        names = [label] if isinstance(label, str) else list(label)
        return list(map(self._label, names, self._mixtures(adapter_names, len(names))))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        adapter_names: str | Sequence[Entry] | None = None,
        guidance: str = "cfg",
        cross_attention_kwargs: dict[str, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images as `DiTPipeline` does, from the same noise.

        Args:
            class_labels: labels or class names, one for each image, of the class table of the image's adapter, or of
                the base's if the adapter is None.
            guidance_scale: w; 1 or less turns guidance off. None takes 1 if guidance is trained into all adapters that
                draw, else 4.
            adapter_names: the adapter of each image (None for the base), all in one batch; a single name is for all
                images. If not given, the adapters that `set_adapters` activated draw.
            guidance: `cfg`, ε(∅) + w · (ε(y) − ε(∅)) of one model (Ho & Salimans 2022), or `domain`,
                ε_base(∅) + w · (ε_adapted(y) − ε_base(∅)) (Zhong et al., ICLR 2025), as fast, in one model.
            cross_attention_kwargs: `{"scale": s}` multiplies the adapters' weights by s in this call.

        Raises:
            ValueError: a class, an adapter or the guidance is unknown, or there is not one adapter for each label.
        """
        if guidance not in routing.GUIDANCES:
            raise ValueError(f"unknown guidance '{guidance}': choose {' or '.join(routing.GUIDANCES)}")
        if set(cross_attention_kwargs or {}) - {"scale"}:
            raise ValueError(f"cross_attention_kwargs {cross_attention_kwargs}: a DiT knows no other than 'scale'")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        elif isinstance(class_labels, int | str):
            class_labels = [class_labels]
        mixtures = self._mixtures(adapter_names, len(class_labels))
        labels = list(map(self._label, class_labels, mixtures))
        scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        entries = None
        if adapter_names is not None:
            entries = [{name: scaled(weight, scale) for name, weight in mixture.items()} for mixture in mixtures]
        if guidance_scale is None:
            is_trained = all(routing.is_trained_with_guidance(self._adapted_model(), mixture) for mixture in mixtures)
            guidance_scale = 1.0 if is_trained else 4.0
        for mixture in mixtures:
            routing.warn_of_trained_guidance(self._adapted_model(), mixture, guidance_scale)
        is_domain = guidance == "domain" and guidance_scale > 1
        with self._weighed(scale), self._routed(entries, is_domain, len(labels)), self._null_label_in_reach():
            return super().__call__(labels, guidance_scale, generator, num_inference_steps, output_type, return_dict)

    def _stock(self) -> DiTPipeline:
        """A plain `DiTPipeline` with its class names.

        With fused adapters the class table has at least the 1001 rows that it expects: first the adapter's classes,
        and the null row in all other rows.
        """
        stock = super()._stock()
        stock.register_to_config(id2label=by_label(self.labels))
        if self.num_fused_loras:
            stock.register_modules(transformer=_plain_transformer(self._adapted_model()))
        return stock

    def _active(self) -> Mapping[str, Weight]:
        """The weights of the adapters that draw where no others are named, fused ones included."""
        return {} if (book := self._book()) is None else book.merged or book.serving

    def _table_of(self, weights: Mapping[str, Weight] | None) -> tuple[str | None, int]:
        """(the adapter whose class table these weights activate, None for the base's; its number of classes)."""
        model, book = self._adapted_model(), self._book()
        if book is None:
            return None, null_and_last_label(model)[1]
        at_table = {name: weight_at(weight, CLASS_TABLE) for name, weight in (weights or {}).items()}
        name = serving_table(book.class_tables, at_table)
        if name is None:
            return None, book.class_tables.num_rows - 1
        return name, len(book.class_tables[name].weight) - 1

    def _labels_of(self, weights: Mapping[str, Weight] | None) -> dict[str, int]:
        name, _ = self._table_of(weights)
        if name is None:
            return self.__dict__["labels"]
        id2label = self._book().origins.get(name, {}).get("id2label") or {}
        return dict(sorted((part.strip(), label) for label, names in id2label.items() for part in names.split(",")))

    def _mixtures(self, adapter_names: str | Sequence[Entry] | None, batch_size: int) -> list[Mapping[str, Weight]]:
        """The weights of each image's adapters by name; None takes the active adapters for all."""
        if adapter_names is None:
            return [self._active()] * batch_size
        entries = [adapter_names] * batch_size if isinstance(adapter_names, str) else list(adapter_names)
        if len(entries) != batch_size:
            raise ValueError(f"{len(entries)} adapter names for {batch_size} class labels; one each is needed")
        mixtures = [{entry: 1.0} if isinstance(entry, str) else entry or {} for entry in entries]
        for name in {name for mixture in mixtures for name in mixture}:
            adapters_of(self._adapted_model()).check_present(name)
        return mixtures

    def _label(self, wanted: int | str, weights: Mapping[str, Weight]) -> int:
        """The label of a class name or number in the class table of an image's adapters."""
        adapter, num_classes = self._table_of(weights)
        owner = "the base" if adapter is None else f"adapter '{adapter}'"
        if not isinstance(wanted, str):
            if not 0 <= wanted <= num_classes and wanted != STOCK_NULL_LABEL:
                raise ValueError(f"label {wanted} is none of the {num_classes} classes of {owner}")
            return int(wanted)
        labels = self._labels_of(weights)
        if wanted in labels:
            return labels[wanted]
        return find_class(wanted, by_label(labels) or told_apart({}, num_classes), owner)

    def _routed(self, entries: list[Entry] | None, is_domain: bool, batch_size: int):
        """Context manager that assigns adapters to the images of the batch in this call."""
        model = self._adapted_model()
        if self._book() is None:  # without adapters domain guidance equals classifier-free guidance
            return contextlib.nullcontext()
        if is_domain:
            return routing.route_beside_base(model, batch_size, entries)
        return contextlib.nullcontext() if entries is None else routing.route_adapters(model, entries)

    @contextlib.contextmanager
    def _null_label_in_reach(self):
        """Context manager in which label 1000 selects the null row of smaller class tables; no label is dropped."""
        model, book = self._adapted_model(), self._book()
        last_row = self._table_of(None)[1]

        def clamp(model, args, kwargs):
            return args, kwargs | {"class_labels": kwargs["class_labels"].clamp(max=last_row)}

        with contextlib.ExitStack() as after, eval_mode(model):
            if book is None:  # with adapters the class embedding handles this itself
                after.callback(model.register_forward_pre_hook(clamp, with_kwargs=True).remove)
            yield


def _plain_transformer(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A merged transformer as a plain diffusers model, whose class table has a row for `DiTPipeline`'s null label."""
    rows = max(adapters_of(model).class_tables.num_rows, STOCK_NULL_LABEL + 1)
    weights = stock_state_dict(model, model.state_dict(), table_rows=rows)
    with torch.device("meta"):
        plain = DiTTransformer2DModel.from_config(model.config, num_embeds_ada_norm=rows - 1)
    plain.load_state_dict(weights, assign=True)
    return plain
