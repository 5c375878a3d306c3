"""Places that hold volumes, behind one interface."""

from .base import Fetches, Lists, ObjectMeta, Puts, Store, StoreConfig, Transport, open_store

__all__ = ["Fetches", "Lists", "ObjectMeta", "Puts", "Store", "StoreConfig", "Transport", "open_store"]
