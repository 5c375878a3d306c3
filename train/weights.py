"""A trained network out of a run's folder or a checkpoint: what `evaluate` and `predict` go by."""

from __future__ import annotations

import dataclasses
import io
import posixpath
import zipfile

import torch

from ingest.errors import ConfigError
from ingest.stores import ObjectMeta, Store, open_store

from .best import BEST_FILE
from .checkpoint import LATEST_FILE, STATE_FILE, check_archive, unpacked
from .config import Recipe, from_json
from .plain_json import of_json
from .step import memory_format
from .unet3d import UNet3D


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network and the recipe that it was trained by.

    Attributes:
        uri: of the checkpoint's folder.
        recipe: of the run.
        weights: the network's state by name, on the CPU.
    """

    uri: str
    recipe: Recipe
    weights: dict[str, torch.Tensor]

    @property
    def run_dir(self) -> str:
        """The folder of the run that the checkpoint lies in."""
        return posixpath.dirname(self.uri)

    def network(self, device: torch.device) -> UNet3D:
        """The network, ready for inference, in the memory layout that the run scored it in."""
        network = UNet3D(self.recipe.model)
        network.load_state_dict(self.weights)
        layout = memory_format(self.recipe, device)
        network.to(device)
        network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
        return network.eval()


def load_trained(uri: str) -> Trained:
    """Load the network of a checkpoint, or the best of a run, or its last one where none was scored.

    Args:
        uri: of a run's folder or of a checkpoint's, local or gs://.

    Raises:
        ConfigError: there is neither, or it is damaged, or its weights are of another network than its recipe says.
        StoreError: the place cannot be read.
    """
    place, entry, store = find_state(uri.rstrip("/").removesuffix(f"/{STATE_FILE}"))
    name = store.uri_of(entry.name)
    data = store.fetch([entry])[0]
    if zipfile.is_zipfile(io.BytesIO(data)):
        check_archive(data, name)
    state = unpacked(data, name)
    try:
        weights, recipe = state["model"], from_json(state["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"expected a checkpoint of `voxflux run` in {name}, found something else "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); give another --checkpoint"
        ) from error
    check_weights(weights, recipe, name)
    return Trained(place, recipe, weights)


def find_state(uri: str) -> tuple[str, ObjectMeta, Store]:
    """The folder of a checkpoint, its `state.pt`, and the store that holds it; see `load_trained`.

    Raises:
        ConfigError: `uri` is neither a run's folder nor a checkpoint's.
    """
    store = open_store(uri)
    if (entry := _object(store, STATE_FILE)) is not None:
        return uri, entry, store
    for pointer in (BEST_FILE, LATEST_FILE):
        named = _object(store, pointer)
        if named is None:
            continue
        try:
            about = of_json(store.fetch([named])[0])
            folder = about["checkpoint"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{store.uri_of(pointer)}: expected the name of a checkpoint, found something else ({error}); give a "
                f"checkpoint's own folder as --checkpoint, such as {store.uri_of('best')}"
            ) from error
        if pointer == BEST_FILE and about.get("mean_dice", 0.0) is None:  # no score, in a file of an earlier version
            continue
        entry = _object(store, f"{folder}/{STATE_FILE}")
        if entry is not None:
            return f"{uri}/{folder}", entry, store
    raise ConfigError(
        f"expected a run's folder (with {BEST_FILE} or {LATEST_FILE}) or a checkpoint's (with {STATE_FILE}), found "
        f"none of these in {store.uri}; check --checkpoint"
    )


def check_weights(weights: dict[str, torch.Tensor], recipe: Recipe, name: str) -> None:
    """Hold weights to the network that a recipe describes.

    Raises:
        ConfigError: with the first few tensors that differ.
    """
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in UNet3D(recipe.model).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    other = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if other:
        first = "; ".join(f"{key} {expected.get(key)} expected, {found.get(key)} found" for key in other[:3])
        raise ConfigError(
            f"{name}: expected the weights of {recipe.model}, found {len(other)} tensors that are missing, strange or "
            f"of another shape: {first}; give the checkpoint of another run"
        )


def _object(store: Store, name: str) -> ObjectMeta | None:
    return next((entry for entry in store.list(name) if entry.name == name), None)
