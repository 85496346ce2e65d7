"""Conversations: schema, template, and which tokens the assistant has to write."""
