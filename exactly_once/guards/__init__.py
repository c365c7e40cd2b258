"""Guards, which claim keys and remember them. `contract` is their interface; other modules are one guard each, or shared."""
