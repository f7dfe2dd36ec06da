"""Where memory goes: weights, cache, a training step, a server; followed where it can be."""
