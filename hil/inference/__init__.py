"""Asking a board's language model: OpenAI-compatible client, mailbox client, metric definitions."""
