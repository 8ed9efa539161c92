"""The inference server: a model behind HTTP that can be left running. Layers: backends, answering, routes, guard."""
