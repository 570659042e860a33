"""diffusers' adapter methods for pipelines, for 1LoRA: load, set, fuse, unload, save."""

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from torch import nn

from onelora_diffusion.adapters.weights import Weight
from onelora_diffusion.denoisers import denoisers_in
from onelora_diffusion.injection import model_verbs
from onelora_diffusion.injection.book import AdapterBook, adapters_of, check_name, unwrapped
from onelora_diffusion.injection.listing import AdapterTable, list_adapters
from onelora_diffusion.injection.verbs import unload_adapter
from onelora_diffusion.injection.watch import take_scale
from onelora_diffusion.pipelines.diffusers_forms import (
    check_components,
    in_words,
    lora_layers,
    on_the_class_too,
    weight_of,
)
from onelora_diffusion.pipelines.foreign_names import denoiser_tensors
from onelora_diffusion.storage.adapter_file import WEIGHTS_NAME, save_adapter
from onelora_diffusion.storage.attaching import attach_adapter_file, swap_values
from onelora_diffusion.storage.finding import FileLocation, find_weights
from onelora_diffusion.storage.lora import DIFFUSERS_LORA, is_foreign, write_lora
from onelora_diffusion.storage.reading import components_of, json_or_text, read_safetensors, read_source


class OneLoRALoaderMixin:
    """`load_lora_weights` and its related methods, for any diffusers pipeline with a `transformer` or a `unet`.

    Two transformers (Wan 2.2) have adapters of their own, and a method applies to all that have the given name.

        class OneLoRAFluxPipeline(OneLoRALoaderMixin, FluxPipeline): ...
        pipe = OneLoRALoaderMixin.from_pipe(pipe)     # for a pipeline that is loaded already

    Names and keyword arguments are those of diffusers. Every error is a ValueError or FileNotFoundError of one line,
    and does not change what the pipeline computes.
    """

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline):
        """A pipeline with these methods that shares everything with `pipeline`, weights and offloading included.

        ValueError if `pipeline` is of another class than this one is for.
        """
        if cls is OneLoRALoaderMixin and isinstance(pipeline, OneLoRALoaderMixin):
            cls = type(pipeline)
        elif cls is OneLoRALoaderMixin:

            class OneLoRAPipeline(OneLoRALoaderMixin, type(pipeline)):
                __doc__ = type(pipeline).__doc__

            cls = OneLoRAPipeline
            cls.__name__ = type(pipeline).__name__  # diffusers' AutoPipelines recognise a pipeline by this name
        if not isinstance(pipeline, stock := cls.stock_class()):
            raise ValueError(f"{cls.__name__} is made from a {stock.__name__}, not {type(pipeline).__name__}")
        adapted = copy.copy(pipeline)
        adapted.__class__ = cls
        adapted._adapted_model()
        return adapted

    @classmethod
    def stock_class(cls) -> type[DiffusionPipeline]:
        """The class of diffusers from which this class is derived."""
        return next(c for c in cls.__mro__ if issubclass(c, ConfigMixin) and not issubclass(c, OneLoRALoaderMixin))

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        low_cpu_mem_usage: bool = True,
        load_into_transformer_2: bool = False,
        **location,
    ) -> None:
        """Load an adapter and make it the active one; the adapters that train stay the same (see `train_adapters`).

        It takes a file of this library, a LoRA that is exactly 1LoRA (A is all ones), PEFT's MiSS of rank 1, and any
        other LoRA or DoRA of linear layers, which PEFT computes; given as a file, a folder, a hub id or a state dict.
        Names of kohya's scripts and other programs are converted as in diffusers. Tensors for text encoders are left
        out with a warning.

        Args:
            adapter_name: a new name; None takes `default_0`, `default_1`, …
            hotswap: overwrite the values of the existing adapter `adapter_name` (None: the active one), which must be
                of the same kind. The active adapters stay the same, and a compiled model is not compiled again.
            low_cpu_mem_usage: accepted for compatibility with diffusers; loading never needs a second copy.
            load_into_transformer_2: load into the second of two transformers. An adapter of this library that was
                trained for both is loaded into both without that.
            **location (Any): fields of `FileLocation` that select a file: `weight_name`, `subfolder`, …

        Raises:
            FileNotFoundError: the file, folder or repository does not exist or cannot be reached.
            ValueError: the name is in use, the adapter is of another base or has NaN, the file is damaged, or nothing
                fits.
        """
        models, location = self._models(), FileLocation(**location)
        if load_into_transformer_2 and "transformer_2" not in models:
            raise ValueError(f"load_into_transformer_2: {type(self).__name__} has no second transformer; leave it out")
        source, first = pretrained_model_name_or_path_or_dict, next(iter(models))
        chosen = ["transformer_2" if load_into_transformer_2 else first]
        model = models[chosen[0]]
        if hotswap:
            adapter_name = adapters_of(model).choose(adapter_name)
        else:
            present = adapters_of(model).adapters if hasattr(model, "_onelora") else {}
            free = (f"default_{i}" for i in range(len(present) + 1))
            adapter_name = adapter_name or next(name for name in free if name not in present)
            check_name(model, adapter_name)
        if not load_into_transformer_2 and (of_both := components_of(source, location)):
            if missing := [name for name in of_both if name not in models]:
                both = " and ".join(of_both)
                raise ValueError(f"the adapter is for {both}, and {type(self).__name__} has no {missing[0]}")
            chosen = of_both
            if not hotswap:
                check_name(models[of_both[1]], adapter_name)
        models = {name: models[name] for name in chosen}

        files = {
            name: read_source(model, source, partial(denoiser_tensors, self.stock_class(), model), location, name)
            for name, model in models.items()
        }
        for name, (file, shown) in files.items():
            if hotswap:
                swap_values(adapters_of(models[name]), file, adapter_name, shown)
            else:
                attach_adapter_file(models[name], file, adapter_name, shown)

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        *,
        return_lora_metadata: bool = False,
        **location,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict]:
        """The tensors of an adapter file by their keys, and on request the metadata of its header."""
        source, location = pretrained_model_name_or_path_or_dict, FileLocation(**location)
        if isinstance(source, dict):
            tensors, metadata = dict(source), {}
        else:
            tensors, metadata = read_safetensors(find_weights(source, location))
            metadata = {name: json_or_text(text) for name, text in metadata.items()}
        return (tensors, metadata) if return_lora_metadata else tensors

    @on_the_class_too
    def save_lora_weights(
        self,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
        *,
        adapter_name: str | None = None,
        component: str | None = None,
        id2label: dict[int, str] | None = None,
        base: str | None = None,
        training: dict | None = None,
        dtype: torch.dtype = torch.float32,
        **others: dict | None,
    ) -> None:
        """Write an adapter of this pipeline to `save_directory/onelora_weights.safetensors`, or given LoRA layers.

        The new file keeps the metadata of the file from which the adapter was loaded. LoRA layers of PEFT, which
        diffusers' scripts pass to this method, are written to `pytorch_lora_weights.safetensors` as by diffusers.

        Args:
            transformer_lora_layers: values to write instead of those of `adapter_state_dict`, such as their average,
                or the state dict of a PEFT LoRA.
            weight_name: another name of the file.
            adapter_name: the adapter to write; None takes the only active one.
            component: the component of the adapter, `transformer` or `transformer_2`; None takes the only one that has
                it.
            id2label: as for `save_adapter`; None keeps the metadata of the loaded file; likewise the next two.
            dtype: as for `save_adapter`.
            **others (Any): of other components what `transformer_lora_layers` is, `unet_lora_layers` or
                `text_encoder_lora_layers`; and PEFT's settings for the header, `transformer_lora_adapter_metadata`.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; adapters are safetensors only")
        if Path(save_directory).is_file():
            raise ValueError(f"save_directory '{save_directory}' is a file, and a folder is needed")
        FileLocation(weight_name)  # refuses a name that leads out of save_directory
        if weight_name is not None and not weight_name.endswith(".safetensors"):
            raise ValueError(f"weight_name '{weight_name}' must end in .safetensors")
        layers, settings = lora_layers(others | {"transformer_lora_layers": transformer_lora_layers})
        if layers and all(is_foreign(tensors) for tensors in layers.values()):
            if is_main_process:
                write_lora(Path(save_directory) / (weight_name or DIFFUSERS_LORA), layers, settings)
            return

        if isinstance(self, type):
            raise ValueError(
                f"{self.__name__}.save_lora_weights writes PEFT's LoRA layers alone: call it on the pipeline that has "
                "the adapter, or save_adapter(model, path)"
            )
        if other := [name for name in layers if name not in self._models()]:
            places = in_words(self._models())
            raise ValueError(f"{other[0]}_lora_layers: the adapters of this pipeline are in {places}")
        component, book = self._only_book(adapter_name, component)
        adapter_name = book.choose(adapter_name)
        origin = book.origins.get(adapter_name, {})
        base = base or origin.get("base") or getattr(self.config, "_name_or_path", None)
        if is_main_process:
            save_adapter(
                book.model,
                Path(save_directory) / (weight_name or WEIGHTS_NAME),
                adapter_name,
                state_dict=layers.get(component),
                id2label=origin.get("id2label") if id2label is None else id2label,
                base=str(base) if base else None,
                training=origin.get("training") if training is None else training,
                dtype=dtype,
            )

    def unload_lora_weights(self) -> None:
        """Remove all adapters, also fused ones; the model is the plain base again, bit for bit."""
        for book in self._books().values():
            unload_adapter(book.model)

    def delete_adapters(self, adapter_names: str | list[str] | None = None) -> None:
        """Remove the named adapters, or the active one; the others are not changed.

        Fused weights are unfused first.
        """
        for book, names in self._chosen(adapter_names):
            book.unload(names)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str] | None = None,
        adapter_weights: Weight | Sequence[Weight] | None = None,
    ) -> None:
        """Activate the named adapters, as `set_adapters` of a model does.

        A weight may also have diffusers' nested form, `{"unet": {"down": 0.5, "up": {"block_0": 0.2}}}`; weights for
        text encoders are ignored with a warning.
        """
        is_for_each = isinstance(adapter_weights, list | tuple)
        chosen = dict.fromkeys(name for _, names in self._chosen(adapter_names) for name in names)
        is_named_twice = is_for_each and not isinstance(adapter_names, str | None)
        names = list(adapter_names) if is_named_twice else list(chosen)
        weights = list(adapter_weights) if is_for_each else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapter names ({', '.join(names)}) but {len(weights)} weights were given")
        with self._locked() as books:
            mixtures = []
            for component, book in books.items():
                book.require_unmerged("others are set")
                own = [(name, w) for name, w in zip(names, weights, strict=True) if name in book.adapters]
                own_weights = [weight_of(weight, component, self._models()) for _, weight in own]
                mixtures.append(book.weighed([name for name, _ in own], own_weights))
            for book, mixture in zip(books.values(), mixtures, strict=True):
                book.activate(mixture)

    def get_active_adapters(self) -> list[str]:
        """The names of the active adapters, including fused ones; none while adapters are disabled."""
        return list(dict.fromkeys(name for book in self._books().values() for name in book.merged or book.serving))

    @property
    def adapters(self) -> AdapterTable:
        """The adapters as rows of name, method, classes, size and weight; `print(pipe.adapters)` shows a table."""
        return AdapterTable(row for model in self._models().values() for row in list_adapters(model))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the names of its adapters, in the order of loading."""
        return {component: list(book.adapters) for component, book in self._books().items()}

    def disable_lora(self) -> None:
        """Let the base compute alone until `enable_lora`, `set_adapters` or the next load."""
        books = self._adapted().values()
        with self._locked():
            for book in books:
                book.require_unmerged("they are disabled")
            for book in books:
                model_verbs.disable_lora(book.model)

    def enable_lora(self) -> None:
        """Activate the adapters that `disable_lora` deactivated, with their weights."""
        for book in self._adapted().values():
            model_verbs.enable_lora(book.model)

    def set_lora_device(
        self, adapter_names: str | list[str] | None = None, device: torch.device | str | int = "cpu"
    ) -> None:
        """Move the tensors of the named adapters, or of the active one, to a device.

        Inactive adapters can be kept on the CPU; an active adapter must be on the base's device.
        """
        for book, names in self._chosen(adapter_names):
            for module in (module for name in names for module in book.adapters[name].values()):
                module.to(device)
            if book.serving:
                book.activate(book.serving)  # cached sums of vectors are on the old device

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Does nothing: vectors need no padding to a rank, and can be overwritten in a compiled model, too."""

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = True,
        adapter_names: str | list[str] | None = None,
    ) -> None:
        """Merge adapters, times `lora_scale`, into the base's weights, so that they need no computation.

        `components` are names of components, of which text encoders are ignored; None takes all. `safe_fusing` and
        `adapter_names` are as `safe_merging` and `adapter_names` of `merge_adapter`.
        """
        books = self._adapted(components).values()
        if adapter_names is None:
            chosen = [(book, None) for book in books if book.serving or len(self._books()) == 1]
        else:
            chosen = [(book, names) for book, names in self._chosen(adapter_names) if book in books]
        if not chosen:
            raise ValueError("no adapter is active: name the adapters to merge")
        with contextlib.ExitStack() as on_error:
            for book, names in chosen:
                model_verbs.fuse_lora(book.model, lora_scale, safe_fusing, names)
                on_error.callback(model_verbs.unfuse_lora, book.model)
            on_error.pop_all()

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        """Restore the base's weights bit for bit, and activate the adapters that were active before."""
        books = [book for book in self._adapted(components).values() if book.merged]
        if not books:
            raise ValueError("no adapter is merged")
        for book in books:
            model_verbs.unfuse_lora(book.model)

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    @property
    def fused_loras(self) -> set[str]:
        return {name for book in self._books().values() for name in book.merged or ()}

    def __call__(self, *args, **kwargs):
        """Call the pipeline; a `scale` in its attention kwargs multiplies the adapters' weights during the call."""
        scale, kwargs = take_scale(kwargs) if self._books() else (1.0, kwargs)
        with self._weighed(scale):
            return super().__call__(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a plain pipeline, which loads without this library: the base, with fused adapters if there are any.

        ValueError if active adapters are not fused and would be lost.
        """
        if serving := dict.fromkeys(name for book in self._books().values() for name in book.serving):
            raise ValueError(
                f"adapters {', '.join(serving)} serve unfused, which a plain pipeline cannot hold: fuse_lora() "
                "writes them into its weights, disable_lora() leaves the base, save_lora_weights() writes an adapter"
            )
        self._stock().save_pretrained(
            save_directory, safe_serialization=safe_serialization, variant=variant, max_shard_size=max_shard_size
        )

    def _stock(self) -> DiffusionPipeline:
        """This pipeline as an instance of diffusers' own class, whose name it saves."""
        stock = copy.copy(self)
        stock.__class__ = self.stock_class()
        return stock

    def _models(self) -> dict[str, nn.Module]:
        """Component -> its model, for all components that can have adapters."""
        if models := {name: unwrapped(part) for name, part in denoisers_in(self).items()}:
            return models
        raise ValueError(f"{type(self).__name__} has neither a transformer nor a unet to adapt")

    def _books(self) -> dict[str, AdapterBook]:
        """Component -> its book of adapters, for those that have adapters."""
        return {name: model._onelora for name, model in self._models().items() if hasattr(model, "_onelora")}

    def _adapted(self, components: list[str] | None = None) -> dict[str, AdapterBook]:
        """As `_books`, of these components; ValueError if there are none of these names, or none has adapters."""
        check_components(components, self._models())
        if not (books := self._books()):
            adapters_of(self._adapted_model())  # raises
        return {name: book for name, book in books.items() if components is None or name in components}

    def _adapted_model(self) -> nn.Module:
        return next(iter(self._models().values()))

    def _book(self) -> AdapterBook | None:
        return getattr(self._adapted_model(), "_onelora", None)

    def _only_book(self, adapter_name: str | None, component: str | None) -> tuple[str, AdapterBook]:
        """The only component that has this adapter, None for any, and its book."""
        if adapter_name is not None:
            self._chosen(adapter_name)  # raises if the name is unknown
        books = {
            name: book
            for name, book in self._adapted().items()
            if component in (name, None) and (adapter_name is None or adapter_name in book.adapters)
        }
        if len(books) > 1:
            raise ValueError(f"adapters are in {' and '.join(books)}: give the component whose is to be saved")
        if not books:
            raise ValueError(f"no adapter '{adapter_name or 'at all'}' in '{component}'")
        return next(iter(books.items()))

    def _chosen(self, adapter_names: str | Iterable[str] | None) -> list[tuple[AdapterBook, list[str]]]:
        """(a component's book, its named adapters) for each component that has any; names are as for `choose_all`."""
        books = list(self._adapted().values())
        present = dict.fromkeys(name for book in books for name in book.adapters)
        if adapter_names is None:
            names = dict.fromkeys(book.choose(None) for book in books)
            if len(names) > 1:
                raise ValueError(f"adapters {', '.join(names)} are there to choose from: give the adapter_name")
        else:
            names = dict.fromkeys([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        if unknown := next((name for name in names if name not in present), None):
            raise ValueError(f"adapter '{unknown}' is not in the list of present adapters: {', '.join(present)}")
        return [(book, own) for book in books if (own := [name for name in names if name in book.adapters])]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, AdapterBook]]:
        """Context manager in which no other thread changes or runs the models with adapters; their books."""
        with contextlib.ExitStack() as locks:
            for book in (books := self._books()).values():
                locks.enter_context(book.lock)
            yield books

    @contextlib.contextmanager
    def _weighed(self, scale: float):
        """Context manager that multiplies the active adapters' weights by `scale`, while other threads wait."""
        with self._locked(), contextlib.ExitStack() as scaled:
            for book in self._adapted().values() if scale != 1 else ():
                if before := book.scale(scale):
                    scaled.callback(book.activate, before)
            yield
