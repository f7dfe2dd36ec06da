"""What llama.cpp allocates: its cache, its graph, its scheduler and its allocator, simulated."""
