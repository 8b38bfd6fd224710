"""Finished runs side by side: tables, plots and pictures."""

from __future__ import annotations
