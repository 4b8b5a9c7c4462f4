"""Language models: loaded, prompted, batched, called, asked, and given adapter sets."""
