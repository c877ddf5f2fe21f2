"""Rows and bytes. Only ``storage.db`` says SQL; only ``storage.blobs`` says file or bucket."""
