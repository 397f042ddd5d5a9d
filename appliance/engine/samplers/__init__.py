"""The samplers, a paper to each file; `appliance.engine.sampling` makes them."""
