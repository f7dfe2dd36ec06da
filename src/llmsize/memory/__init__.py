"""Where memory goes: weights, cache, a training step, a server, tensor by tensor where it can be."""
