"""From files to micro-batches: sources, formats, chat masks, token cache, packing, order. See README.md."""
