"""From files to micro-batches: sources, formats, masks of chats, token cache, packing, order. See README.md."""
