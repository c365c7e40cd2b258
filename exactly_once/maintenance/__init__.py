"""Work by the clock that is no handler's: what would otherwise grow or stand for ever is swept."""
