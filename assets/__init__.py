"""Assets: what a round materialises. Each body fetches, calls a step, and reports; the method is elsewhere."""
