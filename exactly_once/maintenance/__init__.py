"""Jobs by the clock that are no handler's: they clean up rows that would otherwise stay for ever."""
