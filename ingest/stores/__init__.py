"""Places that hold volumes, behind one interface."""

from .base import Deletes, Fetches, Lists, ObjectMeta, Puts, Store, StoreConfig, Transport, open_store

__all__ = ["Deletes", "Fetches", "Lists", "ObjectMeta", "Puts", "Store", "StoreConfig", "Transport", "open_store"]
