"""Prepared folders: Parquet with images, a manifest and a card."""
