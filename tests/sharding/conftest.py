"""Processes that train the tiny model, as in tests/train."""

from tests.train.conftest import chats, compiled, start, tiny_model

__all__ = ["chats", "compiled", "start", "tiny_model"]
