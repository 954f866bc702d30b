"""From a data file to tokens with a loss mask: sources, formats, rendering, split, packing."""
