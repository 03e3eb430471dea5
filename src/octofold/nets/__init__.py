"""Networks: what a model is, where its weights come from, how it is run, what its outputs mean."""
