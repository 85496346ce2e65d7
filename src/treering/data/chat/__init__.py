"""Conversations: schema, template, and the tokens that the assistant has to write."""
