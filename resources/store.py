"""The store as a resource: where the lineage tables are. What it can do is in rsft_pipeline/store.py."""

import dagster as dg
from pydantic import Field

from rsft_pipeline.home import Home
from rsft_pipeline.store import Store


class StoreResource(dg.ConfigurableResource):
    """Opens the DuckLake; every step opens and closes its own."""

    catalog: str = Field("", description="`postgres:…` or `sqlite:/path`; default: a SQLite catalog in $RSFT_HOME.")
    data: str = Field("", description="Folder or object-store prefix of the Parquet files; default: in $RSFT_HOME.")
    memory: str = Field("", description="Most memory DuckDB takes, e.g. 4GB; default: its own, 80 % of the machine's.")

    def open(self) -> Store:
        """The store, as a context manager."""
        folder = Home.here().folder("store")
        catalog = self.catalog or f"sqlite:{folder / 'catalog.sqlite'}"
        return Store(catalog, self.data or str(folder / "data"), memory=self.memory or None)
